"""Static batches: requests in the order in which they came, as many at a time as a budget of memory allows.

A batch is padded on the left to its longest prompt and runs until its longest answer is written, so what each of its
sequences may hold is the longest prompt plus the longest answer.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .workload import Request


class Batch(NamedTuple):
    """Requests that run together, by their place in the workload."""

    places: tuple[int, ...]
    requests: tuple[Request, ...]

    @property
    def prompt_tokens(self) -> int:
        """The longest prompt."""
        return max(request.prompt_tokens for request in self.requests)

    @property
    def output_tokens(self) -> int:
        """The longest answer."""
        return max(request.output_tokens for request in self.requests)

    @property
    def tokens(self) -> int:
        """Tokens that each sequence holds at the end: the last one that is written is never read."""
        return self.prompt_tokens + self.output_tokens - 1


class Batches(NamedTuple):
    """``batches`` to run; ``refused``: places of requests that do not fit into the budget even alone."""

    batches: list[Batch]
    refused: list[int]


def fill_batches(
    requests: Sequence[Request],
    cost: Callable[[int, int], int],
    budget: int | None,
    most: int | None = None,
) -> Batches:
    """Cut a workload into batches, first come, first served.

    Args:
        requests: the workload.
        cost: ``cost(batch, tokens)``: bytes of a cache of ``batch`` sequences of ``tokens`` tokens.
        budget: bytes that a batch's cache may take; None: any.
        most: requests per batch; None: as many as fit.
    """
    batches: list[Batch] = []
    refused: list[int] = []
    open_: list[int] = []

    def batch_of(places: Sequence[int]) -> Batch:
        return Batch(tuple(places), tuple(requests[i] for i in places))

    def fits(places: Sequence[int]) -> bool:
        batch = batch_of(places)
        return (most is None or len(places) <= most) and (budget is None or cost(len(places), batch.tokens) <= budget)

    for place in range(len(requests)):
        if fits([*open_, place]):
            open_.append(place)
            continue
        if open_:
            batches.append(batch_of(open_))
        open_ = [place] if fits([place]) else []
        if not open_:
            refused.append(place)
    if open_:
        batches.append(batch_of(open_))
    return Batches(batches, refused)


class Served(NamedTuple):
    """One request: seconds from the beginning of its batch to each of its tokens, and what its batch had waited."""

    place: int
    waited_s: float
    times_s: tuple[float, ...]

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token, waiting for a turn not counted."""
        return self.times_s[0]

    @property
    def tpot_s(self) -> float:
        """Mean seconds per token after the first."""
        return (self.times_s[-1] - self.times_s[0]) / (len(self.times_s) - 1)

    @property
    def itl_s(self) -> list[float]:
        """Seconds between tokens that follow each other."""
        return [b - a for a, b in itertools.pairwise(self.times_s)]


def served(batch: Batch, waited_s: float, times_s: Sequence[float]) -> list[Served]:
    """What each request of a batch got, from the times at which the whole batch had another token.

    Args:
        batch: as it ran.
        waited_s: seconds from the beginning of the workload to that of the batch.
        times_s: seconds from the beginning of the batch to each token, as many as its longest answer.
    """
    return [
        Served(place, waited_s, tuple(times_s[: request.output_tokens]))
        for place, request in zip(batch.places, batch.requests, strict=True)
    ]
