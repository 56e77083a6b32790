"""The times of ``tune``, one CSV line for each configuration that was tried, flushed as they come."""

import csv
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from .launch_table import Bound
from .machine import CONDITIONS, CONSTANTS

FIELDS = (*CONSTANTS, "head_dim", "rows", "bits", "config", "us", "reason")


class Trials:
    """What was tried under the conditions of ``constants``, here and in former runs.

    Args:
        path: the file.  A last line that was not finished is taken out; those of other conditions stay and say nothing.
        constants: the columns ``CONSTANTS``.
    """

    def __init__(self, path: Path, constants: Mapping[str, str]) -> None:
        self.path = path
        self._constants = constants
        self._known: dict[tuple[str, ...], float] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_bytes() if path.exists() else b""
        reader = csv.DictReader(text[: text.rfind(b"\n") + 1].decode("utf-8").splitlines())
        before = list(reader) if tuple(reader.fieldnames or FIELDS) == FIELDS else []
        new = path.with_suffix(".new")
        self._file = new.open("w", newline="", encoding="utf-8")
        self._csv = csv.DictWriter(self._file, FIELDS, lineterminator="\n")
        self._csv.writeheader()
        self._csv.writerows(before)
        self._file.flush()
        os.replace(new, path)
        for row in before:
            if all(row[name] == constants[name] for name in CONDITIONS):
                key = (row["head_dim"], row["rows"], row["bits"], row["config"])
                self._known[key] = float(row["us"] or "inf")

    @staticmethod
    def _key(bound: Bound, config: str) -> tuple[str, ...]:
        return (*("" if value is None else str(value) for value in bound), config)

    def known(self, bound: Bound, config: str) -> float | None:
        """Microseconds of ``config`` for the row ``bound``, infinite if it did not run, None if it was not tried."""
        return self._known.get(self._key(bound, config))

    def add(self, bound: Bound, config: str, microseconds: float | None, reason: str) -> float:
        """Write what a trial came to; ``reason`` says why there is no time.  Returns it as ``known`` does."""
        key = self._key(bound, config)
        self._known[key] = math.inf if microseconds is None else microseconds
        named = dict(zip(("head_dim", "rows", "bits", "config"), key, strict=True))
        # In full: a later run has to choose among equals as this one does.
        us = "" if microseconds is None else repr(microseconds)
        self._csv.writerow({**self._constants, **named, "us": us, "reason": reason})
        self._file.flush()
        return self._known[key]

    def __enter__(self) -> "Trials":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
