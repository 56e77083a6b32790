"""``bench`` and ``tune`` from the command line to their files, with stand-ins for the GPU, until every line has run.

Shapes are tiny, plain torch computes in place of the kernels (Triton's interpreter does in test_gpu_parts.py),
``torch.cuda`` is a stand-in that counts, and the kernel tests of the gate are a few made-up ones, in real processes of
pytest.  No number here says how fast anything is.
"""

import dataclasses
import importlib.machinery
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gpu
import pytest
import torch
from benchmarks.gpu_lines import Watch, missed, reported, variables
from benchmarks.gpu_stand_ins import CPU, StandIn, half_precision
from gpu import (
    command,
    gate,
    importable,
    launch_table,
    machine,
    models,
    plan,
    run,
    subject,
    sweep,
    timing,
    tune,
    updates,
)
from gpu.clock import Budget
from gpu.launch_table import Bound
from gpu.plan import Cell, Shape
from gpu.results import Observation, key_of, read
from gpu.tasks import Task
from gpu.timing import time_limit
from gpu.trials import Trials
from typer.testing import CliRunner, Result

from kvquant_hf.triton_kernels.launch import launch_config

GPU = Path(gpu.__file__).parent
TINY = Shape(2, 1, 32)
SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}

TESTS = """
import time
import pytest

@pytest.fixture
def device():
    return "cpu"

@pytest.mark.parametrize("pair", [("int4-channel", "int4-hadamard"), ("exact", "exact")], ids="/".join)
def test_pair(pair, device):
    pass

@pytest.mark.parametrize("policy", ["int8", "turboquant"])
def test_policy(policy, device):
    assert policy != "int8", "red, but nobody asks for it"

def test_elsewhere():
    pass
"""
ELSEWHERE = "def test_elsewhere():\n    pass\n"


def _in_torch(function: Callable[..., object]) -> Callable[..., object]:
    """``function`` as if it had been asked for the reference in place of the kernels."""

    def call(*args: object, impl: str, **options: object) -> object:
        assert impl in ("triton", "reference")
        return function(*args, impl="reference", **options)

    return call


