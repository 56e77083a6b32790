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
    """Mean scores in percent as lines of Markdown, a line per cache, and the mean of all columns.

    Args:
        rows: of :func:`read`.
        column: what a column of the table is: ``metric``, a length, or ``task``.

    Raises:
        ValueError: a cache lacks a task at some length.
    """
    names = sorted({row[column] for row in rows}, key=lambda name: (len(name), name))
    caches = list(dict.fromkeys(row["cache"] for row in rows))
    measured = {(row["cache"], row["task"], row["metric"]) for row in rows}
    if any((cache, task, length) not in measured for cache in caches for _, task, length in measured):
        raise ValueError("a cache lacks a task at some length.")
    shown = [f"{int(name):,}" if name.isdecimal() else f"`{name}`" for name in names]
    lines = [f"| cache | bits | {' | '.join(shown)} | all |", "|---|" + "--:|" * (len(names) + 2)]
    for cache in caches:
        own = [row for row in rows if row["cache"] == cache]
        means = [_mean([row for row in own if row[column] == name]) for name in names] + [_mean(own)]
        bits = float(own[0]["bits_per_element"])
        lines.append(f"| `{cache}` | {bits:.2f} | {' | '.join(f'{100 * mean:.1f}' for mean in means)} |")
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


def _mean(rows: Sequence[dict[str, str]]) -> float:
    return sum(float(row["score"]) for row in rows) / len(rows)


def main() -> None:
    """Print both tables, and what differs from the exact cache over all problems."""
    rows = read()
    print("\n".join([*table(rows, "metric"), "", *table(rows, "task"), "", *against_exact(rows)]))


if __name__ == "__main__":
    main()
