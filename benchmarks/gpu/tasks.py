"""What all parts of a run have in common: cells to measure in an order, each begun only while there is time for it."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from .clock import Budget
from .results import UNREACHED, Key, Observation, key_of
from .timing import GpuLostError, Stopwatch, attempt


class Task(NamedTuple):
    """A cell.

    Args:
        base: the row that says why, where nothing was measured.
        measure: measures it.
        least: seconds that have to be left to begin.
        most: seconds after which it is given up.
    """

    base: Observation
    measure: Callable[[], list[Observation]]
    least: float
    most: float

    @property
    def key(self) -> Key:
        """What names the cell in the file of results."""
        return key_of(dataclasses.asdict(self.base))


def perform(tasks: Sequence[Task], done: set[Key], stopwatch: Stopwatch, budget: Budget) -> Iterator[list[Observation]]:
    """The rows of one cell after the other; of those in ``done`` none, and those that come are added to it.

    Raises:
        GpuLostError: after the row that says in which cell.
    """
    for task in tasks:
        if task.key in done:
            continue
        done.add(task.key)
        if budget.left() < task.least:
            yield [_unreached(task)]
            continue
        try:
            rows, reason = attempt(task.measure, stopwatch, min(budget.left(), task.most))
        except GpuLostError as error:
            yield [dataclasses.replace(task.base, status="failed", reason=str(error))]
            raise
        if rows:
            yield rows
        elif budget.left() <= 0:
            yield [_unreached(task)]
        else:
            yield [dataclasses.replace(task.base, status="failed", reason=reason)]


def _unreached(task: Task) -> Observation:
    return dataclasses.replace(task.base, status=UNREACHED, reason="no time was left; run again with the same --out")