class Stage:
    """Where a scene plays: a folder, patches that end with it, and a GPU that is none."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch, self.cuda = folder, patch, StandIn()
        folder.mkdir()
        half_precision(patch)
        patch.setattr(torch, "cuda", self.cuda)
        self.compiled: list[dict[str, object]] = []  # how, each time
        patch.setattr(torch, "compile", lambda function, **options: self.compiled.append(options) or function)
        patch.setattr(torch.compiler, "reset", lambda: None)  # there is nothing to forget
        for module, name in ((subject, "paged_attention"), (subject, "append_pages"), (models, "QuantizedPagedCache")):
            patch.setattr(module, name, _in_torch(getattr(module, name)))
        patch.setattr(timing, "_FEWEST", 2)
        patch.setattr(timing, "_MOST", 3)
        patch.setattr(timing, "_WARM_UP", 1)
        patch.setattr(gate, "MOST_PROCESSES", 1)
        patch.setattr(command, "STARTED", time.monotonic())
        patch.setattr(command, "gpu", lambda: CPU)
        patch.setattr(command, "gc", SimpleNamespace(collect=lambda: None, freeze=lambda: None))
        patch.setattr(gate, "KERNEL_TESTS", self.kernel_tests("tests", test_green=TESTS, test_a=ELSEWHERE))
        patch.setattr(machine, "_PATIENCE", 0.2)
        self.driver('[ "$4" = GPU-1234 ] && echo "11, 22, 33"')

    def kernel_tests(self, name: str, **files: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        for file, text in files.items():
            (folder / f"{file}.py").write_text(text)
        return folder

    def driver(self, script: str) -> None:
        """An ``nvidia-smi`` that does this."""
        path = self.folder / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        self.patch.setenv("PATH", f"{self.folder}:/usr/bin:/bin")

    def invoke(self, *words: str) -> Result:
        return CliRunner().invoke(command.app, [*words, "--out", str(self.folder / "out"), "--commit", "abc123"])

    def small(self) -> None:
        """The parts of a run at tiny shapes; its cells are as many as there are kinds of them."""
        cells = [Cell(TINY, 1, 128), Cell(TINY, 2, 128)]
        self.patch.setattr(run, "FIRST", (cells[0],))
        self.patch.setattr(plan, "cells", lambda *args: cells)
        self.patch.setattr(sweep, "SHAPES", (TINY,))
        self.patch.setattr(sweep, "ANCHOR_BATCH", 1)

        def updates_of(*args: object, **changes: object) -> list[Task]:
            sizes = {"batches": (1,), "context": 128, "chunk": 2, "history": 126}
            return updates.update_tasks(*args, shape=TINY, **sizes)

        def models_of(*args: object, **changes: object) -> list[Task]:
            return models.model_tasks(*args, situations=((1, 66),), steps=2, warm_up=1, **SIZES)

        self.patch.setattr(run, "update_tasks", updates_of)
        self.patch.setattr(run, "model_tasks", models_of)


def measure_and_go_on(stage: Stage) -> None:
    """Everything, then again with what was cut off the file, then with nothing left to do."""
    stage.small()
    flash = ModuleType("flash_attn")
    flash.flash_attn_with_kvcache = lambda q, k, v, causal: q
    flash.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    stage.patch.setitem(sys.modules, "flash_attn", flash)
    first = stage.invoke("bench", "--policies", "int4,exact")
    assert first.exit_code == 0, first.output
    assert "gate: 3 passed, 0 skipped, 0 red, trimmed; not run: 1 of other codecs, 1 that run nothing" in first.output
    (path,) = (stage.folder / "out").glob("*.csv")
    rows = read(path)
    parts = dict.fromkeys(row["part"] for row in rows)
    assert list(parts) == ["decode", "model", "prefill", "append", "append-seal"]
    assert {row["commit"] for row in rows} == {"abc123"} and {row["driver"] for row in rows} == {"11"}
    assert {row["policies"] for row in rows} == {"int4 exact"} and {row["sm_clock_mhz"] for row in rows} >= {"11"}
    ours = [row for row in rows if row["family"] == "paged"]
    assert {(row["status"], row["reason"]) for row in ours} == {("ok", "")}
    compiled = {row["contender"] for row in rows if row["how"] == "compiled"}
    assert compiled == {"int4-compiled", "static-compiled", "exact-compiled"}
    assert {"mode": "reduce-overhead", "backend": "inductor"}.items() <= stage.compiled[-1].items()
    written = {(row["part"], row["status"]) for row in rows if row["contender"] == "static-write"}
    assert written == {("append", "ok"), ("append-seal", "ok")} and ours[-1]["ratio_to_bf16"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    table = path.with_suffix(".md").read_text()
    cut = key_of(rows[-1])
    others = [row for row in rows if key_of(row) != cut]
    path.write_text(path.read_text()[:-20])
    path.with_suffix(".md").unlink()
    second = stage.invoke("bench", "--policies", "int4,exact")
    assert second.exit_code == 0 and "not run again" in second.output, second.output
    assert f"{len({*map(key_of, others)})} cells are in {path} already" in second.output
    again = read(path)
    assert len(again) == len(rows) and again[: len(others)] == others
    assert {key_of(row) for row in again[len(others) :]} == {cut}
    path.with_suffix(".md").unlink()
    before = path.read_text()
    third = stage.invoke("bench", "--policies", "int4,exact")
    assert third.exit_code == 0 and path.read_text() == before
    assert len(path.with_suffix(".md").read_text().splitlines()) == len(table.splitlines())


def draw_elsewhere(stage: Stage) -> None:
    """From a file alone, as the script that ``make`` calls; without matplotlib, and without anything to draw."""
    path = stage.folder / "a.csv"
    constants = dict.fromkeys(machine.CONSTANTS, "made up")
    rows = [Observation("append", 1, 64, 4, 2, 64, "paged", "int4").timed(timing.Timing(1, 2, 3, 4))]
    with run.Writer(path, constants) as writer:
        run.draw(path)
        assert not path.with_suffix(".md").exists()
        writer.write(rows)
        writer.write([dataclasses.replace(rows[0], batch=2, status="failed", reason="a | b", p50_us=None)])
    stage.patch.setattr(sys, "path", list(sys.path))
    stage.patch.setattr(sys, "argv", ["gpu", "bench", "--from", str(path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(GPU / "__main__.py"), run_name="__main__")
    assert not ended.value.code and "a / b" in path.with_suffix(".md").read_text()
    stage.patch.setitem(sys.modules, "matplotlib", None)
    run.draw(path)
    path.write_text("a,b\n1,2\n")
    assert isinstance(CliRunner().invoke(command.app, ["bench", "--from", str(path)]).exception, ValueError)


def tune_and_go_on(stage: Stage) -> None:
    """Twice, the second time with all times from the file and into the table; then without time."""
    questions = [
        tune.Question(Bound(64, rows, bits), policy, ((Cell(TINY, 1, 128), queries),))
        for rows, queries, bits, policy in ((0, 1, 8, "int4"), (9, 5, None, "exact"))
    ]
    stage.patch.setattr(tune, "questions", lambda: questions)
    stage.patch.setattr(tune, "POLICIES", {8: "int4", None: "exact"})
    stage.patch.setattr(tune, "CANDIDATES", {"rows": (8,), "warps": (1, 2), "stages": (1, 5), "residents": (1,)})
    attend = subject.attend

    def faster_by_stages(query: torch.Tensor, *rest: object) -> torch.Tensor:
        """Decode steps are."""
        stage.cuda.now += 1 / (launch_config("cpu", 2, 64 * 32, 2, 8).stages if query.shape[2] == 1 else 1)
        return attend(query, *rest)

    stage.patch.setattr(subject, "attend", faster_by_stages)
    stage.cuda.capturing = False  # so that it is called whenever it is timed
    launch = stage.folder / "launch.py"
    shutil.copy(command.LAUNCH, launch)
    before = launch.read_text()
    stage.patch.setattr(command, "LAUNCH", launch)
    first = stage.invoke("tune")
    out = stage.folder / "out"
    assert first.exit_code == 0 and launch.read_text() == before, first.output
    tuned = (out / "launch-stand-in-no-gpu.py").read_text()
    assert tuned.count('LaunchRow("cpu", 0, 64 * 64, ') == 2 and "on cpu, Stand-in (no GPU), Triton" in tuned
    assert '+    LaunchRow("cpu"' in first.output and "head_dim 64, rows from 9, bits up to any: Launch" in first.output
    times = (out / "tune-stand-in-no-gpu.csv").read_text()
    assert "stages=5" in tuned and times.count("\n") > 6
    for _ in range(2):
        second = stage.invoke("tune", "--write")
        assert second.exit_code == 0, second.output
        assert (out / "tune-stand-in-no-gpu.csv").read_text() == times and launch.read_text() == tuned
    stage.patch.setattr(command, "_DRAWING", 1e6)
    third = stage.invoke("tune")
    assert third.exit_code == 1 and "no time was left" in third.output and "no row was measured" in third.output
    assert launch.read_text() == tuned


def what_tuning_drops(stage: Stage) -> None:
    """A present configuration that is wrong, and time that ends in the middle of a trial."""
    question = tune.Question(Bound(64, 0, 8), "int4", ((Cell(TINY, 1, 128), 1),))
    stage.patch.setattr(tune, "questions", lambda: [question])
    stopwatch, facts = timing.Stopwatch(CPU), dict.fromkeys(machine.CONSTANTS, "made up")

    def tuned(name: str, seconds: float) -> str | None:
        arguments = (command.LAUNCH.read_text(), facts, stage.folder / name, stopwatch, CPU, Budget(seconds))
        return tune.table([question], *arguments)

    stage.patch.setattr(subject, "agrees", lambda *args: "differs from the reference")
    assert tuned("wrong", 60) is None
    assert "differs from the reference" in (stage.folder / "wrong" / "tune-made-up.csv").read_text()
    stage.patch.setattr(subject, "agrees", lambda *args: time.sleep(4))
    assert tuned("late", 2.5) is None  # enough for everything before the trial, on a busy machine too
    assert (stage.folder / "late" / "tune-made-up.csv").read_text().count("\n") == 1
    with Trials(stage.folder / "tune.csv", facts) as trials:
        assert tune.answer(question, trials, stopwatch, CPU, Budget(0)) is None
    assert [config.rows for config in tune.choices("rows", tune.present(question, CPU), question, 64)] == [16]
    with pytest.raises(ValueError, match="no literal"):
        launch_table.rewrite("", "cpu", {}, "")


def gates_that_do_not_open(stage: Stage) -> None:
    """Each kind of red, and each way in which a test file is left out."""
    policies = ["int4"]
    odd = {"test_needs": f"import a_package_that_nobody_has\n{TESTS}", "test_elsewhere": ELSEWHERE}
    assert not gate.run(Budget(60), stage.kernel_tests("none", **odd), policies).passed
    files, _ = gate.choose(stage.kernel_tests("broken", test_a="def test_a(:\n"))
    assert [path.name for path in files] == ["test_a.py"]  # pytest says what is wrong with it
    hook = "def pytest_sessionfinish(session):\n    session.exitstatus = 3\n"
    stopped = gate.run(Budget(60), stage.kernel_tests("stopped", test_a=TESTS, conftest=hook), policies)
    assert stopped.passed and stopped.against("int4") == ["process 1 of 1: pytest stopped with exit code 3"]
    late = gate.run(Budget(0), stage.kernel_tests("late", test_a=TESTS), policies, processes=1)
    assert "not finished in time" in late.against("int4")[0]
    skipped = stage.kernel_tests("skipped", test_a=TESTS.replace("pass", "pytest.skip()"))
    stage.patch.setattr(gate, "KERNEL_TESTS", skipped)
    stage.patch.setattr(command, "Stopwatch", lambda device: pytest.fail("measured behind a red gate"))
    red = stage.invoke("bench", "--policies", "exact", "--full-gate")
    assert red.exit_code == 1 and "(every case)" in red.output and not (stage.folder / "out").exists()
    assert "gate: exact is left out, its own tests are red: test_a.py: all 1 tests were skipped\n" in red.output
    assert red.output.endswith("so nothing is measured; mend them first.\n")


def commands_that_end_at_once(stage: Stage) -> None:
    """No GPU, no name for the code, no such policy; and a GPU that breaks down."""
    stage.patch.setattr(command, "gpu", machine.gpu)
    assert stage.invoke("bench").exit_code == 2
    stage.cuda.available = True
    assert machine.gpu() == torch.device("cuda", 0)
    stage.patch.setattr(command, "gpu", lambda: CPU)
    stage.driver("exit 9")
    stage.patch.setenv("PATH", str(stage.folder))
    unnamed = CliRunner().invoke(command.app, ["bench", "--out", str(stage.folder)])
    assert unnamed.exit_code == 1 and unnamed.output.endswith("give --commit NAME.\n")
    assert stage.invoke("bench", "--policies", "int4,int8-static").exit_code == 1
    git = stage.folder / "git"
    git.write_text('#!/bin/sh\ncase "$*" in *HEAD*) echo abc123def456 ;; *status*) echo " M a.py" ;; esac\n')
    git.chmod(0o755)
    assert (machine.commit(), machine.commit("b"), machine._version("nobody-has-it")) == (
        "abc123def456+changes",
        "b",
        "",
    )
    stage.driver("echo 1")
    assert machine.clocks()["sm_clock_mhz"] == ""
    stage.driver("exec sleep 5")
    assert machine.clocks()["sm_clock_mhz"] == ""
    stage.patch.setenv("PATH", str(stage.folder / "nowhere"))
    assert machine.clocks()["sm_clock_mhz"] == ""

    def breaks() -> list[Observation]:
        stage.cuda.answers = False
        raise ArithmeticError("half a launch")

    def cell(batch: int, measure: Callable[[], list[Observation]]) -> Task:
        return Task(Observation("decode", batch, 64, 4, 2, 64, "paged", "int4"), measure, 1.0, 60.0)

    def late() -> list[Observation]:
        time.sleep(0.3)
        return []

    tasks = [cell(1, lambda: 1 / 0), cell(2, late)._replace(most=0.1), cell(3, breaks), cell(4, breaks)]
    groups = [[cell(0, late)._replace(least=1e9)], tasks, [cell(5, late)]]
    groups = [run.Group(f"group {n}", lambda cells=cells: cells) for n, cells in enumerate(groups)]
    stage.patch.setattr(run, "groups", lambda *args: groups)
    stranger = stage.folder / "out" / "gpu-stand-in-no-gpu-1.csv"
    stranger.parent.mkdir()
    stranger.write_text("a,b\n1,2\n")
    lost = stage.invoke("bench", "--policies", "int8,int4")
    assert "gate: int8 is left out, its own tests are red: test_green.py::test_policy[int8]\n" in lost.output
    assert lost.exit_code == 1 and "the GPU answers no more (ArithmeticError: half a launch)" in lost.output
    (path,) = set((stage.folder / "out").glob("*.csv")) - {stranger}
    rows = read(path)
    assert [(row["batch"], row["status"]) for row in rows] == [("0", "unreached"), *((n, "failed") for n in "123")]
    assert "group 0: no time was left for 1 cells" in lost.output and "took longer" in rows[2]["reason"]
    assert path.with_suffix(".md").exists()


def cells_that_do_not_fit(stage: Stage) -> None:
    """No memory, no time, a kernel that is wrong, a model that computes nonsense; and the plan in its real size."""
    stopwatch, cell = timing.Stopwatch(CPU), Cell(TINY, 1, 128)
    stage.patch.setattr(subject, "agrees", lambda *args: "differs")
    rows = sweep.decode_cell(cell, ["int4"], stopwatch, CPU, 0.0)
    assert next(row.reason for row in rows if row.contender == "int4") == "ArithmeticError: differs"
    stage.patch.setattr(stage.cuda, "mem_get_info", lambda device: (0, 0))
    assert {row.status for row in sweep.decode_cell(cell, ["int4"], stopwatch, CPU, 0.0)} == {"skipped"}
    tasks = sweep.decode_tasks([cell, cell], ["int4"], stopwatch, CPU, 0.0)
    assert [rows[0].status for rows in run.perform(tasks, set(), stopwatch, Budget(1))] == ["unreached"]
    late = Task(tasks[0].base, lambda: time.sleep(1), 0.0, 9.0)
    assert [rows[0].status for rows in run.perform([late], set(), stopwatch, Budget(0.1))] == ["unreached"]
    stage.cuda.capturing = False
    assert stopwatch.prepare(lambda: None).how == "eager"
    model = models.build(CPU, **SIZES)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="not finite"):
        models.decode(model, models.contenders([])["dynamic"], tasks[0].base, stopwatch, CPU, 2, 1)
    assert models.affordable_layers(0) == 1 and len(run.groups(["int4"], stopwatch, CPU, True)) == 4
    assert len(plan_cells()) == 80 and "batch 1, context 128" in str(cell) and subject.agrees("a", "b") == "differs"
    stage.patch.undo()
    assert "differs from" in str(subject.agrees(torch.ones(2), torch.zeros(2) + 2))
    assert len(tune.questions()) == 24
    for name in ("kvquant_hf/a.py", "triton_kernels/ops.py"):
        (stage.folder / name).parent.mkdir()
        (stage.folder / name).write_text("")
    importable.link_tree(stage.folder)
    (stage.folder / "kvquant_hf/a.py").unlink()
    assert [path.name for path in (importable.link_tree(stage.folder) / "kvquant_hf").iterdir()] == ["triton_kernels"]


plan_cells = plan.cells
SCENES: Mapping[str, Callable[[Stage], None]] = {
    scene.__name__: scene
    for scene in (
        measure_and_go_on,
        draw_elsewhere,
        tune_and_go_on,
        what_tuning_drops,
        gates_that_do_not_open,
        commands_that_end_at_once,
        cells_that_do_not_fit,
    )
}


SOURCE = """def called(x):
    if x:
        return 1
    both = [lambda: 1,
        lambda: 2]
    return both[0]()
