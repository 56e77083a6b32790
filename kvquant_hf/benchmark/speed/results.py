"""A whole run: its rows, the conditions they share, and the ways to show and keep them."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..csv_file import write_csv
from ..tables import Table
from .figure import draw
from .rows import Row
from .table import speed_table


@dataclass
class Comparison:
    """A whole run.  In a notebook it shows itself as a table; ``figure()`` draws it.

    Args:
        conditions: model, machine, versions and settings.
        rows: what was measured, by context, then as contenders were named, then by dtype.
        interrupted: whether it was stopped before the end.
    """

    conditions: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False

    def row(self, cache: str, context: int, dtype: str | None = None) -> Row:
        """The row of a cache at a context; of its faster dtype, if none is named.

        Raises:
            KeyError: there is none.
        """
        found = [r for r in self.rows if (r.cache, r.context) == (cache, context) and dtype in (None, r.dtype)]
        if not found:
            raise KeyError(f"no row of {cache!r} at context {context}")
        return min(found, key=lambda row: row.p50_ms or float("inf"))

    def as_dict(self) -> dict[str, Any]:
        """Conditions and rows, ready for JSON."""
        return {
            "conditions": self.conditions,
            "interrupted": self.interrupted,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def table(self) -> Table:
        """Headings, lines and notes."""
        return speed_table(self.conditions, self.rows)

    def write_csv(self, path: str | Path) -> None:
        """A line per row; the conditions are repeated in each.

        Raises:
            BenchmarkInputError: it cannot be written.
        """
        write_csv(path, self.conditions, [dataclasses.asdict(row) for row in self.rows])

    def figure(self) -> Any:
        """Speed and memory against context, as a matplotlib figure.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        return draw(self.conditions, self.rows)

    def __str__(self) -> str:
        return self.table().markdown()

    def _repr_html_(self) -> str:
        return self.table().html()
