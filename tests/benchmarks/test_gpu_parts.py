"""What the GPU benchmark times, without a GPU: contenders run at tiny shapes in Triton's interpreter, no clock does.

Times are counted numbers, so nothing here says how fast anything is.
"""

import dataclasses
import importlib.util
import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from benchmarks.gpu_stand_ins import CPU, Counter, half_precision
from gpu import launch_table, models, plan, subject, sweep, tune
from gpu.clock import Budget
from gpu.launch_table import Bound
from gpu.machine import CONSTANTS
from gpu.plan import Cell, Shape
from gpu.results import Observation, key_of
from gpu.tasks import Task, perform
from gpu.timing import GpuLostError, Prepared, Timing, attempt, time_limit
from gpu.trials import Trials

from kvquant_hf.triton_kernels import launch

ROOT = Path(__file__).resolve().parents[2]
TINY = Shape(4, 2, 64)


def by_contender(rows: list[Observation], family: str) -> dict[str, Observation]:
    return {row.contender: row for row in rows if row.family == family}


def test_time_limits_nest() -> None:
    with pytest.raises(TimeoutError), time_limit(0.05), time_limit(10):
        time.sleep(1)
    with pytest.raises(TimeoutError), time_limit(0.2):
        with pytest.raises(TimeoutError), time_limit(0.05):
            time.sleep(1)
        time.sleep(1)
    with time_limit(0.05):
        pass
    time.sleep(0.1)
    assert attempt(lambda: time.sleep(1), Counter(), 0.05) == (None, "TimeoutError: took longer than 0 s")


# -- the three parts ---------------------------------------------------------------------------------------------------


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> None:
    half_precision(monkeypatch)


@pytest.mark.usefixtures("half")
def test_a_cell_of_the_sweep() -> None:
    cell = Cell(TINY, 1, 256)
    rows = sweep.decode_cell(cell, ["int4"], Counter(), CPU, 0.0)
    paged, bf16, copies = (by_contender(rows, family) for family in ("paged", "bf16", "copy"))
    assert paged["int4"].status == "ok" and paged["int4"].bytes == cell.stored_bytes("int4")
    assert paged["int4"].percent_of_copy is not None
    assert bf16["sdpa-math"].status == "ok"
    best = min(row.p50_us for row in bf16.values() if row.p50_us)
    assert paged["int4"].ratio_to_bf16 == best / paged["int4"].p50_us
    assert set(copies) == {"int4", "bf16"} and all(
        row.gb_per_s == row.bytes / row.p50_us / 1e3 for row in copies.values()
    )
    for name in ("flash-attn-2", "flash-attn-3"):
        if bf16[name].status != "ok":
            assert (bf16[name].status, "not installed" in bf16[name].reason) == ("skipped", True)
    assert bf16["flex"].status == "skipped" and all(row.reason for row in rows if row.status != "ok")


@pytest.mark.usefixtures("half")
def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = subject.attend

    def slightly_wrong(query: torch.Tensor, packed: subject.Packed, impl: str = "triton") -> torch.Tensor:
        return original(query, packed, "reference") * (1.0 if impl == "reference" else 1.02)

    monkeypatch.setattr(subject, "attend", slightly_wrong)
    row = by_contender(sweep.decode_cell(Cell(TINY, 1, 128), ["int4"], Counter(), CPU, 0.0), "paged")["int4"]
    assert row.status == "failed" and "differs from the reference" in row.reason and row.p50_us is None


@pytest.mark.parametrize("policy", ["int8", "turboquant"])
@pytest.mark.usefixtures("half")
def test_kernels_agree_with_the_reference(policy: str) -> None:
    packed = subject.pack(policy, Cell(TINY, 2, 192), CPU, held=5)
    query = subject.random_query(Cell(TINY, 2, 192), 1, CPU)
    result, reference = (subject.attend(query, packed, impl) for impl in ("triton", "reference"))
    assert subject.agrees(result, reference) is None
    assert subject.agrees(result.flip(1), reference) is not None
    assert subject.agrees(result * float("nan"), reference) is not None


def tasks_of(*measures: Callable[[], list[Observation]]) -> list[Task]:
    return [Task(Observation("decode", n, 1024, *TINY), measure, 0.2, 60.0) for n, measure in enumerate(measures)]


