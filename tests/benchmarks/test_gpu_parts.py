"""What the GPU benchmark times, without a GPU: contenders run at tiny shapes in Triton's interpreter, no clock does.

Times are counted numbers, so nothing here says how fast anything is.
"""

import dataclasses
import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from gpu import launch_table, models, plan, subject, sweep, tune, updates
from gpu.launch_table import Bound
from gpu.plan import Budget, Cell, Shape
from gpu.results import Observation
from gpu.timing import Prepared, Timing, attempt, time_limit

from kvquant_hf.triton_kernels import launch

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TINY = Shape(4, 2, 64)


class Counter:
    """A stopwatch that runs what it is given and reports 1, 2, 3, ... microseconds in the order of the contenders."""

    def prepare(self, call: Callable[[], object]) -> Prepared:
        call()
        return Prepared(call, "eager", call)

    def measure(self, contenders: Mapping[str, Prepared], seconds: float) -> dict[str, Timing]:
        for contender in contenders.values():
            contender.run()
        return {name: Timing(n, n + 1, n + 2, 10) for n, name in enumerate(contenders)}

    def steps(self, step: Callable[[], object], count: int) -> tuple[Timing, float]:
        for _ in range(count):
            step()
        return Timing(1, 2, 3, count), 1.0

    def free(self) -> int:
        return 64 << 30

    def reset_peak(self) -> None:
        pass

    def peak(self) -> int:
        return 1 << 20

    def recover(self) -> None:
        pass


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
    """fp16 in place of bf16, which Triton's interpreter cannot multiply."""
    for module in (plan, subject, updates, models):
        monkeypatch.setattr(module, "DTYPE", torch.float16)
    monkeypatch.setattr(subject.random_vectors, "__kwdefaults__", {"dtype": torch.float16})


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


def test_no_time_left_leaves_one_row_for_each_cell() -> None:
    cells = plan.cells()[:3]
    rows = [row for part in sweep.decode_sweep(cells, ["int4"], Counter(), CPU, Budget(0), 1.0) for row in part]
    assert [(row.batch, row.context) for row in rows] == [(cell.batch, cell.context) for cell in cells]
    assert {row.status for row in rows} == {"skipped"} and all("--minutes" in row.reason for row in rows)


def test_a_cell_that_breaks_leaves_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "decode_cell", lambda *args: 1 / 0)
    (rows,) = sweep.decode_sweep(plan.cells()[:1], ["int4"], Counter(), CPU, Budget(60), 1.0)
    assert [(row.status, "ZeroDivisionError" in row.reason) for row in rows] == [("failed", True)]


@pytest.mark.usefixtures("half")
def test_appends_and_prefill() -> None:
    parts = updates.update_cells(
        ["int4"], Counter(), CPU, Budget(60), 0.0, TINY, batches=(1,), context=128, chunk=16, history=112
    )
    rows = [row for part in parts for row in part]
    paged = [row for row in rows if row.family == "paged"]
    assert [(row.part, row.status, row.queries) for row in paged] == [
        ("prefill", "ok", 16),
        ("append", "ok", 1),
        ("append-seal", "ok", 1),
    ], [row.reason for row in rows]
    static = [row for row in rows if row.contender == "static-write"]
    assert [row.status for row in static] == ["ok", "ok"] and all(row.ratio_to_bf16 for row in paged[1:])
    assert any(row.part == "prefill" and row.family == "bf16" and row.status == "ok" for row in rows)


@pytest.mark.usefixtures("half")
def test_models() -> None:
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    parts = models.model_cells(
        ["int4"], Counter(), CPU, Budget(60), situations=((1, 66),), steps=2, warm_up=1, **sizes, **heads
    )
    rows = {row.contender: row for part in parts for row in part}
    assert set(rows) == {"dynamic", "int4", "quantized-hqq", "quantized-quanto", "static-compiled"}
    for name in ("dynamic", "int4"):
        assert rows[name].status == "ok", rows[name].reason
        assert (rows[name].tokens_per_s, rows[name].layers, rows[name].query_heads) == (2.0, 2, 4)
    for name, package in (("quantized-hqq", "hqq"), ("quantized-quanto", "optimum")):
        if importlib.util.find_spec(package) is None:
            assert rows[name].status == "failed" and rows[name].reason
    assert rows["static-compiled"].status == "skipped" and "--minutes" in rows["static-compiled"].reason


def test_a_static_cache_is_filled_and_decoded() -> None:
    model = models.build(CPU, vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=32)
    contender = models.contenders([])["static-compiled"]._replace(compiled=False)
    base = Observation("model", 1, 70, 32, 8, 32, layers=2)
    assert models.decode(model, contender, base, Counter(), CPU, 2, 1).tokens_per_s == 2.0


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


def test_the_fastest_that_agrees_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two warps are fastest here, three stages would be but are wrong, and four warps do not run."""

    def attend(query: torch.Tensor, packed: object, impl: str = "triton") -> torch.Tensor:
        now = launch.launch_config("sm_90", 2, 64 * 64, 4, 8)
        if impl == "triton" and now.warps == 4:
            raise RuntimeError("out of resources")
        return torch.ones(4) * (2.0 if impl == "triton" and now.stages == 3 else 1.0)

    class Faked(Counter):
        def measure(self, contenders: Mapping[str, Prepared], seconds: float) -> dict[str, Timing]:
            now = launch.launch_config("sm_90", 2, 64 * 64, 4, 8)
            microseconds = 100.0 - 10 * now.warps - now.stages - (now.residents == 8)
            return {"": Timing(microseconds, microseconds, microseconds, 10)}

    faked = {"pack": lambda *args: None, "random_query": lambda *args: None, "attend": attend}
    monkeypatch.setattr(tune, "subject", SimpleNamespace(**faked, agrees=subject.agrees))
    question = tune.Question(Bound(64, 0, 8), "int4", ((Cell(TINY, 1, 128), 1),))
    found = tune.answer(question, Faked(), CPU, Budget(60))
    assert found.best == launch.LaunchConfig(rows=8, warps=2, stages=2, residents=8)
    assert found.present == launch.launch_config("cpu", 2, 64 * 64, 2, 8) and found.best_us < found.present_us
    assert found.dropped == 2 and tune.answer(question, Faked(), CPU, Budget(0)).best == found.present


def test_candidates_fit_on_a_multiprocessor() -> None:
    for question in tune.questions():
        for wave, field in ((wave, field) for wave in (32, 64) for field in ("rows", "warps", "stages", "residents")):
            for choice in tune.choices(field, launch.LaunchConfig(), question, wave):
                assert choice.residents * choice.warps <= 16 and choice.rows & (choice.rows - 1) == 0
