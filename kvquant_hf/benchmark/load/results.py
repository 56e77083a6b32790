"""A whole run of ``load``."""

from typing import Any

from ..results import Results
from ..tables import Table
from .figure import draw_load
from .rows import LoadRow
from .table import load_table


class Load(Results[LoadRow]):
    """A whole run; in a notebook it shows itself as a table, and ``figure()`` draws it."""

    percentiles = ("ttft", "tpot", "itl")

    def table(self) -> Table:
        """Headings, lines and notes."""
        return load_table(self.conditions, self.rows)

    def figure(self) -> Any:
        """Throughput and latency of each server, as a matplotlib figure.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        return draw_load(self.conditions, self.rows)
