"""Observations and the one CSV file of a run: one row each, constants of the run repeated in every row."""

import csv
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from .machine import CONSTANTS
from .timing import Timing


@dataclass(frozen=True)
class Observation:
    """One contender in one situation; what does not apply is None and empty in the file.

    Args:
        part: "decode", "append", "append-seal", "prefill" or "model".
        family: "paged", "bf16" (attention over unquantized keys and values), "copy" (device to device), or
            "transformers" (its own caches).
        contender: a policy, or the name of what it is compared with.
        status: "ok", "skipped" (not tried) or "failed" (tried); ``reason`` says why.
        how: "graph" or "eager".
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


FIELDS = (*CONSTANTS, *(field.name for field in dataclasses.fields(Observation)))


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


class Writer:
    """Writes rows as they come, so that what stops a run half way leaves what was measured.

    Args:
        path: the file; it is replaced.
        constants: the columns ``CONSTANTS``.
    """

    def __init__(self, path: Path, constants: Mapping[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._constants = constants
        self._file = path.open("w", newline="", encoding="utf-8")
        self._csv = csv.DictWriter(self._file, FIELDS, lineterminator="\n")
        self._csv.writeheader()

    def write(self, rows: Iterable[Observation]) -> None:
        """Append rows."""
        for row in rows:
            values = {name: _text(value) for name, value in dataclasses.asdict(row).items()}
            self._csv.writerow(self._constants | values)
        self._file.flush()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file that ``Writer`` wrote, as text.

    Raises:
        ValueError: other columns.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise ValueError(f"{path} has other columns than this version writes; measure again.")
        return list(reader)