@pytest.mark.usefixtures("half")
def test_kernels_append_what_the_reference_does() -> None:
    cell = Cell(TINY, 2, 128)
    new = subject.random_vectors(2, TINY.kv_heads, 1, TINY.head_dim, device=CPU)
    stored = []
    for impl in ("triton", "reference"):
        torch.manual_seed(0)
        packed = subject.pack("int4", cell, CPU, held=plan.PAGE, spare=1)
        subject.append(new, packed, after := torch.empty_like(packed.lengths), impl)
        assert after.tolist() == [[2, 1]] * 2
        stored.append([tensor for side in packed[:2] for tensor in (*side.planes, side.tail)])
    assert all(map(torch.equal, *stored))


@pytest.mark.usefixtures("half")
def test_kernels_in_a_static_cache() -> None:
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32}
    model = models.build(CPU, **sizes, num_attention_heads=2, num_key_value_heads=1)
    contender = models.contenders(["int4"])["int4-compiled"]._replace(compiled=False)
    base = Observation("model", 1, 70, 2, 1, 32)
    assert models.decode(model, contender, base, Counter(), CPU, 2, 1).tokens_per_s == 2.0


def test_no_time_left_leaves_one_row_for_each_cell() -> None:
    tasks = sweep.decode_tasks(plan.cells()[:3], ["int4"], Counter(), CPU, 1.0)
    rows = [row for part in perform(tasks, set(), Counter(), Budget(0)) for row in part]
    assert [(row.batch, row.context) for row in rows] == [(cell.batch, cell.context) for cell in plan.cells()[:3]]
    assert {(row.status, row.contender) for row in rows} == {("unreached", "all")}
    assert all("--out" in row.reason for row in rows)


def test_each_cell_is_measured_once() -> None:
    measured = []

    def measure() -> list[Observation]:
        measured.append(1)
        return [Observation("decode", 0, 1024, *TINY)]

    first, second, third = tasks_of(measure, lambda: 1 / 0, lambda: time.sleep(9))
    done = {first.key}
    rows = list(perform([first, second, second, third], done, Counter(), Budget(0.3)))
    assert [(row.batch, row.status) for (row,) in rows] == [(1, "failed"), (2, "unreached")] and not measured
    assert "ZeroDivisionError" in rows[0][0].reason and done == {first.key, second.key, third.key}
    assert [row.status for (row,) in perform([first], set(), Counter(), Budget(60))] == ["ok"] and measured
    # The same names in rows that come back from a file, and in those to be.
    assert first.key == key_of({name: str(value) for name, value in dataclasses.asdict(first.base).items()})


def test_a_lost_gpu_names_its_cell() -> None:
    class Lost(Counter):
        def recover(self) -> None:
            raise RuntimeError("CUDA error")

    rows = perform(tasks_of(lambda: 1 / 0, list), set(), Lost(), Budget(60))
    (row,) = next(rows)
    assert (row.status, row.batch, "ZeroDivisionError" in row.reason) == ("failed", 0, True)
    with pytest.raises(GpuLostError):
        next(rows)


def test_what_says_most_is_compiled_first() -> None:
    names = [(task.base.context, task.base.contender) for task in models.model_tasks(["int4", "int8"], Counter(), CPU)]
    compiled = [name for name in names if name[1].endswith("-compiled")]
    assert names[0] == (32768, "dynamic") and len(names) == len(set(names)) + 3 * 8 == 6 * 8
    assert compiled[:5] == [(32768, name) for name in ("int4-compiled", "static-compiled") * 2] + [
        (32768, "int8-compiled")
    ]


def test_layers_follow_from_memory() -> None:
    assert models.affordable_layers(140 << 30) == 32
    assert models.affordable_layers(40 << 30) < 32 and models.affordable_layers(0) == 1


