"""How the GPU benchmark times and what it asks the driver, against a stand-in for ``torch.cuda`` that counts."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks.gpu_stand_ins import CPU, Counter, StandIn
from gpu import clock, machine
from gpu.timing import GpuLostError, Prepared, Stopwatch, Timing, attempt


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
    for name, us in (("a", 1000), ("b", 2000), ("c", 3000)):
        assert timings[name].rounds == 10 and timings[name].p50 == pytest.approx(us, abs=2)
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
    assert timing.p50 == pytest.approx(1000, abs=2) and timing.rounds == 5 and seconds > 0 and cuda.log == ["step"] * 5


def test_quantiles() -> None:
    assert Timing.of([float(n) for n in range(11)]) == Timing(2.0, 5.0, 8.0, 11)


@pytest.mark.usefixtures("cuda")
def test_what_a_run_was_measured_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\n[ "$4" = GPU-1234 ] && echo "11, 22, 33"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    facts = machine.describe(CPU, "abc123")
    assert (*facts, "policies", "gate") == machine.CONSTANTS and (facts["driver"], facts["commit"]) == ("11", "abc123")
    assert facts["torch"] == torch.__version__ and facts["transformers"]
    assert machine.clocks() == {"sm_clock_mhz": "11", "memory_clock_mhz": "22", "temperature_c": "33"}
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert set(machine.clocks().values()) == {""}
    assert machine.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_what_is_measured_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        names = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(tmp_path), *names, *words], check=True, capture_output=True)

    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(machine.UnnamedError, match="give --commit NAME"):
        machine.commit()
    assert machine.commit("abc123") == "abc123"
    (tmp_path / "copy").mkdir()
    (tmp_path / "a.py").write_text("")
    git("init")
    git("add", "a.py")
    git("commit", "-m", "a")
    named = machine.commit()
    assert len(named) == 12 and machine.commit("abc123") == "abc123"
    (tmp_path / "a.py").write_text("b = 1")
    assert machine.commit() == f"{named}+changes"
    monkeypatch.setattr(machine, "ROOT", tmp_path / "copy")
    with pytest.raises(machine.UnnamedError):
        machine.commit()


def test_code_has_a_digest(tmp_path: Path) -> None:
    for name in ("kvquant_hf/a.py", "triton_kernels/cpu/b.cpp", "tests/kernels/c.py", "docs/d.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    digests = [machine.source(tmp_path)]
    for name in ("kvquant_hf/a.py", "triton_kernels/cpu/b.cpp", "tests/kernels/c.py"):
        (tmp_path / name).write_text("1")
        digests.append(machine.source(tmp_path))
    assert len(set(digests)) == 4
    (tmp_path / "docs/d.md").write_text("1")
    (tmp_path / "kvquant_hf/a.pyc").write_text("1")
    assert machine.source(tmp_path) == digests[-1]


def test_the_end_comes_whatever_a_process_does() -> None:
    """Signals are blocked, as they are while a library does not return."""
    program = (
        "import signal, time; from gpu.clock import Budget, hard_stop, no_hard_stop;"
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals());"
        "hard_stop(Budget(0.05)); no_hard_stop(); time.sleep(0.1); print('here', flush=True);"
        "hard_stop(Budget(0.1)); time.sleep(60)"
    )
    path = str(Path(clock.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": path}, capture_output=True, timeout=30)
    assert done.returncode == 1 and done.stdout == b"here\n" and b"Timeout" in done.stderr


def test_time_counts_from_the_beginning() -> None:
    assert clock.Budget(100, clock.STARTED).left() < clock.Budget(100).left() <= 100


def test_a_gpu_that_is_lost_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost(Counter):
        def recover(self) -> None:
            raise RuntimeError("CUDA error: unspecified launch failure")

    with pytest.raises(GpuLostError, match="ZeroDivisionError: division by zero"):
        attempt(lambda: 1 / 0, Lost(), 1.0)
