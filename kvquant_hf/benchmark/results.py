"""What a whole run of any measurement is: rows, the conditions they share, and the ways to show and keep them."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from .csv_file import write_csv
from .statistics import PERCENTILES
from .tables import Table

Row = TypeVar("Row")


@dataclass
class Results(Generic[Row]):
    """A whole run; in a notebook it shows itself as a table.

    Args:
        conditions: model, machine, versions and settings.
        rows: what was measured, dataclasses of one kind.
        interrupted: whether it was stopped before the end.
    """

    percentiles: ClassVar[tuple[str, ...]] = ()  # fields of a row that are percentiles, or None

    conditions: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False

    def table(self) -> Table:
        """Headings, lines and notes."""
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        """Conditions and rows, ready for JSON."""
        return {"conditions": self.conditions, "interrupted": self.interrupted, "rows": self._plain()}

    def write_csv(self, path: str | Path) -> None:
        """A line per row; the conditions are repeated in each.

        Raises:
            BenchmarkInputError: it cannot be written.
        """
        empty = dict.fromkeys(f"p{p}" for p in PERCENTILES)
        rows = self._plain()
        for row in rows:  # the same columns whether or not there are times
            row |= {name: row[name] or empty for name in self.percentiles}
        write_csv(path, self.conditions, rows)

    def _plain(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]  # type: ignore[call-overload]

    def __str__(self) -> str:
        return self.table().markdown()

    def _repr_html_(self) -> str:
        return self.table().html()
