"""Needles: the prompts, what counts as found, and that everything is read out of the cache."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from command import byte_tokenizer
from models import prompt as random_tokens
from models import tiny_llama
from tokenizers.processors import TemplateProcessing

from kvquant_hf.errors import EvaluationError, EvaluationInputError
from kvquant_hf.evaluation import evaluate, needle, paged
from kvquant_hf.evaluation.heatmap import draw_heatmaps
from kvquant_hf.evaluation.needle import NEEDLE, QUESTION, Cell, Prompt, find_needles, hide_needles, passes

PAGE = 16
TEXT = "The quick brown fox jumps over the lazy dog. " * 20


def made(ids: torch.Tensor, answer_tokens: int) -> Prompt:
    """A prompt whose answer is the last tokens of ``ids``."""
    return Prompt(ids.tolist(), answer_tokens, "-", len(ids), 0)


def continued(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    """``ids`` and what transformers writes next, greedily and with its own cache."""
    mask = torch.ones_like(ids).unsqueeze(0)
    return model.generate(ids.unsqueeze(0), attention_mask=mask, max_new_tokens=count, do_sample=False)[0]


def test_prompts() -> None:
    tokenizer = byte_tokenizer()
    prompts = hide_needles(tokenizer, TEXT, [300, 400], [0, 50, 100])
    assert [(p.length, p.depth) for p in prompts] == [(n, d) for n in (300, 400) for d in (0, 50, 100)]
    for prompt in prompts:
        assert len(prompt.ids) == prompt.length
        read = tokenizer.decode(prompt.ids)
        hidden = NEEDLE.format(digits=prompt.digits)
        before, after = read.split(hidden)
        haystack, answer = after.split(QUESTION)
        assert answer == f" {prompt.digits}" and prompt.answer_tokens == 6
        assert TEXT.startswith(before + haystack)
        assert len(before) == round(len(before + haystack) * prompt.depth / 100)


def test_digits_follow_the_seed() -> None:
    digits = [[p.digits for p in hide_needles(byte_tokenizer(), TEXT, [300], [0, 50], seed)] for seed in (0, 0, 1)]
    assert digits[0] == digits[1] and len({*digits[0], *digits[2]}) == 4
    assert all(len(number) == needle.DIGITS for number in digits[0])


def test_a_prompt_begins_as_the_tokenizer_begins_a_text() -> None:
    tokenizer = byte_tokenizer(bos_token="</s>")
    special = [("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=special)
    (prompt,) = hide_needles(tokenizer, TEXT, [300], [0])
    assert prompt.ids.count(tokenizer.eos_token_id) == 1 and prompt.ids[0] == tokenizer.eos_token_id
    assert len(prompt.ids) == 300


@pytest.mark.parametrize(
    ("lengths", "depths", "words"),
    [
        ([300], [101], "percentage"),
        ([300], [-1], "percentage"),
        ([150], [0], r"no haystack; use --lengths 1\d\d"),
        ([5000], [0], "longer --text"),
    ],
)
def test_what_cannot_be_hidden(lengths: list[int], depths: list[float], words: str) -> None:
    with pytest.raises(EvaluationInputError, match=words):
        hide_needles(byte_tokenizer(), TEXT, lengths, depths)


def test_the_shortest_prompt_is_the_one_that_the_error_names() -> None:
    with pytest.raises(EvaluationInputError) as error:
        hide_needles(byte_tokenizer(), TEXT, [1], [0])
    shortest = int(str(error.value).split("--lengths ")[1].split()[0])
    (prompt,) = hide_needles(byte_tokenizer(), TEXT, [shortest], [0])
    assert len(prompt.ids) == shortest


@pytest.mark.parametrize("length", [70, 64, 65])  # the answer inside a page, up to the end of one, over the end
def test_found_is_what_greedy_generation_writes(length: int) -> None:
    model = tiny_llama()
    right = continued(model, random_tokens(length=length)[0], 4)
    wrong = [right.clone() for _ in range(4)]
    for i, ids in enumerate(wrong):
        ids[length + i] = (ids[length + i] + 1) % model.config.vocab_size
    cells = find_needles(model, [made(ids, 4) for ids in (right, *wrong)], "exact", page_size=PAGE)
    assert [cell.found for cell in cells] == [True, False, False, False, False]
    with torch.inference_mode():
        log_p = model(right.unsqueeze(0)).logits[0].double().log_softmax(-1)
    nats = -log_p[length - 1 : -1].gather(1, right[length:, None]).mean()
    assert cells[0].nats == pytest.approx(float(nats), rel=1e-4)


@pytest.mark.parametrize("policy", ["int4", "turboquant"])
def test_nats_are_those_of_the_harness(policy: str) -> None:
    """Which reads the same chunks through the same kind of cache, and is tested against reading token by token."""
    model = tiny_llama().double()
    ids = random_tokens(length=70)
    loss = evaluate(model, ids, [paged(model, policy, page_size=PAGE)], step=PAGE, page_size=PAGE)[policy].scores.loss
    (cell,) = find_needles(model, [made(ids[0], 9)], policy, page_size=PAGE)
    (exact,) = find_needles(model, [made(ids[0], 9)], "exact", page_size=PAGE)
    assert cell.nats == pytest.approx(float(loss[0, -9:].mean()), abs=1e-6)
    assert abs(cell.nats - exact.nats) > 1e-3


def test_prompts_side_by_side() -> None:
    """Also where their answers have different numbers of tokens, and lengths change from one to the next."""
    model = tiny_llama().double()
    prompts = [made(ids, n) for ids, n in zip(random_tokens(4, 70), (3, 5, 1, 6), strict=True)]
    prompts += [made(random_tokens(length=50, seed=1)[0], 2), made(random_tokens(length=70, seed=2)[0], 2)]
    told: dict[int, list[str]] = {1: [], 3: []}
    alone, batched = (
        find_needles(model, prompts, "int4", page_size=PAGE, batch=batch, advance=told[batch].append)
        for batch in (1, 3)
    )
    for one, other in zip(alone, batched, strict=True):
        assert (one.length, one.found) == (other.length, other.found)
        assert one.nats == pytest.approx(other.nats, abs=1e-6)
    for batch, names in told.items():
        assert names == ["int4"] * passes(prompts, PAGE, batch)
    assert passes(prompts, PAGE, 3) == 5 + 5 + 4 + 5


def test_nan_is_refused() -> None:
    model = tiny_llama()
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(EvaluationError, match="NaN"):
        find_needles(model, [made(random_tokens()[0], 2)], "exact", page_size=PAGE)


def test_a_picture_of_many_policies_has_several_rows(tmp_path: Path) -> None:
    heights = {}
    for count in (4, 6):
        cells = {f"policy {i}": [Cell(512, 50, "12345", True, 0.1)] for i in range(count)}
        draw_heatmaps(cells, "a title", str(file := tmp_path / "map.png"))
        width, heights[count] = (int.from_bytes(file.read_bytes()[at : at + 4], "big") for at in (16, 20))
    assert heights[4] < heights[6] and width == round(150 * (1.2 + (0.6 + 0.7) * 4))


def test_a_picture(tmp_path: Path) -> None:
    cells = {
        "exact": [Cell(n, d, "12345", True, 0.1) for n in (512, 1024) for d in (0, 50, 100)],
        "int4": [Cell(n, d, "12345", d != 50, 0.7) for n in (512, 1024) for d in (0, 50, 100)],
    }
    file = tmp_path / "map.svg"
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        draw_heatmaps(cells, "a title", str(file))
    drawn = file.read_text(encoding="utf-8")
    assert all(word in drawn for word in ("a title", "exact", "int4", "1024", "50 %"))
    assert drawn.count("×") == 2  # not found
    assert drawn.count(">0.90<") == 6 and drawn.count("0.50") >= 6
