"""Two caches on the same problems: what the pairs say that two means do not.

A problem that both solve, or neither, says nothing about which is better.  Of scores that are 0 or 1, what counts is
how many are lost (1 with the exact cache, 0 with the other) and gained (the other way round).  If both caches were
equally good, each of these would be lost or gained with the same chance, so the smaller number follows a binomial
distribution with p = 1/2: McNemar's test (Psychometrika 12, 1947), here in its exact form, which holds for few problems
too.  It is computed with whole numbers.

Scores of any other kind are compared by the mean of their differences.  Standard errors are s / sqrt(n) with n - 1 in
the variance, as lm-eval's of a mean; that of a difference is of the pairs, and smaller than two separate ones suggest.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Mean:
    """The mean of ``n`` numbers, and its standard error; None for one number, which has none."""

    n: int
    mean: float
    stderr: float | None


@dataclass(frozen=True)
class Paired:
    """One cache against the exact one.

    Args:
        difference: the mean of its score minus the exact one's, problem by problem.
        difference_stderr: the standard error of that mean; None for one problem.
        lost, gained: problems that only the exact cache solves, and that only this one does; None where scores are not
            0 or 1.
        p: McNemar's exact two-sided probability of numbers so far apart or farther, if neither were better.
    """

    difference: float
    difference_stderr: float | None
    lost: int | None
    gained: int | None
    p: float | None

    def as_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard error of at least one number."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Mean(n, mean, None)
    return Mean(n, mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n))


def mcnemar(lost: int, gained: int) -> float:
    """McNemar's exact two-sided p of problems ``lost`` and ``gained``; 1 where there are none."""
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**n)


def is_binary(values: Sequence[float]) -> bool:
    """Whether all are 0 or 1."""
    return all(value in (0, 1) for value in values)


def compare(exact: Sequence[float], other: Sequence[float], *, binary: bool) -> Paired:
    """The scores of one cache against the exact one's.

    Args:
        exact, other: scores of the same problems, in the same order.
        binary: all of them are 0 or 1.
    """
    differences = [b - a for a, b in zip(exact, other, strict=True)]
    difference = mean_of(differences)
    if not binary:
        return Paired(difference.mean, difference.stderr, None, None, None)
    lost, gained = differences.count(-1), differences.count(1)
    return Paired(difference.mean, difference.stderr, lost, gained, mcnemar(lost, gained))
