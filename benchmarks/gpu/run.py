"""A run of ``bench``: groups of cells in the order of their worth, each row on disk before the next cell begins."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import typer

from . import plan
from .clock import Budget
from .models import model_tasks
from .report import figure, markdown
from .results import UNREACHED, Observation, Row, Writer, key_of, read
from .sweep import decode_tasks
from .tasks import Task, perform
from .timing import Stopwatch
from .updates import update_tasks


class Group(NamedTuple):
    """Cells that belong together.

    Args:
        name: for the reader.
        tasks: makes them, when their turn comes.
        leave: seconds that are left to the groups behind.
    """

    name: str
    tasks: Callable[[], list[Task]]
    leave: float = 0.0


# Attention at the shape, context and batches that say most.
FIRST = tuple(plan.Cell(plan.SHAPES[0], batch, plan.ANCHOR_CONTEXT) for batch in (8, 1))


def groups(policies: Sequence[str], stopwatch: Stopwatch, device: torch.device, quick: bool) -> list[Group]:
    """What a run measures."""
    seconds = 0.5 if quick else 1.5
    cells = plan.cells(plan.SHAPES[:1], (8, 1), (4096,)) if quick else plan.cells()
    rest = [cell for cell in cells if cell not in FIRST]
    smaller = {"situations": ((8, 8192), (1, 8192)), "steps": 16, "num_hidden_layers": 4} if quick else {}
    batches = (8,) if quick else (8, 1, 64)
    return [
        Group("kernels", lambda: decode_tasks(FIRST, policies, stopwatch, device, seconds)),
        Group("models", lambda: model_tasks(policies, stopwatch, device, **smaller), 30.0 if quick else 60.0),
        Group("updates", lambda: update_tasks(policies, stopwatch, device, seconds / 3, batches=batches), 20.0),
        Group("sweep", lambda: decode_tasks(rest, policies, stopwatch, device, seconds)),
    ]


def measure(parts: Sequence[Group], writer: Writer, before: Sequence[Row], stopwatch: Stopwatch, end: Budget) -> None:
    """Measure what is not in ``before``, write it, and draw table and figure after each group.

    Raises:
        GpuLostError: the GPU broke down; what was measured is on disk.
    """
    done = {key_of(row) for row in before}
    if done:
        typer.echo(f"{len(done)} cells are in {writer.path} already and are not measured again")
    for group in parts:
        typer.echo(f"{group.name}: {max(end.left(), 0):.0f} s are left")
        new = False
        try:
            for rows in perform(group.tasks(), done, stopwatch, end.part(end.left() - group.leave)):
                writer.write(rows)
                say(rows)
                new = new or rows[0].status != UNREACHED
        finally:
            # Drawing takes seconds: for what can be seen.
            if new or group is parts[-1]:
                draw(writer.path)
        # The model and what it was compiled to, before something else needs their memory.
        torch.compiler.reset()
        gc.collect()


def say(rows: Sequence[Observation]) -> None:
    """A line for each row."""
    for row in rows:
        what = f"{row.part} batch {row.batch} context {row.context} head_dim {row.head_dim} {row.family}"
        if row.p50_us is None:
            typer.echo(f"{what} {row.contender}: {row.status}: {row.reason}")
            continue
        ratio = f", {row.ratio_to_bf16:.2f} x bf16" if row.ratio_to_bf16 else ""
        share = f", {row.percent_of_copy:.0f} % of a copy" if row.percent_of_copy else ""
        speed = f", {row.tokens_per_s:.1f} tokens/s" if row.tokens_per_s else ""
        typer.echo(f"{what} {row.contender}: {row.p50_us:.1f} us{ratio}{share}{speed}")


def draw(path: Path) -> None:
    """Write the table and the figure of a CSV file beside it; nothing, where it has no rows yet.

    Raises:
        ValueError: it is not of this version.
    """
    rows = read(path)
    if not rows:
        return
    path.with_suffix(".md").write_text(markdown(rows, path.name), encoding="utf-8")
    try:
        figure(rows, path.with_suffix(".png"))
    except ImportError:
        later = f"python benchmarks/gpu bench --from {path}"
        typer.echo(f"no figure, because matplotlib is not installed; where it is: {later}", err=True)
    except ValueError as error:
        typer.echo(f"no figure: {error}", err=True)
