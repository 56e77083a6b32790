"""Timing on a GPU: contenders in turn, the cache emptied before each, device time by events, quantiles.

* *In turn*: every round runs each contender once, starting with another one each time, so that clocks, heat and
  neighbours change for all of them alike.
* *Emptied cache*: a buffer of several times the second-level cache is written before each run.  In a model a layer's
  pages have long left the cache when its turn comes again.
* *Device time*: a contender is replayed as a CUDA graph where it can be captured, and so queued behind the write of the
  buffer; the events around it then see no launch overhead of Python.  ``how`` says which it was.
"""

import contextlib
import itertools
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch

Call = Callable[[], object]
_WARM_UP = 3
_FEWEST, _MOST = 10, 200


class GpuLostError(RuntimeError):
    """The GPU answers no more, to this process at least; nothing else can be measured."""


class Timing(NamedTuple):
    """Microseconds of one run: quantiles over ``rounds`` runs."""

    p20: float
    p50: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        """Quantiles of ``samples`` in microseconds; at least two."""
        cuts = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(cuts[1], cuts[4], cuts[7], len(samples))


@dataclass(frozen=True)
class Prepared:
    """A contender that ran: ``run`` queues it once more; ``how``: "graph" or "eager"; ``keeps`` what it works on."""

    run: Call
    how: str
    keeps: Call


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TimeoutError`` inside the block when it takes longer, also in the middle of a compilation.

    Blocks may be nested; the one that ends first counts.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    start = time.monotonic()
    before = signal.signal(signal.SIGALRM, stop)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    signal.setitimer(signal.ITIMER_REAL, max(min(seconds, outer or seconds), 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - start), 0.001))


class Stopwatch:
    """Events, graphs and memory of one GPU.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._clear = torch.empty(max(4 * cache, 256 << 20), dtype=torch.uint8, device=device)

    def prepare(self, call: Call) -> Prepared:
        """Run ``call`` a few times (it compiles then) and capture it; raises what ``call`` raises."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:
            # What waits for the host cannot be captured.  An error of the call itself has shown above.
            torch.cuda.synchronize(self.device)
            return Prepared(call, "eager", call)
        graph.replay()
        torch.cuda.synchronize(self.device)
        return Prepared(graph.replay, "graph", call)

    def measure(self, contenders: Mapping[str, Prepared], seconds: float) -> dict[str, Timing]:
        """Time contenders against each other for about ``seconds``, 10 rounds at least."""
        names = list(contenders)
        samples: dict[str, list[float]] = {name: [] for name in names}
        end = time.monotonic() + seconds
        for turn in range(_MOST):
            events = {}
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._clear.zero_()
                begin.record()
                contenders[name].run()
                done.record()
                events[name] = begin, done
            torch.cuda.synchronize(self.device)
            for name, (begin, done) in events.items():
                samples[name].append(begin.elapsed_time(done) * 1e3)
            if turn + 1 >= _FEWEST and time.monotonic() > end:
                break
        return {name: Timing.of(values) for name, values in samples.items()}

    def steps(self, step: Call, count: int) -> tuple[Timing, float]:
        """Run ``step`` ``count`` times as a program would; times of the steps, and wall-clock seconds of them all."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        torch.cuda.synchronize(self.device)
        start = time.monotonic()
        marks[0].record()
        for mark in marks[1:]:
            step()
            mark.record()
        torch.cuda.synchronize(self.device)
        seconds = time.monotonic() - start
        return Timing.of([a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(marks)]), seconds

    def free(self) -> int:
        """Bytes that can be allocated."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def reset_peak(self) -> None:
        """Start to watch the largest allocation anew."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Bytes of tensors at the worst moment since ``reset_peak``, without the buffer that empties the cache."""
        return torch.cuda.max_memory_allocated(self.device) - self._clear.nbytes

    def recover(self) -> None:
        """After an error: give memory back.  Raises if the GPU does not answer any more (an illegal access, say)."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()


def attempt(make: Callable[[], Any], stopwatch: Stopwatch, seconds: float) -> tuple[Any, str]:
    """Try something that may not run here, for at most ``seconds``.

    Returns:
        Its result and "", or None and the reason in one line.

    Raises:
        GpuLostError: the GPU does not answer afterwards; the message is the reason.
    """
    reason = ""
    try:
        with time_limit(seconds):
            return make(), ""
    except Exception as error:  # whatever a library raises is a result here: the row says it
        reason = f"{type(error).__name__}: {error}"
    reason = " ".join(reason.split())[:300]
    try:
        stopwatch.recover()
    except RuntimeError:
        raise GpuLostError(reason) from None
    return None, reason
