"""The GPU benchmark without a GPU: its plan, its gate, and what it makes of a file of results.

Every number in a file here is made up, says so in its columns, and stays in the test's own folder.
"""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.gpu_stand_ins import CPU, Counter
from gpu import command, gate, machine, passed, plan, run, subject
from gpu.clock import Budget
from gpu.importable import link_tree
from gpu.plan import Cell, Shape
from gpu.report import markdown
from gpu.results import FIELDS, UNREACHED, Observation, Writer, compared, find, key_of, read
from gpu.timing import Timing
from typer.testing import CliRunner

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

HEAD = """
import time
import pytest

@pytest.fixture
def device():
    return "cpu"

"""
GREEN = """
@pytest.mark.parametrize("pair", [("int4-channel", "int4-hadamard"), ("int8-channel", "int8-affine")], ids="/".join)
def test_pair(pair, device):
    pass

def test_shared(device):
    pass
"""
UNMEASURED = """
@pytest.mark.parametrize("policy", ["int8-token", "int4-token"])
def test_policy(policy, device):
    raise RuntimeError("this would stop the benchmark")

def test_by_name(device):
    assert "lloyd3-channel" == "lloyd3"
"""
RED = """
@pytest.mark.parametrize("case", [1, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize("pair", [("exact", "exact"), ("int8-channel", "int8-affine")], ids="/".join)
def test_red(pair, case, device):
    assert pair[0] == "exact"
"""


INT4 = "int4-channel/int4-hadamard"


def test_green_gate(tmp_path: Path) -> None:
    (tmp_path / "test_green.py").write_text(HEAD + GREEN)
    (tmp_path / "test_unmeasured.py").write_text(HEAD + UNMEASURED + "def test_elsewhere():\n    pass\n")
    (tmp_path / "test_needs.py").write_text("import a_package_that_nobody_has" + HEAD + GREEN)
    (tmp_path / "test_elsewhere.py").write_text("def test_elsewhere():\n    pass\n")
    verdict = gate.run(Budget(60), tmp_path, [INT4], processes=2)
    assert verdict.failures == [] and verdict.passed == {"test_green.py": 2}
    assert verdict.aside == {"codecs": 4, "device": 1} and verdict.by_codec == {"int4-channel": 1, "int4-hadamard": 1}
    assert verdict.left_out == {
        "test_needs.py": "needs a_package_that_nobody_has",
        "test_elsewhere.py": "runs nothing on the device",
    }
    assert verdict.against(INT4) == [] and verdict.against("exact") == ["no test of exact passed"]