def not_called():
    pass
"""


def test_what_does_not_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SOURCE)
    with Watch(tmp_path) as watch:
        called = runpy.run_path(str(tmp_path / "a.py"))["called"]
        assert called(False) == 1
    named = ["a.py:3: return 1", "a.py:5: lambda: 2]", "a.py:7: def not_called():"]
    assert missed(tmp_path, watch.seen) == named
    reports = tmp_path / "reports"
    reports.mkdir()
    subprocess.run([sys.executable, str(tmp_path / "a.py")], env=variables(tmp_path, reports), check=True)
    assert (str(tmp_path / "a.py"), 1, "<module>") in reported(reports)


def test_an_alarm_does_not_end_the_watching(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text("def busy():\n    while True:\n        pass\n")
    busy = runpy.run_path(str(tmp_path / "b.py"))["busy"]
    with Watch(tmp_path) as watch:
        for _ in range(200):  # at least a third of the time is the watch's own
            with pytest.raises(TimeoutError), time_limit(0.001):
                busy()
            assert sys.gettrace() == watch._called


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_line_runs(tmp_path: Path) -> None:
    reports = tmp_path / "reports"
    reports.mkdir()
    for name in ("matplotlib.pyplot", "torch.nn.attention.flex_attention", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)  # which takes long while it is watched
    with Watch(GPU) as watch:
        for name, scene in SCENES.items():
            with pytest.MonkeyPatch.context() as patch:
                # Pytest's own processes take twice as long so; those of one scene do.
                for variable, value in variables(GPU, reports).items() if scene is measure_and_go_on else ():
                    patch.setenv(variable, value)
                scene(Stage(tmp_path / name, patch))
    assert {path.stem for path in GPU.glob("*.py")} - {"__init__", "__main__", "selection"} <= {
        name.partition(".")[2] for name in sys.modules if name.startswith("gpu.")
    }
    left = missed(GPU, watch.seen | reported(reports))
    assert not left, "\n".join(left)
