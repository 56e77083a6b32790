"""A whole run of ``load``: its rows, the conditions they share, and the ways to show and keep them."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..csv_file import write_csv
from ..statistics import PERCENTILES
from ..tables import Table
from .figure import draw_load
from .rows import LoadRow
from .table import load_table


@dataclass
class Load:
    """A whole run; in a notebook it shows itself as a table, and ``figure()`` draws it."""

    conditions: dict[str, Any]
    rows: list[LoadRow] = field(default_factory=list)
    interrupted: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Conditions and rows, ready for JSON."""
        return {
            "conditions": self.conditions,
            "interrupted": self.interrupted,
            "rows": [asdict(row) for row in self.rows],
        }

    def table(self) -> Table:
        """Headings, lines and notes."""
        return load_table(self.conditions, self.rows)

    def write_csv(self, path: str | Path) -> None:
        """A line per row; the conditions are repeated in each.

        Raises:
            BenchmarkInputError: it cannot be written.
        """
        empty = dict.fromkeys(f"p{p}" for p in PERCENTILES)
        rows = [asdict(row) for row in self.rows]
        for row in rows:  # the same columns whether or not there are times
            row |= {name: row[name] or empty for name in ("ttft", "tpot", "itl")}
        write_csv(path, self.conditions, rows)

    def figure(self) -> Any:
        """Throughput and latency of each server, as a matplotlib figure.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        return draw_load(self.conditions, self.rows)

    def __str__(self) -> str:
        return self.table().markdown()

    def _repr_html_(self) -> str:
        return self.table().html()
