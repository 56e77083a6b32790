"""The accuracy harness on the real SmolLM2-135M: token by token as page by page, and what outlier keys may cost."""

from typing import Any

import pytest
from models import chapters

from kvquant_hf.evaluation import cut_windows, evaluate, paged, with_outlier_keys

pytestmark = [pytest.mark.model, pytest.mark.slow]

CONTEXT = 72
OUTLIER_CONTEXT = 136


def test_token_by_token_is_the_same_on_real_text(smollm2: tuple[Any, Any]) -> None:
    """In float32 a code falls on the other side of a boundary here and there; a mean moves by less than a percent."""
    model, tokenizer = smollm2
    windows = cut_windows(tokenizer, chapters(3000)[0], CONTEXT, 1)
    contenders = [paged(model, "int4")]
    chunked = evaluate(model, windows, contenders)["int4"]
    stepped = evaluate(model, windows, contenders, step=1)["int4"]
    for result in (chunked, stepped):
        assert 1e-3 < result.accuracy.kld_mean_sealed < 0.1
        assert float(result.scores.kld[:, :64].abs().max()) < 1e-9  # nothing is sealed yet
    assert chunked.accuracy.kld_mean_sealed == pytest.approx(stepped.accuracy.kld_mean_sealed, rel=0.01)
    assert chunked.storage == stepped.storage


@pytest.mark.parametrize(
    ("policy", "bits", "most"), [("int8", 8.5, 2e-4), ("int4", 4.5, 0.022), ("turboquant", 3.375, 0.14)]
)
def test_outlier_keys_do_not_matter(smollm2: tuple[Any, Any], policy: str, bits: float, most: float) -> None:
    """The targets of docs/accuracy.md on a short text; keys with a scale per token or rotated are far above them."""
    model, tokenizer = smollm2
    windows = cut_windows(tokenizer, chapters(3000)[0], OUTLIER_CONTEXT, 1)
    result = evaluate(with_outlier_keys(model, 32.0), windows, [paged(model, policy)])[policy]
    assert 0 < result.accuracy.kld_mean_sealed < most
    assert result.storage.page_bits_per_element == bits
