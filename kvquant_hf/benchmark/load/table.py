"""The table of a load: one place that says what a column is called."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..contenders import EXACT
from ..status import OK
from ..tables import NOTHING, Table, number, seconds, size, where
from .rows import LoadRow

LOAD_HEADINGS = (
    "server", "req/s", "tok/s", "total tok/s", "ratio", "to exact", "TTFT p50", "p99", "TPOT p50", "p99", "ITL p50",
    "p99", "at once", "blocks",
)  # fmt: skip


def load_table(conditions: Mapping[str, Any], rows: Sequence[LoadRow]) -> Table:
    """A line for each server that answers rightly; the others are named below with the reason."""
    title = (
        f"{conditions['model']}; {where(conditions['machine'])}; "
        f"{conditions['requests']} requests, {conditions['prompt_tokens']:,} + {conditions['output_tokens']:,} tokens"
    )
    lines = [_load_line(row) for row in rows if row.status == OK]
    return Table(title, LOAD_HEADINGS, lines, [*_legend(conditions, rows), *_remarks(conditions, rows)], words=1)


def _load_line(row: LoadRow) -> tuple[str, ...]:
    times = ((part or {}).get(p) for part in (row.ttft, row.tpot, row.itl) for p in ("p50", "p99"))
    return (
        row.server,
        number(row.requests_per_s, ".3g"),
        number(row.output_tokens_per_s, ".1f"),
        number(row.total_tokens_per_s, ".1f"),
        number(row.ratio, ".2f"),
        number(row.ratio_to_exact, ".2f"),
        *(seconds(time) for time in times),
        number(row.most_at_once, "d"),
        NOTHING if row.most_used_blocks is None else f"{row.most_used_blocks}/{row.blocks or NOTHING}",
    )


def _legend(conditions: Mapping[str, Any], rows: Sequence[LoadRow]) -> list[str]:
    """How it was measured, and what columns mean."""
    rate, most = conditions["rate_per_s"], conditions["concurrency"]
    arrival = "all at once" if rate is None else f"{rate:g} a second, as a Poisson process"
    arrival += "" if most is None else f", at most {most} connections at a time"
    return [
        *filter(None, [conditions["workload"]]),
        f"requests come {arrival}; servers have their loads in turn, one at a time; loads of each, whose medians are "
        f"shown: {conditions['rounds']}",
        _budget(conditions)
        if conditions["kv_budget_bytes"]
        else "the servers ran already; the machine is the one that sends",
        "tok/s: tokens of answers, as the servers count them; total: those of prompts too",
        f"ratio: tok/s over that of {rows[0].server}"
        + (f", and of {EXACT}" if any(row.ratio_to_exact for row in rows) else "")
        + ", the median of the ratios of each round",
        "TTFT: from sending to the first text, waiting for a turn is in it; TPOT: per token of a request; ITL: between "
        "tokens; of all requests of all loads",
        *_checked(conditions, rows),
        "at once: answers that were begun and had not ended, at most, those included that had to make room for others "
        "meanwhile; blocks: in use at most, of all",
    ]


def _budget(conditions: Mapping[str, Any]) -> str:
    concurrent = ", ".join(f"{policy} {most}" for policy, most in conditions["max_concurrent"].items())
    return (
        f"each server has {size(conditions['kv_budget_bytes'])} for keys and values, which is "
        f"{conditions['kv_budget_requests']:.1f} average requests in {conditions['dtype']}, and computes at most "
        f"{conditions['max_batch_tokens']} tokens a step; stock: {conditions['stock_blocks']} blocks of "
        f"{conditions['stock_page_size']} tokens; requests with pages in ours: {concurrent}"
    )


def _checked(conditions: Mapping[str, Any], rows: Sequence[LoadRow]) -> list[str]:
    same = ", ".join(f"{row.server} {row.same_answers}" for row in rows[1:] if row.same_answers is not None)
    asked = conditions["checked_answers"]
    return (
        [f"of {asked} short greedy answers before the load, the same as from {rows[0].server}: {same}"] if same else []
    )


def _remarks(conditions: Mapping[str, Any], rows: Sequence[LoadRow]) -> list[str]:
    """What went other than asked for."""
    remarks = [f"{row.server} {row.status}: {row.reason}" for row in rows if row.reason]
    for row in rows:
        if row.refused or row.failed:
            remarks.append(
                f"{row.server}: of {row.requests + row.refused + row.failed} requests {row.refused} were refused and "
                f"{row.failed} failed; they are in no number"
            )
        elif row.status == OK:
            for what, found in (("prompt", row.prompt_tokens), ("output", row.output_tokens)):
                asked = conditions[f"{what}_tokens"]
                if found != asked:
                    remarks.append(f"{row.server}: counts {found:,} {what} tokens where {asked:,} were asked for")
    return remarks
