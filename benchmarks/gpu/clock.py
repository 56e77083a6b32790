"""The time of a run, counted from the start of the command: what is left of it, and an end that nothing outlives.

No torch in here: importing it takes seconds of that time.
"""

import faulthandler
import sys
import time

# This module is the first that the command imports.
STARTED = time.monotonic()


class Budget:
    """Seconds of wall-clock time.

    Args:
        seconds: how many.
        since: when they began, as ``time.monotonic`` says it; now if None.
    """

    def __init__(self, seconds: float, since: float | None = None) -> None:
        self._end = seconds + (time.monotonic() if since is None else since)

    def left(self) -> float:
        """Seconds until it is used up; negative afterwards."""
        return self._end - time.monotonic()

    def part(self, seconds: float) -> "Budget":
        """A budget inside this one: ``seconds``, or what is left."""
        return Budget(max(0.0, min(seconds, self.left())))


def hard_stop(budget: Budget) -> None:
    """End the process with exit code 1 when ``budget`` is used up, whatever it waits for, with a traceback of where.

    Python's own signals wait for a call into a library to return; this is a thread of the interpreter's.
    """
    faulthandler.dump_traceback_later(max(budget.left(), 0.001), exit=True, file=sys.__stderr__)


def no_hard_stop() -> None:
    """Take ``hard_stop`` back."""
    faulthandler.cancel_dump_traceback_later()
