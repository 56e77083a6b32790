"""Rows of results as a CSV file, the conditions they share repeated in each."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import BenchmarkInputError


def flat(conditions: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested conditions as columns: ``machine_cores``, ``versions_torch``; lists as JSON."""
    columns: dict[str, Any] = {}
    for name, value in conditions.items():
        if isinstance(value, Mapping):
            columns |= flat(value, f"{prefix}{name}_")
        else:
            columns[prefix + name] = json.dumps(value) if isinstance(value, list) else value
    return columns


def write_csv(path: str | Path, conditions: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """``rows`` with the conditions behind them; None is an empty field."""
    constants = flat(conditions)
    names: Iterable[str] = flat(rows[0]) if rows else ()
    try:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*names, *constants], lineterminator="\n")
            writer.writeheader()
            writer.writerows(flat(row) | constants for row in rows)
    except OSError as error:
        raise BenchmarkInputError(f"cannot write {str(path)!r}: {error.strerror}; name another file.") from error
