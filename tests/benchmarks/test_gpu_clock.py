"""How the GPU benchmark times and what it asks the driver, against a stand-in for ``torch.cuda`` that counts.

The stand-in's clock advances by one millisecond for each run of a contender and by nothing else.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu import command, machine
from gpu.results import Observation, read
from gpu.timing import Prepared, Stopwatch, Timing
from typer.testing import CliRunner

CPU = torch.device("cpu")


class StandIn:
    """``torch.cuda`` as the stopwatch uses it; ``now`` in milliseconds, ``log`` of everything that was queued."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.capturing = True
        stand_in = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = stand_in.now

            def elapsed_time(self, other: "Event") -> float:
                return other.at - self.at

        class Graph:
            def replay(self) -> None:
                stand_in.run("replay")

        self.Event, self.CUDAGraph = Event, Graph

    def run(self, name: str) -> None:
        self.log.append(name)
        self.now += 1

    @contextlib.contextmanager
    def graph(self, graph: object) -> Iterator[None]:
        if not self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        yield

    def get_device_properties(self, device: object) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=0, uuid="1234")

    def Stream(self, device: object) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(wait_stream=lambda other: None)

    def current_stream(self, device: object) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: None)

    def stream(self, stream: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def synchronize(self, device: object) -> None:
        pass

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: object) -> str:
        return "Stand-in (no GPU)"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(torch, "cuda", stand_in)
    return stand_in


@pytest.fixture
def stopwatch(cuda: StandIn) -> Stopwatch:
    watch = Stopwatch(CPU)
    watch._clear = SimpleNamespace(zero_=lambda: cuda.log.append("clear"), nbytes=0)
    return watch


def test_contenders_take_turns_and_the_cache_is_emptied(cuda: StandIn, stopwatch: Stopwatch) -> None:
    contenders = {}
    for name, runs in (("a", 1), ("b", 2), ("c", 3)):

        def run(name: str = name, runs: int = runs) -> None:
            for _ in range(runs):
                cuda.run(name)

        contenders[name] = Prepared(run, "eager", run)
    timings = stopwatch.measure(contenders, 0.0)
    assert timings == {name: Timing(us, us, us, 10) for name, us in (("a", 1000), ("b", 2000), ("c", 3000))}
    order = "".join("-" if entry == "clear" else entry for entry in cuda.log)
    assert order.startswith("-a-bb-ccc" + "-bb-ccc-a" + "-ccc-a-bb" + "-a-bb-ccc") and order.count("-") == 30


def test_graphs_are_replayed_where_they_can_be_captured(cuda: StandIn, stopwatch: Stopwatch) -> None:
    def call() -> None:
        cuda.run("call")

    assert stopwatch.prepare(call).how == "graph" and cuda.log == ["call"] * 4 + ["replay"]
    cuda.capturing = False
    prepared = stopwatch.prepare(call)
    assert prepared.how == "eager" and prepared.run is call


def test_steps_follow_each_other(cuda: StandIn, stopwatch: Stopwatch) -> None:
    timing, seconds = stopwatch.steps(lambda: cuda.run("step"), 5)
    assert timing == Timing(1000, 1000, 1000, 5) and seconds > 0 and cuda.log == ["step"] * 5


def test_quantiles() -> None:
    assert Timing.of([float(n) for n in range(11)]) == Timing(2.0, 5.0, 8.0, 11)


@pytest.mark.usefixtures("cuda")
def test_what_a_run_was_measured_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\n[ "$4" = GPU-1234 ] && echo "11, 22, 33"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    facts = machine.describe(CPU, "abc123")
    assert tuple(facts) == machine.CONSTANTS and (facts["driver"], facts["commit"]) == ("11", "abc123")
    assert facts["torch"] == torch.__version__ and facts["transformers"]
    assert machine.clocks() == {"sm_clock_mhz": "11", "memory_clock_mhz": "22", "temperature_c": "33"}
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert set(machine.clocks().values()) == {""}
    assert machine.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_a_run_writes_what_it_has(cuda: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line to the files, behind a gate that was passed; the second situation stops the run."""
    row = Observation("decode", 1, 1024, 32, 8, 128, family="paged", contender="int4")

    def parts(*args: object) -> Iterator[list[Observation]]:
        yield [row.timed(Timing(1, 2, 3, 10))]
        raise ValueError("the GPU is gone")

    monkeypatch.setattr(command, "gpu", lambda: CPU)
    monkeypatch.setattr(command, "pass_gate", lambda budget: None)
    monkeypatch.setattr(command, "gc", SimpleNamespace(collect=lambda: None, freeze=lambda: None))
    monkeypatch.setattr(command, "parts", parts)
    result = CliRunner().invoke(command.app, ["bench", "--out", str(tmp_path), "--commit", "abc123", "--quick"])
    assert isinstance(result.exception, ValueError)
    (path,) = tmp_path.glob("gpu-stand-in-no-gpu-*-quick.csv")
    (only,) = read(path)
    assert (only["p50_us"], only["commit"], only["gpu"]) == ("2", "abc123", "Stand-in (no GPU)")
    monkeypatch.setattr(command, "parts", lambda *args: iter([[row.timed(Timing(1, 2, 3, 10))]]))
    result = CliRunner().invoke(command.app, ["bench", "--out", str(tmp_path), "--quick"])
    assert result.exit_code == 0 and path.with_suffix(".md").exists(), result.output
    result = CliRunner().invoke(command.app, ["bench", "--policies", "int5"])
    assert result.exit_code == 1 and "unknown policy 'int5'" in result.output
