"""The GPU benchmark without a GPU: its plan, its gate, and what it makes of a file of results.

Every number in a file here is made up, says so in its columns, and stays in the test's own folder.
"""

import dataclasses
import importlib.util
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch
from gpu import command, gate, machine, plan, subject
from gpu.importable import link_tree
from gpu.plan import Budget, Cell, Shape
from gpu.report import markdown
from gpu.results import FIELDS, Observation, Writer, compared, read
from gpu.timing import Timing
from typer.testing import CliRunner

CPU = torch.device("cpu")
TINY = Shape(4, 2, 64)
CONSTANTS = dict.fromkeys(machine.CONSTANTS, "made up") | {"gpu": "no GPU", "date": "2000-01-01"}


# -- plan --------------------------------------------------------------------------------------------------------------


def test_the_most_informative_cell_comes_first() -> None:
    cells = plan.cells()
    assert cells[0] == Cell(Shape(32, 8, 128), 8, 32768)
    assert len(cells) == len(set(cells)) == 4 * 4 * 5
    assert cells[-1].shape == plan.SHAPES[-1] and cells[-1].context == 1024


def test_bytes_of_a_cell_are_those_of_its_tensors() -> None:
    cell = Cell(TINY, 2, 256)
    for policy in plan.POLICIES:
        packed = subject.pack(policy, cell, CPU)
        pages = cell.batch * cell.sealed
        stored = sum(plane[:pages].nbytes for side in packed[:2] for plane in side.planes)
        assert cell.stored_bytes(policy) == stored + sum(side.tail.nbytes for side in packed[:2])
    assert cell.dense_bytes() == 2 * 2 * 2 * 256 * 64 * 2


def test_what_fits() -> None:
    cell = plan.cells()[0]
    sizes = [cell.dense_bytes(), *(cell.stored_bytes(policy) for policy in plan.POLICIES)]
    assert plan.fit(cell, plan.POLICIES, plan.HEADROOM + sum(sizes)) == plan.Fit(True, plan.POLICIES, {})
    partly = plan.fit(cell, plan.POLICIES, plan.HEADROOM + sizes[0] + sizes[1])
    assert (partly.dense, partly.policies) == (True, ("int4",)) and set(partly.refused) == {*plan.POLICIES[1:]}
    small = plan.fit(cell, plan.POLICIES, plan.HEADROOM + sizes[1])
    assert (small.dense, small.policies) == (False, ("int4",)) and "GiB" in small.refused["bf16"]


def test_budget() -> None:
    budget = Budget(100)
    assert 99 < budget.left() <= 100 and budget.part(5).left() <= 5 and budget.part(1000).left() <= 100
    assert Budget(-1).left() < 0 and Budget(-1).part(5).left() <= 0


# -- gate --------------------------------------------------------------------------------------------------------------

GREEN = "def test_green():\n    assert sum([1, 2]) == 3\n"
RED = "import pytest\n\n@pytest.mark.parametrize('n', [1, 2])\ndef test_red(n):\n    assert n == 1\n"
NEEDS = "import a_package_that_nobody_has\n\ndef test_unknown():\n    pass\n"


@pytest.mark.parametrize("count", [1, 2])
def test_green_gate(tmp_path: Path, count: int) -> None:
    (tmp_path / "test_green.py").write_text(GREEN)
    (tmp_path / "test_needs.py").write_text(NEEDS)
    verdict = gate.run(Budget(60), tmp_path, processes=count)
    assert verdict.green and (verdict.passed, verdict.failed) == (1, ())
    assert verdict.left_out == {"test_needs.py": "needs a_package_that_nobody_has"}


def test_the_kernel_tests_are_chosen() -> None:
    files, left_out = gate.choose(gate.KERNEL_TESTS)
    assert {"test_decode.py", "test_append.py"} <= {path.name for path in files}
    assert set(gate.AHEAD_OF_TIME) <= set(left_out)


def test_nothing_is_not_green(tmp_path: Path) -> None:
    assert not gate.run(Budget(60), tmp_path).green
    (tmp_path / "test_skipped.py").write_text("import pytest\n\ndef test_skipped():\n    pytest.skip()\n")
    (tmp_path / "test_green.py").write_text(GREEN)
    verdict = gate.run(Budget(60), tmp_path, processes=1)
    assert verdict.passed == 1 and not verdict.green and "test_skipped.py: all 1 tests" in verdict.failed[0]
    (tmp_path / "test_broken.py").write_text("def test_broken(:\n")
    assert not gate.run(Budget(60), tmp_path, processes=1).green


