"""What was measured: one row for each cache, dtype and context, and the conditions they share.

Nothing is left out: a cache that could not run has a row with its reason.
"""

import csv
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BenchmarkInputError
from .tables import Table, speed_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OK, SKIPPED, FAILED = "ok", "skipped", "failed"


@dataclass
class Row:
    """One cache in one dtype at one context; what was not measured is None.

    Args:
        cache: its name.
        family: ``"kvquant"`` or ``"transformers"``.
        dtype: of the model, and of what the cache does not quantize.
        context: tokens held at the end of the measurement.
        status: ``"ok"``, ``"skipped"`` (not tried) or ``"failed"`` (tried); ``reason`` says why.
        prompt_tokens: tokens of the prompt, read in chunks.
        prefill_s: seconds of its forward passes, measured once.
        ttft_s: seconds until the first new token is known: making the cache, prefill, choosing.  Measured once.
        rounds: decode steps that were timed.
        p20_ms, p50_ms, p80_ms: quantiles of one decode step, in milliseconds.
        tokens_per_s: from the median step.
        ratio: speed against the fastest ``dynamic`` of this context, median of paired rounds: above 1 is faster.
        ratio_same_dtype: against ``dynamic`` in the same dtype.
        top1_agreement: share of ``checked`` positions at which the most likely token is that of ``dynamic`` in the same
            dtype, both reading the same tokens.
        stored_bytes: held by the cache at the end.
        peak_bytes: largest memory of a process of its own while it read the prompt and decoded, above what it had with
            the model loaded; ``peak_how`` says how, or why there is none.
        cuda_peak_bytes: the same of tensors on a GPU.
        implementation: what worked on our pages.
    """

    cache: str
    family: str
    dtype: str
    context: int
    status: str = OK
    reason: str = ""
    prompt_tokens: int | None = None
    prefill_s: float | None = None
    ttft_s: float | None = None
    rounds: int | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    tokens_per_s: float | None = None
    ratio: float | None = None
    ratio_same_dtype: float | None = None
    top1_agreement: float | None = None
    checked: int = 0
    stored_bytes: int | None = None
    peak_bytes: int | None = None
    peak_how: str = ""
    cuda_peak_bytes: int | None = None
    implementation: str = ""

    @property
    def peak(self) -> int | None:
        """The peak that matters: of tensors on a GPU, else of the process."""
        return self.peak_bytes if self.cuda_peak_bytes is None else self.cuda_peak_bytes

    def gave_up(self, status: str, reason: str) -> None:
        """Say why there is no number."""
        self.status, self.reason = status, " ".join(reason.split())


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

    def figure(self) -> "Figure":
        """Speed and memory against context, as a matplotlib figure.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        from .figure import draw

        return draw(self)

    def __str__(self) -> str:
        return self.table().markdown()

    def _repr_html_(self) -> str:
        return self.table().html()


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
