"""Medians, quantiles and paired ratios.  Pure functions of samples."""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

PERCENTILES = (50, 90, 99)


class Summary(NamedTuple):
    """Quantiles of samples, in their unit."""

    rounds: int
    p20: float
    p50: float
    p80: float


def quantile(samples: Sequence[float], q: float) -> float:
    """The ``q``-quantile, interpolated linearly between neighbours.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def summarize(samples: Sequence[float]) -> Summary:
    """Median, and the quantiles between which three of five samples lie."""
    return Summary(len(samples), *(quantile(samples, q) for q in (0.2, 0.5, 0.8)))


def percentiles(samples: Sequence[float]) -> dict[str, float] | None:
    """``{"p50": .., "p90": .., "p99": ..}``; None without samples."""
    return {f"p{p}": quantile(samples, p / 100) for p in PERCENTILES} if samples else None


def paired_ratio(reference: Sequence[float], samples: Sequence[float]) -> float | None:
    """Median over the rounds of reference / sample: above 1, ``samples`` are the faster ones.

    A sample is compared with the reference of its own round, so that a busy moment of the machine slows both.  Rounds
    that only one of them finished do not count; None if there is no other.
    """
    ratios = [a / b for a, b in zip(reference, samples, strict=False)]
    return statistics.median(ratios) if ratios else None


def interleaved(count: int, rounds: int) -> Iterator[tuple[int, int]]:
    """``(round, contender)``: every contender once in each round, starting with another one each time."""
    for i in range(rounds):
        for k in range(count):
            yield i, (i + k) % count
