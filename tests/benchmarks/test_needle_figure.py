"""The picture of needles: what several runs of `kvquant needle` found, joined where they are of one model."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("needle_figure")
    monkeypatch.setattr(module, "FIGURES", tmp_path)
    return module


def run(length: int, **found: bool) -> dict[str, Any]:
    """As ``kvquant needle --json`` writes a run of one length at two depths."""
    cells = {
        name: [
            {"length": length, "depth": depth, "digits": "12345", "found": here, "nats": 0.5} for depth in (100.0, 0.0)
        ]
        for name, here in found.items()
    }
    same = {"dtype": "bfloat16", "versions": {"torch": "1"}, "text": "a text", "depths": [0.0, 100.0]}
    same |= {"model": "a model", "seed": 0, "page_size": 64, "sinks": None}
    return same | {"lengths": [length], "caches": {name: {"cells": own} for name, own in cells.items()}}


def test_runs_are_joined_by_cache(program: ModuleType) -> None:
    mixed = {"int8/int4": True}  # not in the table of policies: last, and not lost
    grids = program.join([run(64, **mixed, int4=False, exact=True), run(32, exact=True, int4=True, **mixed)])
    assert list(grids) == ["exact", "int4", "int8/int4"]
    assert [(cell.length, cell.depth) for cell in grids["int4"]] == [(32, 0), (32, 100), (64, 0), (64, 100)]
    assert program.rows(grids)[2:4] == [
        "| `exact` | 2 of 2, 0.500 | 2 of 2, 0.500 | 4 of 4 |",
        "| `int4` | 2 of 2, 0.500 | 0 of 2, 0.500 | 2 of 4 |",
    ]


@pytest.mark.parametrize(
    ("other", "word"),
    [
        (run(32, exact=True) | {"seed": 1}, "seed is 0"),
        (run(32, exact=True, int4=True), "lacks"),
        (run(64, exact=False), "exact has two outcomes at 64 tokens and 100 %"),
    ],
)
def test_what_cannot_be_one_picture_is_refused(program: ModuleType, other: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        program.join([run(64, exact=True), other])


def test_it_can_be_drawn(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    for length, model in ((32, "a"), (64, "a"), (64, "b")):
        text = json.dumps(run(length, exact=True, int4=True) | {"model": model})
        (tmp_path / f"needle-{model}-{length}.json").write_text(text, encoding="utf-8")
    monkeypatch.setattr(program, "RESULTS", tmp_path)
    program.main()
    assert all((tmp_path / f"needles-{model}.png").read_bytes().startswith(b"\x89PNG") for model in "ab")
    tables = capsys.readouterr().out.splitlines()
    assert tables[0] == "a" and tables[2] == "| cache | 32 | 64 | as `exact` |" and "b" in tables


@pytest.mark.parametrize("model", ["qwen2.5-coder-0.5b", "SmolLM2-135M-Instruct"])
def test_what_is_committed_can_be_joined(program: ModuleType, model: str) -> None:
    paths = program.RESULTS.glob(f"needle-{model}-*.json")
    grids = program.join(json.loads(path.read_text(encoding="utf-8")) for path in paths)
    assert {"exact", "int8", "int4", "kv3", "kv2.9", "kv2.4", "turboquant"} <= set(grids)
    assert {cell.length for cell in grids["exact"]} == {1024, 2048, 4096, 8192}
    assert (FOLDER.parent / "docs" / "figures" / f"needles-{model}.png").is_file()
