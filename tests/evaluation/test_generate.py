"""Continuations decoded token by token: errors are seen where they happen, and reading in chunks is the same."""

from typing import Any

import pytest
import torch
from models import prompt, tiny_llama, tiny_qwen2
from readings import Damaged, same

from kvquant_hf.errors import EvaluationError, EvaluationInputError
from kvquant_hf.evaluation import Contender, Decoded, decode, evaluate, paged
from kvquant_hf.evaluation.generate import passes
from kvquant_hf.evaluation.harness import weigh_paged

PAGE = 16
PROMPT = PAGE + 3  # a page and a part of one
CONTEXT = PROMPT + 4 * PAGE


def measure(model: Any, contenders: list[Contender], **options: Any) -> tuple[torch.Tensor, dict[str, Decoded]]:
    options = {"page_size": PAGE, "batch": 2} | options
    return decode(model, prompt(batch=2, length=PROMPT), CONTEXT, contenders, **options)


def contenders(model: Any, *policies: str) -> list[Contender]:
    return [paged(model, policy, page_size=PAGE) for policy in policies]


def test_exact_is_the_noise_floor() -> None:
    model = tiny_llama()
    _, results = measure(model, contenders(model, "exact", "int8", "int4"))
    exact, int8, int4 = (results[name] for name in ("exact", "int8", "int4"))
    for kld in (exact.result.accuracy.kld_mean, exact.chunked, *exact.quarters):
        assert abs(kld) < 1e-9
    assert exact.result.accuracy.top1_agreement == 1
    assert exact.result.accuracy.positions == 2 * (CONTEXT - PROMPT)
    for i, kld in enumerate(int8.quarters):
        assert 1e-9 < kld < int4.quarters[i]
    assert sum(int4.quarters) / 4 == pytest.approx(int4.result.accuracy.kld_mean)


def test_the_exact_model_continues_as_generate_does() -> None:
    model = tiny_llama().double()
    text, results = measure(model, contenders(model, "exact"))
    generated = model.generate(prompt(batch=2, length=PROMPT), do_sample=False, max_new_tokens=CONTEXT - PROMPT)
    assert text.equal(generated)
    with torch.inference_mode():
        log_p = model(text, use_cache=False).logits.log_softmax(-1)
    loss = -log_p[:, :-1].gather(-1, text[:, 1:, None]).squeeze(-1)[:, PROMPT - 1 :]
    assert torch.allclose(results["exact"].result.scores.exact_loss, loss, rtol=1e-6, atol=1e-9)


def test_in_chunks_is_the_same() -> None:
    """Position by position, and what is held in the end."""
    model = tiny_qwen2().double()
    caches = contenders(model, "int4", "int8-token")
    text, results = measure(model, caches)
    chunked = evaluate(model, text, caches, step=PAGE, page_size=PAGE, batch=2)
    for name, decoded in results.items():
        kld = chunked[name].scores.kld[:, PROMPT - 1 :]
        assert same(decoded.result.scores.kld, kld), name
        assert decoded.chunked == pytest.approx(float(kld.mean()), rel=1e-9)
        assert decoded.result.accuracy.kld_mean == pytest.approx(decoded.chunked, rel=1e-3)
        assert decoded.result.storage == chunked[name].storage


def test_damage_is_seen_in_later_quarters_only() -> None:
    """The third page is sealed, and damaged, at the first position of the third quarter."""
    model = tiny_llama()

    class Late(Damaged):
        page = 2

    make = lambda: Late(model.config, "exact", page_size=PAGE, prefill="quantized")  # noqa: E731
    late = Contender("late", make, weigh_paged)
    _, results = decode(model, prompt(batch=2, length=PAGE + 1), 5 * PAGE + 1, [late], page_size=PAGE, batch=2)
    first, second, third, fourth = results["late"].quarters
    assert max(abs(first), abs(second)) < 1e-9 < 1e-3 < min(third, fourth)
    kld = results["late"].result.scores.kld
    assert float(kld[:, : 2 * PAGE].abs().max()) < 1e-9 < float(kld[:, 2 * PAGE :].min())


def test_sealed_positions_are_counted_from_the_beginning_of_the_text() -> None:
    model = tiny_llama()
    caches = contenders(model, "int4")
    _, long = measure(model, caches)
    assert long["int4"].result.accuracy.kld_mean_sealed == long["int4"].result.accuracy.kld_mean
    _, short = decode(model, prompt(length=3), 2 * PAGE, caches, page_size=PAGE)
    kld = short["int4"].result.scores.kld
    assert short["int4"].result.accuracy.kld_mean_sealed == pytest.approx(float(kld[:, PAGE - 2 :].mean()))
    assert float(kld[:, : PAGE - 2].abs().max()) < 1e-9


def test_windows_one_by_one_are_the_same() -> None:
    model = tiny_llama().double()
    caches = contenders(model, "int4")
    (text, together), (again, alone) = measure(model, caches), measure(model, caches, batch=1)
    assert text.equal(again)
    assert same(together["int4"].result.scores.kld, alone["int4"].result.scores.kld)


def test_every_forward_pass_is_told() -> None:
    model, told = tiny_llama(), []
    measure(model, contenders(model, "exact", "int8"), advance=told.append)
    assert told == ["", "exact", "int8"] * passes(PROMPT, CONTEXT, PAGE)


def test_a_cache_that_is_not_read_is_refused() -> None:
    model = tiny_llama()
    make = contenders(model, "int4")[0].make
    shared = make()
    with pytest.raises(EvaluationError, match="no one else"):
        measure(model, [Contender("x", lambda: shared, weigh_paged)])


@pytest.mark.parametrize("prompt_tokens", [0, CONTEXT - 3, CONTEXT])
def test_something_is_left_to_decode(prompt_tokens: int) -> None:
    with pytest.raises(EvaluationInputError, match="smaller --prompt"):
        decode(tiny_llama(), prompt(length=max(1, prompt_tokens))[:, :prompt_tokens], CONTEXT, [])
