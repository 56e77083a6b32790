"""RULER by length and by task: the tables of ``docs/accuracy.md``.

    python benchmarks/ruler_table.py

Reads ``results/ruler-*.csv``, what ``kvquant compare --csv`` wrote of lm-eval's RULER tasks, a file for each length.  A
score is the share of a problem's answers that were given; tasks count alike.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def read() -> list[dict[str, str]]:
    """The rows of all files; a row is a task at one length with one cache, and ``metric`` is the length."""
    rows: list[dict[str, str]] = []
    for path in RESULTS.glob("ruler-*.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            rows += csv.DictReader(file)
    return rows


def table(rows: Sequence[dict[str, str]], column: str) -> list[str]:
    """Mean scores in percent as lines of Markdown, a line per cache, and the mean of all columns.  A cache that lacks
    something of a column has a dash there, because the others' mean would be of more; one of dashes is left out.

    Args:
        rows: of :func:`read`.
        column: what a column of the table is: ``metric``, a length, or ``task``.
    """
    names = sorted({row[column] for row in rows}, key=lambda name: (len(name), name))
    shown = [f"{int(name):,}" if name.isdecimal() else f"`{name}`" for name in names]
    lines = [f"| cache | bits | {' | '.join(shown)} | all |", "|---|" + "--:|" * (len(names) + 2)]
    for cache in dict.fromkeys(row["cache"] for row in rows):
        own = [row for row in rows if row["cache"] == cache]
        means = [_mean(own, [row for row in rows if row[column] == name]) for name in names] + [_mean(own, rows)]
        if any(mean != "–" for mean in means):
            lines.append(f"| `{cache}` | {float(own[0]['bits_per_element']):.2f} | {' | '.join(means)} |")
    return lines


def against_exact(rows: Sequence[dict[str, str]]) -> list[str]:
    """For each cache the mean of its differences from the exact one over all problems, in points, with its standard
    error: each task at each length is a sample of its own."""
    lines = []
    for cache in dict.fromkeys(row["cache"] for row in rows if row["difference"]):
        own = [row for row in rows if row["cache"] == cache]
        total = sum(int(row["n"]) for row in own)
        mean = sum(int(row["n"]) * float(row["difference"]) for row in own) / total
        error = math.hypot(*(int(row["n"]) * float(row["difference_stderr"]) for row in own)) / total
        lines.append(f"`{cache}` {100 * mean:+.1f} ± {100 * error:.1f} ({total} problems)")
    return lines


def _mean(own: Sequence[dict[str, str]], rows: Sequence[dict[str, str]]) -> str:
    """The mean of a cache's ``own`` scores over what is measured in ``rows``; a dash if it has not all of that."""
    wanted = {(row["task"], row["metric"]) for row in rows}
    scores = [float(row["score"]) for row in own if (row["task"], row["metric"]) in wanted]
    return f"{100 * sum(scores) / len(scores):.1f}" if len(scores) == len(wanted) else "–"


def main() -> None:
    """Print both tables, and what differs from the exact cache over all problems."""
    rows = read()
    print("\n".join([*table(rows, "metric"), "", *table(rows, "task"), "", *against_exact(rows)]))


if __name__ == "__main__":
    main()
