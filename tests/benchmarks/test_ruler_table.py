"""The tables of RULER, out of what `kvquant compare --csv` writes."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
HEAD = "task,metric,filter,cache,bits_per_element,n,score,difference,difference_stderr"
SHORT = f"{HEAD}\nvt,1024,none,exact,16.0,15,1.0,,\nvt,1024,none,int4,4.5,15,0.5,-0.5,0.04\n"
LONG = f"{HEAD}\nvt,16384,none,exact,16.0,5,0.5,,\nvt,16384,none,int4,4.5,5,0.0,-0.5,0.16\n"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("ruler_table")


def test_by_length_and_by_task(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "RESULTS", tmp_path)
    for name, text in (("short", SHORT), ("long", LONG)):
        (tmp_path / f"ruler-{name}.csv").write_text(text, encoding="utf-8")
    program.main()
    assert capsys.readouterr().out.splitlines() == [
        "| cache | bits | 1,024 | 16,384 | all |",
        "|---|--:|--:|--:|--:|",
        "| `exact` | 16.00 | 100.0 | 50.0 | 75.0 |",
        "| `int4` | 4.50 | 50.0 | 0.0 | 25.0 |",
        "",
        "| cache | bits | `vt` | all |",
        "|---|--:|--:|--:|",
        "| `exact` | 16.00 | 75.0 | 75.0 |",
        "| `int4` | 4.50 | 25.0 | 25.0 |",
        "",
        "`int4` -50.0 ± 5.0 (20 problems)",
    ]
    (tmp_path / "ruler-long.csv").write_text(LONG.rpartition("vt")[0], encoding="utf-8")
    rows = program.read()
    assert program.table(rows, "metric")[3] == "| `int4` | 4.50 | 50.0 | – | – |"
    assert len(program.table(rows, "task")) == 3  # of a task too there are half of its lengths alone


def test_what_is_committed_has_four_lengths(program: ModuleType) -> None:
    lines = program.table(program.read(), "metric")
    assert lines[0].startswith("| cache | bits | 1,024 | 2,048 | 4,096 | 8,192 |")
    assert {line.split("`")[1] for line in lines[2:]} >= {"exact", "int8", "int4", "kv3", "kv2.4", "turboquant"}
