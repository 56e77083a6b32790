"""A whole run of ``serve``."""

from ..results import Results
from ..tables import Table
from .rows import ServingRow
from .table import serving_table


class Serving(Results[ServingRow]):
    """A whole run; in a notebook it shows itself as a table."""

    percentiles = ("ttft", "ttft_queued", "tpot", "itl")

    def table(self) -> Table:
        """Headings, lines and notes."""
        return serving_table(self.conditions, self.rows)
