"""A whole run of ``compare``."""

from typing import Any

from ..results import Results
from ..tables import Table
from .figure import draw
from .rows import Row
from .table import speed_table


class Comparison(Results[Row]):
    """A whole run.  In a notebook it shows itself as a table; ``figure()`` draws it.

    Its rows are ordered by context, then as contenders were named, then by dtype.
    """

    def row(self, cache: str, context: int, dtype: str | None = None) -> Row:
        """The row of a cache at a context; of its faster dtype, if none is named.

        Raises:
            KeyError: there is none.
        """
        found = [r for r in self.rows if (r.cache, r.context) == (cache, context) and dtype in (None, r.dtype)]
        if not found:
            raise KeyError(f"no row of {cache!r} at context {context}")
        return min(found, key=lambda row: row.p50_ms or float("inf"))

    def table(self) -> Table:
        """Headings, lines and notes."""
        return speed_table(self.conditions, self.rows)

    def figure(self) -> Any:
        """Speed and memory against context, as a matplotlib figure.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        return draw(self.conditions, self.rows)
