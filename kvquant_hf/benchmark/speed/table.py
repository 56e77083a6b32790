"""The table of a comparison: one place that says what a column is called."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..tables import NOTHING, SHORT, Table, number, seconds, size, some, where
from .rows import Row

SPEED_HEADINGS = ("cache", "dtype", "tok/s", "ratio", "same", "step", "TTFT", "prefill", "held", "peak", "top-1")


def speed_table(conditions: Mapping[str, Any], rows: Sequence[Row]) -> Table:
    """One group of lines for each context."""
    lines: list[tuple[str, ...]] = []
    for context in dict.fromkeys(row.context for row in rows):
        if lines:
            lines.append(())
        here = [row for row in rows if row.context == context]
        measured = [row for row in here if row.p50_ms is not None]
        lines.append((f"{context:,} tokens", *[""] * (len(SPEED_HEADINGS) - 1)))
        lines += [_speed_line(row) for row in measured]
        if not measured:
            lines.append(("nothing", *[NOTHING] * (len(SPEED_HEADINGS) - 1)))
    title = f"{conditions['model']}; {where(conditions['machine'])}"
    # With one dtype the second ratio is the first; and a column of dashes says nothing.
    empty = {i for i in range(2, len(SPEED_HEADINGS)) if all(line[i] in ("", NOTHING) for line in lines if line)}
    empty |= {SPEED_HEADINGS.index("same")} if len(conditions["dtypes"]) == 1 else set()
    kept = [i for i in range(len(SPEED_HEADINGS)) if i not in empty]
    lines = [tuple(line[i] for i in kept) if line else () for line in lines]
    headings = tuple(SPEED_HEADINGS[i] for i in kept)
    legend = [f"{heading}: {text}" for heading, text in _legend(conditions).items() if heading in headings]
    return Table(title, headings, lines, legend + _reasons(rows))


def _legend(conditions: Mapping[str, Any]) -> dict[str, str]:
    """What columns mean."""
    random = " (random weights: says nothing of accuracy)" if conditions["random_weights"] else ""
    return {
        "ratio": "speed against the fastest dynamic of the context, median of paired rounds; above 1 is faster",
        "same": "the same against dynamic in the same dtype",
        "step": f"median of {conditions['rounds']} interleaved decode steps, batch 1",
        "prefill": f"tokens/s in chunks of {conditions['prefill_chunk']}; it and TTFT are measured once",
        "held": "by the cache at the end",
        "peak": "memory of a process of its own, above the loaded model",
        "top-1": f"agreement with dynamic over {conditions['checked_positions']} positions{random}",
    }


def _speed_line(row: Row) -> tuple[str, ...]:
    prefill = row.prompt_tokens / row.prefill_s if row.prompt_tokens and row.prefill_s else None
    return (
        row.cache,
        SHORT.get(row.dtype, row.dtype),
        number(row.tokens_per_s, ".1f"),
        number(row.ratio, ".2f"),
        number(row.ratio_same_dtype, ".2f"),
        seconds(row.p50_ms / 1e3 if row.p50_ms else None),
        seconds(row.ttft_s),
        number(prefill, ".0f"),
        size(row.stored_bytes),
        size(row.peak),
        number(row.top1_agreement, ".0%"),
    )


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Why there is no number, each reason once with all that it is about."""
    about: dict[str, list[Row]] = {}
    for row in rows:
        if row.reason:
            about.setdefault(f"{row.status}: {row.reason}", []).append(row)
        if row.peak_bytes is None and row.p50_ms is not None and row.peak_how:
            about.setdefault(f"no peak: {row.peak_how}", []).append(row)
    return [f"{_which(found, rows)}: {reason}" for reason, found in about.items()]


def _which(found: Sequence[Row], rows: Sequence[Row]) -> str:
    """``found`` of ``rows`` in few words: caches or contexts as a whole where nothing of them is left out."""
    for whole, form in (("context", "everything at {:,} tokens"), ("cache", "{}")):
        groups = list(dict.fromkeys(getattr(row, whole) for row in found))
        if sum(getattr(row, whole) in groups for row in rows) == len(found):
            return ", ".join(form.format(group) for group in groups)
    return some([f"{row.cache} {SHORT.get(row.dtype, row.dtype)} at {row.context:,}" for row in found])
