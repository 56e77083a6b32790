"""docs/support.md: written from the outcomes of two versions of transformers, and read back by the tests."""

import re
from pathlib import Path

import transformers
from support.architectures import ARCHITECTURES
from support.features import FEATURES
from support.outcomes import COLUMNS, MAX_KL, MAX_SCORE, STATUSES

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "support.md"
HERE = ".".join(transformers.__version__.split(".")[:2])

Cell = tuple[str, str]  # text, reason
Cells = dict[str, dict[str, Cell]]  # architecture, column

_BETWEEN = "; "


def render(versions: dict[str, Cells]) -> str:
    """The table and its footnotes; where versions differ, a cell says which says what."""
    notes: dict[str, int] = {}

    def show(cell: Cell) -> str:
        text, reason = cell
        if not reason:
            return text
        return f"{text}[^{notes.setdefault(reason.replace('|', '/'), len(notes) + 1)}]"

    lines = ["| " + " | ".join(["architecture", *COLUMNS]) + " |", "|---" * 2 + "|:-:" * (len(COLUMNS) - 1) + "|"]
    first = next(iter(versions.values()))
    for architecture in first:
        row = [architecture]
        for column in COLUMNS:
            cells = {version: table[architecture][column] for version, table in versions.items()}
            if len(set(cells.values())) == 1:
                row.append(show(next(iter(cells.values()))))
            else:
                row.append(_BETWEEN.join(f"{version}: {show(cell)}" for version, cell in cells.items()))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, "", *(f"[^{number}]: {reason}" for reason, number in notes.items()), ""])


def parse(text: str, version: str) -> Cells:
    """What :func:`render` was given for ``version``."""
    notes = dict(re.findall(r"^\[\^(\d+)\]: (.*)$", text, re.MULTILINE))
    rows = [
        [cell.strip() for cell in line.strip("| \n").split(" | ")] for line in text.split("\n") if line.startswith("| ")
    ]
    header, *body = rows

    def read(cell: str) -> Cell:
        for part in cell.split(_BETWEEN):
            if part.startswith(f"{version}: "):
                cell = part.removeprefix(f"{version}: ")
        found = re.fullmatch(r"(.*?)(?:\[\^(\d+)\])?", cell)
        assert found is not None
        return found[1], notes[found[2]] if found[2] else ""

    return {row[0]: dict(zip(header[1:], map(read, row[1:]), strict=True)) for row in body}


def document(versions: dict[str, Cells]) -> str:
    """The whole of docs/support.md."""
    low, high = (list(versions)[i] for i in (0, -1))
    statuses = "\n".join(f"| {status} | {meaning} |" for status, meaning in STATUSES.items())
    features = "\n".join(f"| {feature.name} | {feature.summary} |" for feature in FEATURES.values())
    return f"""# What works

{len(ARCHITECTURES)} architectures, {len(FEATURES)} ways of generating, transformers {low} and {high}.  Every cell is a
test: `tests/support/` runs it with the installed version and fails where this page says something else.
`make docs-support` writes it anew.

Each model is tiny and has random weights (2 to 4 layers, head_dim 16), with pages of 8 tokens, prompts of 21 and
windows of 12.  The page says that the arithmetic and the bookkeeping are right, not how good a trained model's text is.

| cell | meaning |
|---|---|
{statuses}

A cell is right if both hold:

- **`exact`** generates the same tokens as `DynamicCache`, in float32, with logits within 1e-4 of the largest and no
  runner-up so close that rounding could decide.
- **`int8`** holds less than the same tokens in float32 (where all layers have windows of 12, its sealed pages do), and
  what it generates is what the exact model would: led along the same tokens, the next-token distributions differ by
  less than {MAX_KL:g} nats (mean Kullback-Leibler divergence; for beams, their scores per token by less than
  {MAX_SCORE:.3f}).  One lost page of 8 tokens makes ten times as much at least, in every row.

Layers that are not paged keep transformers' own cache, which is named in the column *layers*.  The column *attention*
says how the paged layers are read: in pages with the implementation that transformers picks by default, in pages once
`model.set_attn_implementation("kvquant")` was called (the row was run like that), or multiplied out.

{render(versions)}
## The ways of generating

| column | what is run |
|---|---|
{features}
"""
