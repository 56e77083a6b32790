"""What stands in for a GPU in the tests of its benchmark.  No clock runs: times are counted."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu import models, plan, subject, updates
from gpu.timing import Prepared, Timing

CPU = torch.device("cpu")
REAL = torch.cuda


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


class StandIn:
    """``torch.cuda`` as the benchmark uses it, over tensors on the CPU; all else is asked of the real one.

    ``now`` is in milliseconds and advances by one for each run of a contender, ``log`` is everything that was queued.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.capturing = self.answers = True
        self.available = False
        stand_in = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = stand_in.now
                stand_in.now += 1e-3  # so that what is timed never takes no time at all

            def elapsed_time(self, other: "Event") -> float:
                return other.at - self.at

        class Graph:
            def replay(self) -> None:
                stand_in.run("replay")

        self.Event, self.CUDAGraph = Event, Graph

    def __getattr__(self, name: str) -> Any:
        return getattr(REAL, name)

    def run(self, name: str) -> None:
        self.log.append(name)
        self.now += 1

    def is_available(self) -> bool:
        return self.available

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

    def synchronize(self, device: object = None) -> None:
        if not self.answers:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def empty_cache(self) -> None:
        pass

    def mem_get_info(self, device: object) -> tuple[int, int]:
        return 64 << 30, 80 << 30

    def reset_peak_memory_stats(self, device: object) -> None:
        pass

    def max_memory_allocated(self, device: object) -> int:
        return 1 << 30

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: object) -> str:
        return "Stand-in (no GPU)"


def half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 in place of bf16, which Triton's interpreter cannot multiply."""
    for module in (plan, subject, updates, models):
        monkeypatch.setattr(module, "DTYPE", torch.float16)
    monkeypatch.setattr(subject.random_vectors, "__kwdefaults__", {"dtype": torch.float16})
