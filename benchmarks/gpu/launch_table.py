"""Rewrite the rows of one architecture in the literal ``LAUNCH_TABLE`` of ``triton_kernels/launch.py``.

The table stays what it is, a literal that is read from top to bottom: rows are found by the positions that ``ast``
gives, everything else keeps its text.  Rows of the architecture that a former run wrote are replaced; the new ones go
behind the rows that ask for an ``itemsize`` (float32 models), which have to win, and in front of all others.
"""

import ast
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

_MARK = "    # Measured by `make tune` on "
# Where codes end, in bits of a key plus a value; the last is open.
ANY = "_ANY"


class Bound(NamedTuple):
    """What a row answers for, beside the architecture: pages of 64 tokens of up to ``head_dim`` elements, at least
    ``rows`` rows, up to ``bits`` bits (None for any)."""

    head_dim: int
    rows: int
    bits: int | None


def _order(bound: Bound) -> tuple[int, int, float]:
    """The first row that fits wins: small pages, many rows and few bits come first."""
    return bound.head_dim, -bound.rows, float("inf") if bound.bits is None else bound.bits


def merged(choices: Mapping[Bound, str]) -> list[tuple[Bound, str]]:
    """Rows in the order of the table; a row goes where the next one, which allows more bits, says the same."""
    ordered = sorted(choices.items(), key=lambda item: _order(item[0]))
    kept = []
    for (bound, config), following in zip(ordered, [*ordered[1:], None], strict=True):
        same = following is not None and following[1] == config and following[0][:2] == bound[:2]
        if not same:
            kept.append((bound, config))
    return kept


def _table(source: str) -> ast.Tuple:
    for node in ast.parse(source).body:
        target = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(target, ast.Name) and target.id == "LAUNCH_TABLE" and isinstance(node.value, ast.Tuple):
            return node.value
    raise ValueError("there is no literal LAUNCH_TABLE; write it as a tuple of LaunchRow calls.")


def _constant(row: ast.expr, position: int) -> object:
    assert isinstance(row, ast.Call) and isinstance(row.args[position], ast.Constant)
    return row.args[position].value


def rewrite(source: str, architecture: str, choices: Mapping[Bound, str], measured_on: str) -> str:
    """The source of ``launch.py`` with new rows for ``architecture``.

    Args:
        source: the file's text.
        architecture: as ``target.architecture`` names it, for instance "sm_90".
        choices: ``LaunchConfig(...)`` as source, for each bound.
        measured_on: GPU and versions, for the comment above the rows.

    Raises:
        ValueError: the file has no such table.
    """
    table = _table(source)
    lines = source.splitlines(keepends=True)
    drop = set()
    after = table.lineno  # behind the opening parenthesis
    for row in table.elts:
        assert row.end_lineno is not None
        if _constant(row, 0) == architecture:
            drop |= set(range(row.lineno, row.end_lineno + 1))
        elif _constant(row, 1):
            after = row.end_lineno
    drop |= {n for n, line in enumerate(lines, 1) if line.startswith(f"{_MARK}{architecture}, ")}
    new = [f"{_MARK}{architecture}, {measured_on}.\n", *_rows(architecture, merged(choices))]
    text = []
    for number, line in enumerate(lines, 1):
        if number not in drop:
            text.append(line)
        if number == after:
            text += new
    result = "".join(text)
    _table(result)
    return result


def _rows(architecture: str, choices: Iterable[tuple[Bound, str]]) -> Sequence[str]:
    # What is timed has one plane of codes a side; codes in more planes keep the table's other rows.
    return [
        f'    LaunchRow("{architecture}", 0, 64 * {head_dim}, {rows}, {ANY if bits is None else bits}, 2, {config}),\n'
        for (head_dim, rows, bits), config in choices
    ]