# -- tuning ------------------------------------------------------------------------------------------------------------


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("tuned_launch", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def config(**fields: int) -> str:
    return tune.as_source(launch.LaunchConfig(**fields))


def test_the_table_is_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tuned_launch", None)
    path = tmp_path / "launch.py"
    source = Path(launch.__file__).read_text(encoding="utf-8")
    bounds = [question.bound for question in tune.questions()]
    choices = {bound: config(rows=8, warps=1 if bound.rows else 4, stages=3, residents=2) for bound in bounds}
    choices[Bound(128, 0, 8)] = config(rows=8, warps=2, stages=1, residents=4)
    path.write_text(launch_table.rewrite(source, "sm_90", choices, "a GPU"), encoding="utf-8")
    tuned = load(path)
    assert tuned.launch_config("sm_90", 2, 64 * 128, 4, 8) == tuned.LaunchConfig(8, 2, 1, 4)
    assert tuned.launch_config("sm_90", 2, 64 * 128, 4, 6) == tuned.LaunchConfig(8, 4, 3, 2)
    assert tuned.launch_config("sm_90", 2, 64 * 64, 64, 32) == tuned.LaunchConfig(8, 1, 3, 2)
    for question in (("sm_90", 4, 64 * 128, 4, 8), ("sm_80", 2, 64 * 128, 4, 8), ("gfx942", 2, 64 * 128, 4, 8)):
        assert tuned.launch_row(*question) == launch_row_of(tuned, question)
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or "ruff"
    for check in (["format", "--check"], ["check"]):
        done = subprocess.run([ruff, *check, "--config", str(ROOT / "pyproject.toml"), str(path)], capture_output=True)
        assert done.returncode == 0, done.stdout
    again = dict.fromkeys(bounds, config())
    twice = launch_table.rewrite(path.read_text(encoding="utf-8"), "sm_90", again, "another GPU")
    # One row for each head_dim and each number of rows: the bits no longer make a difference.
    assert twice.count('LaunchRow("sm_90"') == 6 and twice.count("Measured by") == 1 and "another GPU" in twice
    with pytest.raises(ValueError, match="no literal LAUNCH_TABLE"):
        launch_table.rewrite("LAUNCH_TABLE = ()\n", "sm_90", again, "a GPU")


def launch_row_of(tuned: ModuleType, question: tuple[str, int, int, int, int]) -> object:
    """The row of the table as it is, in the classes of another copy of the module."""
    row = launch.launch_row(*question)
    fields = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    return tuned.LaunchRow(**fields | {"config": tuned.LaunchConfig(**dataclasses.asdict(row.config))})


def test_the_fastest_that_agrees_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two warps are fastest here, three stages would be but are wrong, and four warps do not run."""

    def attend(query: torch.Tensor, packed: object, impl: str = "triton") -> torch.Tensor:
        now = launch.launch_config("sm_90", 2, 64 * 64, 4, 8)
        if impl == "triton" and now.warps == 4:
            raise RuntimeError("out of resources")
        return torch.ones(4) * (2.0 if impl == "triton" and now.stages == 2 else 1.0)

    class Faked(Counter):
        measured = 0

        def measure(self, contenders: Mapping[str, Prepared], seconds: float) -> dict[str, Timing]:
            now = launch.launch_config("sm_90", 2, 64 * 64, 4, 8)
            Faked.measured += 1
            microseconds = 100.0 - 10 * now.warps - now.stages - (now.residents == 8)
            return {"": Timing(microseconds, microseconds, microseconds, 10)}

    faked = {"pack": lambda *args: None, "random_query": lambda *args: None, "attend": attend}
    monkeypatch.setattr(tune, "subject", SimpleNamespace(**faked, agrees=subject.agrees))
    question = tune.Question(Bound(64, 0, 8), "int4", ((Cell(TINY, 1, 128), 1),))
    facts = dict.fromkeys(CONSTANTS, "made up")

    def answered(budget: Budget, name: str = "tune.csv") -> tune.Answer | None:
        with Trials(tmp_path / name, facts) as trials:
            return tune.answer(question, trials, Faked(), CPU, budget)

    found = answered(Budget(60))
    assert found.best == launch.LaunchConfig(rows=8, warps=2, stages=5, residents=8)
    assert found.present == launch.launch_config("cpu", 2, 64 * 64, 2, 8) and found.best_us < found.present_us
    assert found.dropped == 2 and answered(Budget(0), "other.csv") is None
    # A line that was cut is tried again, the others are not; nor are those of another commit taken for these.
    text = (tmp_path / "tune.csv").read_text()
    (tmp_path / "tune.csv").write_text(text[:-5])
    measured = Faked.measured
    assert answered(Budget(60)) == found and Faked.measured == measured + 1
    assert (tmp_path / "tune.csv").read_text() == text
    facts["commit"] = "another"
    assert answered(Budget(60)) == found and Faked.measured > measured + 2
    assert (tmp_path / "tune.csv").read_text().startswith(text)


def test_candidates_fit_on_a_multiprocessor() -> None:
    for question in tune.questions():
        for wave, field in itertools.product((32, 64), tune.CANDIDATES):
            for choice in tune.choices(field, launch.LaunchConfig(), question, wave):
                assert choice.residents * choice.warps <= 16 and choice.rows & (choice.rows - 1) == 0
    assert [choice.stages for choice in tune.choices("stages", launch.LaunchConfig(), tune.questions()[0], 32)] == [
        *(1, 2, 3, 5)
    ]
