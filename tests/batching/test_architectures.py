"""The architectures of docs/support.md in batches: docs/serving.md says which, and what keeps the others out."""

import re
from pathlib import Path

import pytest
from batching.runs import GREEDY, batched, config_of, one_by_one, prompts_of
from support.architectures import ARCHITECTURES

from kvquant_hf.errors import BatchingError, UnsupportedModelError

TEXT = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
CELLS = dict(re.findall(r"^\| ([^|]+) \| (✓|refused: [^|]+) \|$", TEXT, re.MULTILINE))
DECODERS = [name for name, row in ARCHITECTURES.items() if row.kind == "decoder"]
LENGTHS = (1, 21, 40, 64)
SEEDS = {"Gemma2": 3, "OLMo2": 3}  # prompts without a close runner-up


def test_all_are_listed() -> None:
    assert list(CELLS) == DECODERS
    assert sum(cell == "✓" for cell in CELLS.values()) >= 12


@pytest.mark.filterwarnings("ignore")  # of two dozen models of transformers'
@pytest.mark.parametrize("name", DECODERS)
def test_architecture(name: str) -> None:
    """``exact``, four prompts in pages of 8 tokens, as one by one; or the error that is documented."""
    row = ARCHITECTURES[name]
    prompts = [[3 + token % 80 for token in prompt] for prompt in prompts_of(LENGTHS, SEEDS.get(name, 1))]
    config = config_of("exact", page_size=8, num_blocks=200)
    if CELLS[name] == "✓":
        model = row.build()
        found, _ = batched(model, prompts, config)
        assert found == one_by_one(model, prompts)
        return
    with pytest.raises((UnsupportedModelError, BatchingError, AssertionError)) as caught:
        batched(row.build(), prompts, config, GREEDY)
    reason = CELLS[name].removeprefix("refused: ")
    assert reason in str(caught.value)
    assert "use generate()" in str(caught.value)