def test_tests_that_never_end_are_red(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text("import time\n\ndef test_slow():\n    time.sleep(600)\n")
    verdict = gate.run(Budget(0), tmp_path, processes=1)
    assert not verdict.green and "not finished in time" in verdict.failed[0]


def test_a_red_gate_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_red.py").write_text(RED)
    monkeypatch.setattr(gate, "KERNEL_TESTS", tmp_path)
    monkeypatch.setattr(command, "gpu", lambda: CPU)
    monkeypatch.setattr(command, "Stopwatch", lambda device: pytest.fail("measured behind a red gate"))
    result = CliRunner().invoke(command.app, ["bench", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "test_red[2]" in result.output and "test_red[1]" not in result.output.split("gate: red")[1]
    assert "nothing is measured" in result.output and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["bench", "tune"])
def test_no_gpu(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(command.app, [name])
    assert result.exit_code == 2
    assert result.output.strip().count("\n") == 0 and "there is no GPU here" in result.output


def test_links_follow_the_checkout(tmp_path: Path) -> None:
    for name in ("kvquant_hf/a.py", "kvquant_hf/b.py", "triton_kernels/ops.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"NAME = {name!r}\n")
    package = link_tree(tmp_path) / "kvquant_hf"
    assert (package / "triton_kernels" / "ops.py").read_text() == "NAME = 'triton_kernels/ops.py'\n"
    (tmp_path / "kvquant_hf/b.py").unlink()
    (tmp_path / "kvquant_hf/c.py").write_text("")
    link_tree(tmp_path)
    assert {path.name for path in package.iterdir()} == {"a.py", "c.py", "triton_kernels"}


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    """A file with rows of every part, a gap, and numbers that nobody measured."""
    path = tmp_path / "made-up.csv"
    with Writer(path, CONSTANTS) as writer:
        for heads in ((32, 8, 128), (24, 8, 64)):
            for batch in (1, 8):
                for context in (1024, 32768):
                    base = Observation("decode", batch, context, *heads, bytes=1000)
                    times = {("paged", "int4"): 2.0, ("paged", "int8"): 3.0, ("bf16", "sdpa-flash"): 6.0}
                    times |= {("copy", "int4"): 1.0, ("copy", "int8"): 1.5}
                    rows = [
                        dataclasses.replace(base, family=family, contender=name).timed(Timing(us, us, us, 10))
                        for (family, name), us in times.items()
                    ]
                    writer.write(compared(rows))
        gap = Observation("decode", 64, 131072, 32, 8, 128, family="bf16", contender="all", status="skipped")
        writer.write([dataclasses.replace(gap, reason="needs 64.0 GiB, 1.0 GiB are left")])
        model = Observation("model", 1, 1024, 32, 8, 128, "paged", "int4", layers=4, tokens_per_s=10.0)
        writer.write([dataclasses.replace(model, peak_bytes=3_000_000_000).timed(Timing(1, 2, 3, 4))])
    return path


def test_rows_come_back(csv: Path) -> None:
    rows = read(csv)
    assert tuple(rows[0]) == FIELDS and len(rows) == 8 * 5 + 2
    assert rows[0]["ratio_to_bf16"] == "3" and rows[0]["percent_of_copy"] == "50" and rows[0]["gpu"] == "no GPU"
    assert rows[0]["gb_per_s"] == "0.5" and rows[0]["tokens_per_s"] == ""
    other = csv.with_name("other.csv")
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="measure again"):
        read(other)


def test_table(csv: Path) -> None:
    text = markdown(read(csv), csv.name)
    assert "| 32/8 × 128, batch 8, 32768 | 6.0 (sdpa-flash) | 2.0, 3.00×, 50 % | 3.0, 2.00×, 50 % |" in text
    assert "| batch 1, 1024, 4 layers | 10.0, 3.0 GB |" in text
    assert "| decode | all | skipped | 1 | needs 64.0 GiB, 1.0 GiB are left |" in text


def test_from_a_file_alone(csv: Path) -> None:
    result = CliRunner().invoke(command.app, ["bench", "--from", str(csv)])
    assert result.exit_code == 0, result.output
    assert csv.with_suffix(".md").read_text(encoding="utf-8") == markdown(read(csv), csv.name)
    if importlib.util.find_spec("matplotlib") is None:
        assert "no figure" in result.output
    else:
        assert csv.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_every_column_is_documented() -> None:
    text = (Path(command.RESULTS) / "README.md").read_text(encoding="utf-8")
    assert [name for name in FIELDS if f"`{name}`" not in text] == []


@pytest.mark.parametrize("quick", [True, False])
def test_a_run_leaves_time_for_every_part(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}
    for name in ("decode_sweep", "update_cells", "model_cells"):
        given[name] = create_autospec(getattr(command, name), return_value=[[name]])
        monkeypatch.setattr(command, name, given[name])
    total = 120 if quick else 540
    rows = list(command.parts(["int4"], None, CPU, Budget(total), quick))
    assert rows == [["decode_sweep"], ["update_cells"], ["model_cells"]]
    parts = {name: next(x.left() for x in mock.call_args.args if isinstance(x, Budget)) for name, mock in given.items()}
    assert 0 < parts["decode_sweep"] + parts["update_cells"] < total, "nothing is left for whole models"
    assert given["decode_sweep"].call_args.args[0][0] == (
        plan.cells()[0] if not quick else Cell(plan.SHAPES[0], 8, 32768)
    )
