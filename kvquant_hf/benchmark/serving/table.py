"""The table of a serving run: one place that says what a column is called."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..tables import SHORT, Table, number, seconds, size, some, where
from .rows import ServingRow

SERVING_HEADINGS = (
    "cache", "dtype", "batch", "req/s", "tok/s", "ratio", "TTFT p50", "p99", "TPOT p50", "p99", "ITL p50", "p99", "held"
)  # fmt: skip


def serving_table(conditions: Mapping[str, Any], rows: Sequence[ServingRow]) -> Table:
    """One group of lines for each batch size."""
    lines: list[tuple[str, ...]] = []
    for most in dict.fromkeys(row.batch_size for row in rows):
        if lines:
            lines.append(())
        lines += [_serving_line(row) for row in rows if row.batch_size == most and row.status == "ok"]
    budget = conditions["kv_budget_bytes"]
    title = (
        f"{conditions['model']}; {where(conditions['machine'])}; "
        f"{conditions['requests']} requests, {conditions['prompt_tokens']:,} + {conditions['output_tokens']:,} tokens"
    )
    notes = [
        *filter(None, [conditions["workload"]]),
        "static batches padded on the left"
        + ("" if budget is None else f", as many requests as fit into {size(budget)} of keys and values"),
        "ratio: tok/s against dynamic in the first dtype; tokens that were asked for count, those that a batch writes "
        "beyond them do not; measured once, one cache after the other",
        "TTFT: from the beginning of the batch; TPOT: per token of a request; ITL: between tokens; held: at most",
    ]
    about: dict[str, list[str]] = {}
    for row in rows:
        what = f"{row.cache} {SHORT.get(row.dtype, row.dtype)}" + (f" x {row.batch_size}" if row.batch_size else "")
        if row.reason:
            about.setdefault(f"{row.status}: {row.reason}", []).append(what)
        elif row.refused:
            about.setdefault(f"{row.refused} requests do not fit into the budget even alone", []).append(what)
    return Table(title, SERVING_HEADINGS, lines, notes + [f"{some(names)}: {text}" for text, names in about.items()])


def _serving_line(row: ServingRow) -> tuple[str, ...]:
    times = ((part or {}).get(p) for part in (row.ttft, row.tpot, row.itl) for p in ("p50", "p99"))
    return (
        row.cache,
        SHORT.get(row.dtype, row.dtype),
        str(row.largest_batch),
        number(row.requests_per_s, ".3g"),
        number(row.tokens_per_s, ".1f"),
        number(row.ratio, ".2f"),
        *(seconds(time) for time in times),
        size(row.stored_bytes),
    )
