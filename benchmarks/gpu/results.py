"""Observations and the one CSV file of a run: one row each, constants of the run repeated in every row.

Rows are written cell by cell and flushed, so a run may be killed at any moment; the next one under the same conditions
takes the file up again (``find``) and measures what is not in it.
"""

import csv
import dataclasses
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from .machine import CONDITIONS, CONSTANTS
from .timing import Timing

Row = dict[str, str]
Key = tuple[str, ...]
# There was no time for it; the next run measures it.
UNREACHED = "unreached"


@dataclass(frozen=True)
class Observation:
    """One contender in one situation; what does not apply is None and empty in the file.

    Args:
        part: "decode", "append", "append-seal", "prefill" or "model".
        family: "paged", "bf16" (attention over unquantized keys and values), "copy" (device to device), or
            "transformers" (its own caches).
        contender: a policy, or the name of what it is compared with.
        status: "ok", "skipped" (not tried), "failed" (tried) or "unreached" (no time); ``reason`` says why.
        how: "graph", "eager" or "compiled".
        p20_us, p50_us, p80_us: quantiles of one run (of one step of the whole model) over ``rounds`` runs.
        bytes: what has to be read once; for a copy what is read plus what is written.
        gb_per_s: ``bytes`` over ``p50_us``, 1e9 bytes.
        percent_of_copy: ``gb_per_s`` over that of the copy of as many bytes.
        ratio_to_bf16: ``p50_us`` of the fastest bf16 contender over this one's; above 1 is faster than it.
        tokens_per_s: tokens of the whole batch.
        peak_bytes: of all tensors, ``weights_bytes`` included.
    """

    part: str
    batch: int
    context: int
    query_heads: int
    kv_heads: int
    head_dim: int
    family: str = ""
    contender: str = ""
    queries: int = 1
    layers: int = 1
    status: str = "ok"
    reason: str = ""
    how: str = ""
    rounds: int | None = None
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    bytes: int | None = None
    gb_per_s: float | None = None
    percent_of_copy: float | None = None
    ratio_to_bf16: float | None = None
    tokens_per_s: float | None = None
    peak_bytes: int | None = None
    weights_bytes: int | None = None
    sm_clock_mhz: str = ""
    memory_clock_mhz: str = ""
    temperature_c: str = ""

    def timed(self, timing: Timing) -> "Observation":
        """With the quantiles of ``timing``, and the bandwidth that follows."""
        rate = None if self.bytes is None else self.bytes / timing.p50 / 1e3
        return dataclasses.replace(
            self, rounds=timing.rounds, p20_us=timing.p20, p50_us=timing.p50, p80_us=timing.p80, gb_per_s=rate
        )


# ``cell_rows``: rows that were written together; where there are fewer, the run was killed between them.
FIELDS = (*CONSTANTS, *(field.name for field in dataclasses.fields(Observation)), "cell_rows")
_SITUATION = ("part", "batch", "context", "query_heads", "kv_heads", "head_dim", "queries", "layers")


def key_of(row: Mapping[str, object]) -> Key:
    """The cell of a row: its situation, and for whole models, which are timed one after the other, the contender."""
    situation = tuple(str(row[name]) for name in _SITUATION)
    return (*situation, str(row["contender"])) if row["part"] == "model" else situation


def compared(rows: Sequence[Observation]) -> list[Observation]:
    """Rows of one situation with ``percent_of_copy`` and ``ratio_to_bf16`` filled in."""
    timed = [row for row in rows if row.p50_us is not None]
    copies = {row.contender: row.gb_per_s for row in timed if row.family == "copy"}
    best = min((row.p50_us for row in timed if row.family == "bf16" and row.p50_us), default=None)
    filled = []
    for row in rows:
        copy = copies.get("bf16" if row.family == "bf16" else row.contender)
        if row.gb_per_s and copy and row.family != "copy":
            row = dataclasses.replace(row, percent_of_copy=100 * row.gb_per_s / copy)
        if row.p50_us and best and row.family != "copy":
            row = dataclasses.replace(row, ratio_to_bf16=best / row.p50_us)
        filled.append(row)
    return filled


def _text(value: object) -> object:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def read(path: Path) -> list[Row]:
    """The rows of a file that ``Writer`` wrote, as text, without a last line that was not finished.

    Raises:
        ValueError: other columns.
    """
    text = path.read_bytes()
    reader = csv.DictReader(text[: text.rfind(b"\n") + 1].decode("utf-8").splitlines())
    if tuple(reader.fieldnames or ()) != FIELDS:
        raise ValueError(f"{path} has other columns than this version writes; measure again.")
    return list(reader)


def whole(rows: Sequence[Row]) -> list[Row]:
    """The rows of cells that are there in full; without those that there was no time for."""
    cells: dict[Key, list[Row]] = defaultdict(list)
    for row in rows:
        cells[key_of(row)].append(row)
    kept = {key for key, cell in cells.items() if len(cell) == int(cell[0]["cell_rows"])}
    return [row for row in rows if key_of(row) in kept and row["status"] != UNREACHED]


def find(folder: Path, stem: str, constants: Mapping[str, str]) -> tuple[Path, list[Row]]:
    """Where to write, and what is there already.

    Args:
        folder: of the results.
        stem: how a new file is called, without its ending; a number is added if that is taken.
        constants: of the run that is to begin.

    Returns:
        A file of the same kind (``stem`` without its date) that was begun under the same ``CONDITIONS``, and its rows
        as ``whole`` leaves them; or a new file, and no rows.
    """
    for path in sorted(folder.glob(f"{stem.replace(constants['date'], '*')}.csv")):
        try:
            rows = read(path)
        except ValueError:
            continue
        if rows and all(rows[0][name] == constants[name] for name in CONDITIONS):
            return path, whole(rows)
    names = [stem, *(f"{stem}-{n}" for n in range(2, 1000))]
    return next(path for path in (folder / f"{name}.csv" for name in names) if not path.exists()), []


class Writer:
    """Writes cells as they come, so that what stops a run half way leaves what was measured.

    Args:
        path: the file; it is replaced by one that holds ``rows``, never left in between.
        constants: the columns ``CONSTANTS``.
        rows: of a run before.
    """

    def __init__(self, path: Path, constants: Mapping[str, str], rows: Sequence[Row] = ()) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._constants = constants
        new = path.with_suffix(".new")
        self._file = new.open("w", newline="", encoding="utf-8")
        self._csv = csv.DictWriter(self._file, FIELDS, lineterminator="\n")
        self._csv.writeheader()
        self._csv.writerows(rows)
        self._file.flush()
        os.replace(new, path)

    def write(self, rows: Sequence[Observation]) -> None:
        """Append the rows of one cell."""
        for row in rows:
            values = {name: _text(value) for name, value in dataclasses.asdict(row).items()}
            self._csv.writerow(self._constants | values | {"cell_rows": len(rows)})
        self._file.flush()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