def test_a_red_test_speaks_for_its_codecs(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(HEAD + GREEN + RED)
    verdict = gate.run(Budget(60), tmp_path, [INT4, "int8", "exact"], processes=1)
    assert verdict.passed.total() == 4 and "int8-channel" in verdict.output
    names = ["test_a.py::test_red[int8-channel/int8-affine-1]"]
    assert [failure.name for failure in verdict.failures] == verdict.against("int8") == names
    # Keys alone are enough.
    assert verdict.against("int8/int4") == names and not verdict.against(INT4) and not verdict.against("exact")
    verdict = gate.run(Budget(60), tmp_path, ["exact"], full=True, processes=1)
    assert (verdict.passed.total(), verdict.failures, verdict.aside["codecs"]) == (3, [], 4)


def test_the_kernel_tests_are_chosen() -> None:
    files, left_out = gate.choose(gate.KERNEL_TESTS)
    assert {"test_decode.py", "test_append.py"} <= {path.name for path in files}
    for name in ("test_compile_targets.py", "test_kernel_docs.py", "test_launch.py"):
        assert left_out[name] == "runs nothing on the device"


def test_every_policy_has_kernel_tests_of_its_codecs(tmp_path: Path) -> None:
    """Which tests are about what, as the gate sees it in the real ones: collected and not run."""
    files, _ = gate.choose(gate.KERNEL_TESTS)
    codecs = sorted(gate.codecs_of(plan.POLICIES))
    asked = gate.ask(plan.POLICIES, tmp_path, 0, 1)
    process = gate._start(files, asked, False, "--collect-only")
    assert process.wait(60) == 0, (tmp_path / "0.txt").read_text()
    (line,) = map(json.loads, (tmp_path / "0.jsonl").read_text().splitlines())
    about = [set(named) for named in line["tests"].values()]
    assert line["aside"]["codecs"] > 20 and all(named & set(codecs) for named in about if named)
    for codec in codecs:
        assert sum(codec in named for named in about) >= 5, codec
    shared = {name.partition("[")[0].partition("::")[2] for name, named in line["tests"].items() if not named}
    assert {"test_rotate", "test_rounding"} <= shared and "test_every_feature" not in shared


def test_nothing_is_not_green(tmp_path: Path) -> None:
    assert "can run here" in gate.run(Budget(60), tmp_path, ["int4"]).against("int4")[0]
    (tmp_path / "test_skipped.py").write_text(HEAD + "def test_skipped(device):\n    pytest.skip()\n")
    (tmp_path / "test_green.py").write_text(HEAD + GREEN)
    verdict = gate.run(Budget(60), tmp_path, ["int4"], processes=1)
    assert verdict.passed.total() == 2 and verdict.against("int4") == ["test_skipped.py: all 1 tests were skipped"]
    (tmp_path / "test_broken.py").write_text("def test_broken(:\n")
    assert "exit code 2" in gate.run(Budget(60), tmp_path, ["int4"], processes=1).against("int4")[0]


def test_tests_that_never_end_are_red(tmp_path: Path) -> None:
    slow = "@pytest.mark.parametrize('policy', ['int8', 'int4'])\ndef test_slow(policy, device):\n    time.sleep(600)\n"
    (tmp_path / "test_slow.py").write_text(HEAD + slow)
    verdict = gate.run(Budget(0), tmp_path, ["int8"], processes=1)
    assert "not finished in time" in verdict.against("int8")[0] and "not finished in time" in verdict.against("int4")[0]
    # Tests that are known to be under way speak for their codecs alone.
    asked = gate.ask([], tmp_path, 0, 1)
    tests = {"test_slow.py::test_slow[a/b]": ["exact"], "test_slow.py::test_fast": []}
    lines = [{"tests": tests, "aside": {}}, {"test": "test_slow.py::test_fast", "outcome": "passed"}]
    Path(asked["report"]).write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path(asked["report"]).with_suffix(".txt").write_text("")
    with gate.subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        verdict = gate.Verdict()
        gate._judge(process, asked, Budget(0), verdict)
    assert verdict.failures == [gate.Failure("test_slow.py::test_slow[a/b]: not finished in time", {"exact"})]
    assert verdict.passed.total() == 1


def test_a_gate_that_was_passed_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the same conditions, for the same policies or some of them, and for as many cases."""
    verdict = gate.Verdict(by_codec=gate.Counter(gate.codecs_of(["int4", "int8"])))
    runs = []
    monkeypatch.setattr(gate, "run", lambda *args, **options: runs.append(options) or verdict)

    def passes(*policies: str, full: bool = False, **changes: str) -> bool:
        before = len(runs)
        green, ran = passed.pass_gate(policies, CONSTANTS | changes, tmp_path, Budget(60), full=full)
        assert green == list(policies) and "0 red" in ran
        return len(runs) == before

    assert not passes("int4", "int8") and passes("int4", "int8") and passes("int8", date="2000-01-02")
    assert not passes("int4", "int8", source="other code") and not passes("int4", "int8", full=True)
    assert passes("int4")  # every case is more than the usual ones
    (tmp_path / "gate-no-gpu.json").write_text("{")
    assert not passes("int4") and passes("int4")
    verdict.failures.append(gate.Failure("test_a.py::test_b", frozenset({"int8-affine"})))
    green, ran = passed.pass_gate(["int4", "int8"], CONSTANTS, tmp_path, Budget(60), full=False)
    assert green == ["int4"] and "1 red" in ran


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


def decoded(batch: int) -> list[Observation]:
    base = Observation("decode", batch, 1024, 32, 8, 128)
    return [dataclasses.replace(base, contender=name).timed(Timing(1, 2, 3, 10)) for name in ("int4", "int8")]


def test_a_run_goes_on_where_another_ended(tmp_path: Path) -> None:
    """Killed in the middle of a line, of a cell, or when there was no time: what is not whole is measured again."""
    path, rows = find(tmp_path, "gpu-x-2000-01-01", CONSTANTS)
    assert (path.name, rows) == ("gpu-x-2000-01-01.csv", [])
    with Writer(path, CONSTANTS) as writer:
        writer.write(decoded(1))
        writer.write([Observation("decode", 2, 1024, 32, 8, 128, status=UNREACHED, contender="all")])
        model = Observation("model", 1, 1024, 32, 8, 128, contender="int4", layers=2)
        writer.write([model])
        writer.write(decoded(4))
    whole = path.read_text()

    def resumed(text: str, **changes: str) -> tuple[str, set[tuple[str, ...]]]:
        path.write_text(text)
        found, rows = find(tmp_path, "gpu-x-2000-01-02", CONSTANTS | {"date": "2000-01-02"} | changes)
        return found.name, {(row["part"], row["batch"]) for row in rows}

    one, model_row, four = ("decode", "1"), ("model", "1"), ("decode", "4")
    assert resumed(whole) == (path.name, {one, model_row, four})
    for cut in (whole[:-1], whole[: -len(whole.splitlines()[-1]) // 2], whole[: whole.rindex("\n", 0, -1) + 1]):
        assert resumed(cut) == (path.name, {one, model_row})
    assert resumed(whole.splitlines()[0] + "\n") == ("gpu-x-2000-01-02.csv", set())
    assert resumed(whole[:9]) == ("gpu-x-2000-01-02.csv", set())
    for name in machine.CONDITIONS:
        assert resumed(whole, **{name: "else"}) == ("gpu-x-2000-01-02.csv", set())
    (tmp_path / "gpu-x-2000-01-02.csv").write_text("taken")
    assert resumed(whole, commit="else") == ("gpu-x-2000-01-02-2.csv", set())
    # What is whole stays as it was written; what is new comes behind it.
    path.write_text(whole[:-1])
    found, rows = find(tmp_path, "gpu-x-2000-01-01", CONSTANTS)
    with Writer(found, CONSTANTS, rows) as writer:
        writer.write(decoded(4))
    assert path.read_text() == "".join(line for line in whole.splitlines(True) if UNREACHED not in line)
    assert key_of(read(path)[-1]) == key_of(dataclasses.asdict(decoded(4)[0]))


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


def test_every_column_is_documented() -> None:
    text = (Path(command.RESULTS) / "README.md").read_text(encoding="utf-8")
    assert [name for name in FIELDS if f"`{name}`" not in text] == []


@pytest.mark.parametrize("quick", [True, False])
def test_the_order_of_a_run(quick: bool) -> None:
    """What says most comes first, and every cell once."""
    groups = run.groups(["int4", "int8"], Counter(), CPU, quick)
    assert [group.name for group in groups] == ["kernels", "models", "updates", "sweep"]
    kernels, models, updates, sweep = (group.tasks() for group in groups)
    first = Observation("decode", 8, 32768, 32, 8, 128, contender="all")
    assert [task.base for task in kernels] == [first, dataclasses.replace(first, batch=1)]
    assert models[0].base.contender == "dynamic" and models[0].base.layers == (4 if quick else 32)
    assert {task.base.part for task in updates} == {"prefill", "append", "append-seal"}
    keys = [task.key for tasks in (kernels, models, updates, sweep) for task in tasks]
    assert len(keys) == len(set(keys)) and len(sweep) == (2 if quick else 78)
    # What is behind a group has time of its own.
    assert [group.leave > 0 for group in groups] == [False, True, True, False]


def test_policies_that_cannot_be_measured() -> None:
    for name, words in (("int5", "unknown policy 'int5'"), ("int8-static", "leave it out of --policies")):
        result = CliRunner().invoke(command.app, ["bench", "--policies", f"int4,{name}"])
        assert result.exit_code == 1 and words in result.output and result.output.count("\n") == 1
