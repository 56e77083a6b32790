"""The picture of bits against KLD: its table fits the policies that there are, and it can be drawn."""

import importlib.util
from pathlib import Path

import pytest

from kvquant_hf.policies.cost import page_cost
from kvquant_hf.policies.table import POLICIES, parse_policy

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "accuracy_figure.py"


@pytest.fixture(scope="module")
def program() -> object:
    spec = importlib.util.spec_from_file_location("accuracy_figure", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bits_are_those_of_the_pages(program: object) -> None:
    """Of 64 elements to a vector, as both models have, and stored as with a 16-bit model."""
    rows = {row["cache"]: row for row in program.read() if row["family"] in ("ours", "before", "LMDeploy", "engines")}
    for name, row in rows.items():
        assert f"{page_cost(parse_policy(name), 64).bits_per_element:.2f}" == row["bits"], name
    ours = [name for name in POLICIES if POLICIES[name].sinks]
    assert {name for name, row in rows.items() if row["family"] == "ours"} == set(ours) - {"turboquant"}


def test_it_can_be_drawn(program: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(program, "FIGURE", tmp_path / "figure.png")
    program.main()
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_more_bits_are_not_worse(program: object) -> None:
    for model in program.MODELS:
        klds = [kld for _, kld, _ in program.points(program.read(), "ours", model)]
        assert len(klds) == 5 and klds == sorted(klds, reverse=True)
