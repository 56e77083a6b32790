"""The picture of what a policy costs and gains: drawn from whatever results there are."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from kvquant_hf.policies.table import POLICIES

FOLDER = Path(__file__).parents[2] / "benchmarks"
GSM8K = """filter,cache,n,lost,gained
strict-match,exact,200,,
flexible-extract,exact,200,,
flexible-extract,dynamic,200,2,2
flexible-extract,int8,200,3,2
flexible-extract,int4,200,10,4
flexible-extract,hqq-4,200,60,0
"""


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("choose_figure")
    monkeypatch.setattr(module, "FIGURE", tmp_path / "figure.png")
    return module


def test_everything_that_is_drawn_has_bits(program: ModuleType) -> None:
    bits = program.bits()
    assert bits["exact"] == 16 and bits["int4"] == bits["hqq-4"] == 4.5
    steps, servers = program.step_ratios(), program.server_ratios()
    assert set(steps) - {"dynamic", "static"} <= set(bits) and set(servers) <= set(bits)
    assert steps["dynamic"] == servers["exact"] == 1 and steps["int8"] > steps["exact"] > steps["static"] > 1
    assert set(program.BEFORE) <= set(steps) & set(servers) & set(POLICIES)


@pytest.mark.parametrize("measured", [False, True], ids=["without-gsm8k", "with-gsm8k"])
def test_it_can_be_drawn(program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: bool) -> None:
    pytest.importorskip("matplotlib")
    table = tmp_path / "gsm8k.csv"
    if measured:
        table.write_text(GSM8K, encoding="utf-8")
    monkeypatch.setattr(program, "GSM8K", table)
    program.main()
    assert program.FIGURE.read_bytes()[16:20] == (1650 if measured else 1100).to_bytes(4, "big")  # a panel more
