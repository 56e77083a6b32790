"""Tables of results, and how a number is written.

The command draws a ``Table`` on the terminal, ``markdown`` is for files, ``html`` for notebooks.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..reports.report import format_size

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
NOTHING = "-"


class Table(NamedTuple):
    """A title, headings, lines of cells (an empty line separates groups), and notes below.

    The first ``words`` columns hold words, the others numbers.
    """

    title: str
    headings: tuple[str, ...]
    lines: list[tuple[str, ...]]
    notes: list[str]
    words: int = 2

    def markdown(self) -> str:
        """For a file."""
        rule = "|---" * self.words + "|--:" * (len(self.headings) - self.words) + "|"
        table = ["| " + " | ".join(cells) + " |" for cells in (self.headings, *filter(None, self.lines))]
        return "\n".join([self.title, "", table[0], rule, *table[1:], "", *(f"- {note}" for note in self.notes)])

    def html(self) -> str:
        """For a notebook."""

        def line(tag: str, cells: Iterable[str]) -> str:
            aligned = ("left",) * self.words + ("right",) * len(self.headings)
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


def some(names: Sequence[str], most: int = 4) -> str:
    """The first of ``names``, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
