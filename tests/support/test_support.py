"""docs/support.md against the installed transformers, cell by cell."""

import pytest
import torch
from stand_ins import FLASH, NAMES
from support.architectures import ARCHITECTURES
from support.features import FEATURES, Runner, Turn, model_of
from support.outcomes import (
    ATTENTION,
    BATCHING,
    COLUMNS,
    FALLBACK,
    LAYERS,
    NONE,
    PAGES,
    REFUSED,
    STATUSES,
    Mismatch,
    check_exact,
    cost_of_a_lost_page,
)
from support.page import STATED, check_cell, is_measured
from support.table import document, parse, render

# All ways of generating with one architecture of each kind of cache and attention: plain, windows in every layer,
# softcap, sinks, shared keys, a cache that begins again, attention of its own, latents, linear attention, encoders of
# three kinds.
KINDS = (
    "Llama",
    "Mistral, every layer with a window",
    "Gemma2",
    "gpt-oss",
    "Gemma4, text",
    "Phi3, beyond its original length",
    "Falcon",
    "DeepSeek-V3",
    "Qwen3-Next",
    "T5",
    "Whisper",
    "LLaVA",
)
# What the others run, too; the rest of their cells is run with the marker "full".
ALWAYS = (LAYERS, ATTENTION, "greedy", "left-padded")
# Compiling takes seconds: a model that makes a detour.
COMPILED = ("BLOOM",)


def is_full(name: str, column: str) -> bool:
    """Whether the usual run leaves a cell out; the FlashAttention names stand for one function."""
    if column == "compile":
        return name not in COMPILED
    return column in FLASH[1:] or (name not in KINDS and column not in ALWAYS)


@is_measured
@pytest.mark.filterwarnings("ignore")  # of two dozen models of transformers'
@pytest.mark.parametrize(
    ("name", "column"),
    [
        pytest.param(name, column, marks=[pytest.mark.full] * is_full(name, column))
        for name in ARCHITECTURES
        for column in [*COLUMNS, *NAMES]
        if column != BATCHING  # test_batching.py
    ],
)
def test_cell(name: str, column: str) -> None:
    check_cell(name, column)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.full] * (name not in KINDS))
        for name, row in ARCHITECTURES.items()
        if row.exists
    ],
)
def test_a_lost_page_would_show(name: str) -> None:
    """The bound on int8 means something: reading zeros for one page of 8 tokens is ten times beyond it."""
    assert cost_of_a_lost_page(name) > 10


def test_a_luckily_right_token_is_refused() -> None:
    """Equal tokens are not enough: neither with other logits nor with a runner-up within rounding."""
    ids = torch.tensor([[3, 4]])
    logits = torch.tensor([[[1.0, 0.0, 5.0]]])
    good = [Turn(ids, logits, None, {})]
    check_exact(good, [Turn(ids, logits + 1e-5, None, {})])
    with pytest.raises(Mismatch, match="tokens"):
        check_exact(good, [Turn(ids + 1, logits, None, {})])
    with pytest.raises(Mismatch, match="logits"):
        check_exact(good, [Turn(ids, logits + 1e-2, None, {})])
    close = torch.tensor([[[1.0, 4.9999, 5.0]]])
    with pytest.raises(Mismatch, match="tie"):
        check_exact([Turn(ids, close, None, {})], [Turn(ids, close + 1e-4, None, {})])


def test_every_row_and_column_is_there() -> None:
    assert set(KINDS) <= set(ARCHITECTURES) and set(ALWAYS) <= set(COLUMNS)
    assert list(STATED) == list(ARCHITECTURES) and len(STATED) >= 24
    assert all(list(row) == [*COLUMNS, *NAMES] for row in STATED.values())
    texts = {row[column][0] for row in STATED.values() for column in [*FEATURES, *NAMES]}
    assert {PAGES, FALLBACK} <= texts <= set(STATUSES)
    for row in STATED.values():
        for column in [*FEATURES, *NAMES]:
            text, reason = row[column]
            assert bool(reason) == (text not in (PAGES, FALLBACK)), "a reason for everything that is not simply right"


def test_windows_are_shorter_than_prompts_and_pages_are_sealed() -> None:
    """What the cells promise to cover, from the caches themselves."""
    run = Runner(ARCHITECTURES["Gemma3, text"], "int8")
    FEATURES["greedy"].run(run)
    (cache,) = run.caches
    sliding = [layer for layer in cache.paged_layers if layer.is_sliding]
    assert sliding and all(layer.window < run.architecture.inputs()["input_ids"].shape[1] for layer in sliding)
    assert all(layer.store.sealed_pages >= (1 if layer.is_sliding else 4) for layer in cache.paged_layers)
    assert all(layer.first > 0 for layer in sliding)  # and pages were given back


def test_the_assistant_is_right_now_and_then() -> None:
    """Otherwise nothing, or everything, would be cropped."""
    calls: list[int] = []
    run = Runner(ARCHITECTURES["Llama"], "exact")
    handle = model_of("Llama").register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        (turn,) = FEATURES["assisted"].run(run)
    finally:
        handle.remove()
    assert 4 < len(calls) < turn.logits.shape[0]


def test_versions_that_differ_share_a_table() -> None:
    """What is rendered is read back, version by version."""

    def cells(texts: dict[str, tuple[str, str]]) -> dict[str, dict[str, tuple[str, str]]]:
        return {"Llama": {column: texts.get(column, (PAGES, "")) for column in [*COLUMNS, *NAMES]}}

    old = cells({"layers": ("2 paged, 2 Other", ""), "greedy": (NONE, "Error: a, b; c"), "fork": (REFUSED, "so")})
    new = cells({"layers": ("4 paged", ""), "greedy": (FALLBACK, ""), "fork": (REFUSED, "so")})
    text = render({"5.17": old, "5.23": new}, [*COLUMNS, *NAMES])
    assert parse(text, "5.17") == old and parse(text, "5.23") == new
    assert "5.17: –[^1]; 5.23: fallback" in text and text.count("refused[^2]") == 1
    between = render({"5.17": old, "5.20": old, "5.23": new})
    assert "5.17, 5.20: –[^1]; 5.23: fallback" in between and "5.17, 5.20: 2 paged, 2 Other; 5.23: 4 paged" in between
    assert parse(between, "5.20")["Llama"].items() <= old["Llama"].items()
    whole = document({"5.17": old, "5.23": new})
    tables = whole[whole.index("| architecture |") :].partition("\n## The ways")[0]
    assert parse(tables, "5.17") == old and parse(tables, "5.23") == new
