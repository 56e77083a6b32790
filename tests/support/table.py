"""docs/support.md: written from the outcomes of several versions of transformers, and read back by the tests."""

import re
from collections.abc import Sequence
from pathlib import Path

import transformers
from stand_ins import NAMES
from support.architectures import ARCHITECTURES
from support.batches import SUMMARY
from support.features import FEATURES
from support.outcomes import BATCHING, COLUMNS, MAX_KL, MAX_SCORE, STATUSES

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "support.md"
HERE = ".".join(transformers.__version__.split(".")[:2])

Cell = tuple[str, str]  # text, reason
Cells = dict[str, dict[str, Cell]]  # architecture, column

_BETWEEN = "; "


def render(versions: dict[str, Cells], columns: Sequence[str] = COLUMNS, notes: dict[str, int] | None = None) -> str:
    """The table and its footnotes; where versions differ, a cell says which says what."""
    notes = {} if notes is None else notes  # reasons that have a number
    known = len(notes)

    def show(cell: Cell) -> str:
        text, reason = cell
        if not reason:
            return text
        return f"{text}[^{notes.setdefault(reason.replace('|', '/'), len(notes) + 1)}]"

    lines = ["| " + " | ".join(["architecture", *columns]) + " |", "|---" * 2 + "|:-:" * (len(columns) - 1) + "|"]
    first = next(iter(versions.values()))
    for architecture in first:
        row = [architecture]
        for column in columns:
            cells: dict[Cell, list[str]] = {}
            for version, table in versions.items():
                cells.setdefault(table[architecture][column], []).append(version)
            if len(cells) == 1:
                row.append(show(next(iter(cells))))
            else:
                row.append(_BETWEEN.join(f"{', '.join(these)}: {show(cell)}" for cell, these in cells.items()))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, "", *(f"[^{number}]: {reason}" for reason, number in list(notes.items())[known:]), ""])


def parse(text: str, version: str) -> Cells:
    """What :func:`render` was given for ``version``, of all tables in ``text``."""
    notes = dict(re.findall(r"^\[\^(\d+)\]: (.*)$", text, re.MULTILINE))
    cells: Cells = {}
    header: list[str] = []

    def read(cell: str) -> Cell:
        for part in cell.split(_BETWEEN):
            these, _, own = part.partition(": ")
            if version in these.split(", "):
                cell = own
        found = re.fullmatch(r"(.*?)(?:\[\^(\d+)\])?", cell)
        assert found is not None
        return found[1], notes[found[2]] if found[2] else ""

    for line in text.split("\n"):
        if line.startswith("| "):
            name, *rest = (cell.strip() for cell in line.strip("| \n").split(" | "))
            if name == "architecture":
                header = rest
            else:
                cells.setdefault(name, {}).update(zip(header, map(read, rest), strict=True))
    return cells


def document(versions: dict[str, Cells]) -> str:
    """The whole of docs/support.md."""
    *older, newest = versions
    notes: dict[str, int] = {}
    ways = len(FEATURES) + 1
    statuses = "\n".join(f"| {status} | {meaning} |" for status, meaning in STATUSES.items())
    features = "\n".join(f"| {feature.name} | {feature.summary} |" for feature in FEATURES.values())
    batching = f"| {BATCHING} | {SUMMARY}, in blocks of quantized pages |"
    return f"""# What works

{len(ARCHITECTURES)} architectures, {ways} ways of generating, transformers {", ".join(older)} and {newest}.
Every cell is a test: `tests/support/` runs it with the installed version and fails where this page says something else.
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

{render(versions, COLUMNS, notes)}
## Loaded with another attention implementation

The same, with the model loaded with each name that `attn_implementation=` takes, prompts of 21, 13 and 2 tokens in one
batch.  FlashAttention and flex attention are functions that stand in for them: they do the same arithmetic on a CPU and
check that they are given plain tensors, and masks of their kind.

{render(versions, NAMES, notes)}
## The ways of generating

| column | what is run |
|---|---|
{features}
{batching}

Continuous batching is compared with each prompt alone, `int8` by its scores per token, as beams are.
[serving.md](serving.md#what-is-refused) says why some models are refused there.
"""
