"""Rows as text: one place that says what a column is called and how a number is written.

The command draws a ``Table`` on the terminal, ``markdown`` is for files, ``html`` for notebooks.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..report import format_size

if TYPE_CHECKING:
    from .results import Row
    from .serving_results import ServingRow

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
NOTHING = "-"


class Table(NamedTuple):
    """A title, headings, lines of cells (an empty line separates groups), and notes below."""

    title: str
    headings: tuple[str, ...]
    lines: list[tuple[str, ...]]
    notes: list[str]

    def markdown(self) -> str:
        """For a file."""
        rule = "|---|---" + "|--:" * (len(self.headings) - 2) + "|"
        table = ["| " + " | ".join(cells) + " |" for cells in (self.headings, *filter(None, self.lines))]
        return "\n".join([self.title, "", table[0], rule, *table[1:], "", *(f"- {note}" for note in self.notes)])

    def html(self) -> str:
        """For a notebook."""

        def line(tag: str, cells: Iterable[str]) -> str:
            aligned = ("left", "left", *("right",) * len(self.headings))
            inner = (
                f"<{tag} style='text-align:{side}'>{html.escape(cell)}</{tag}>"
                for side, cell in zip(aligned, cells, strict=False)
            )
            return f"<tr>{''.join(inner)}</tr>"

        rows = "".join(line("td", cells) for cells in self.lines if cells)
        notes = "".join(f"<br>{html.escape(note)}" for note in self.notes)
        table = f"<table>{line('th', self.headings)}{rows}</table>"
        return f"<p><b>{html.escape(self.title)}</b></p>{table}<small>{notes}</small>"


def where(machine: Mapping[str, Any]) -> str:
    """The device; of a CPU its name and the threads."""
    if machine["device"] != "cpu":
        return str(machine["device"])
    threads = machine["threads"]
    return f"{machine['processor']}, {threads} thread{'s' if threads > 1 else ''}"


def seconds(value: float | None) -> str:
    """With a unit that suits."""
    if value is None:
        return NOTHING
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def size(value: float | None) -> str:
    """Bytes with three digits."""
    if value is None:
        return NOTHING
    number, unit = format_size(value).split()
    return f"{float(number):.3g} {unit}" if float(number) < 1000 else f"{float(number):.0f} {unit}"


def number(value: float | None, form: str) -> str:
    """Formatted, or a dash."""
    return NOTHING if value is None else format(value, form)


SPEED_HEADINGS = ("cache", "dtype", "tok/s", "ratio", "same", "step", "TTFT", "prefill", "held", "peak", "top-1")


def speed_table(conditions: Mapping[str, Any], rows: Sequence["Row"]) -> Table:
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


def _speed_line(row: "Row") -> tuple[str, ...]:
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


SERVING_HEADINGS = (
    "cache", "dtype", "batch", "req/s", "tok/s", "ratio", "TTFT p50", "p99", "TPOT p50", "p99", "ITL p50", "p99", "held"
)  # fmt: skip


def serving_table(conditions: Mapping[str, Any], rows: Sequence["ServingRow"]) -> Table:
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
    return Table(title, SERVING_HEADINGS, lines, notes + [f"{_some(names)}: {text}" for text, names in about.items()])


def _serving_line(row: "ServingRow") -> tuple[str, ...]:
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


def _reasons(rows: Sequence["Row"]) -> list[str]:
    """Why there is no number, each reason once with all that it is about."""
    about: dict[str, list[Row]] = {}
    for row in rows:
        if row.reason:
            about.setdefault(f"{row.status}: {row.reason}", []).append(row)
        if row.peak_bytes is None and row.p50_ms is not None and row.peak_how:
            about.setdefault(f"no peak: {row.peak_how}", []).append(row)
    return [f"{_which(found, rows)}: {reason}" for reason, found in about.items()]


def _which(some: Sequence["Row"], rows: Sequence["Row"]) -> str:
    """``some`` of ``rows`` in few words: caches or contexts as a whole where nothing of them is left out."""
    for whole, form in (("context", "everything at {:,} tokens"), ("cache", "{}")):
        groups = list(dict.fromkeys(getattr(row, whole) for row in some))
        if sum(getattr(row, whole) in groups for row in rows) == len(some):
            return ", ".join(form.format(group) for group in groups)
    return _some([f"{row.cache} {SHORT.get(row.dtype, row.dtype)} at {row.context:,}" for row in some])


def _some(names: Sequence[str], most: int = 4) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
