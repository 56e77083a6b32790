"""Choose launch configurations for this GPU: every candidate is compared with the reference, then timed.

A row of the launch table is asked for by head_dim, rows of the query and bits of the codes.  For each such question one
field of the configuration after the other is varied through ``override_launch``; what does not compile, does not fit or
differs from the reference is dropped, and the present row stays unless another is faster by more than ``MARGIN``.
Times are written to a file as they come, and a later run under the same conditions takes them from there.
"""

import dataclasses
import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import typer

from kvquant_hf.policies.table import parse_policy
from kvquant_hf.triton_kernels.codecs import CODECS
from kvquant_hf.triton_kernels.launch import LaunchConfig, launch_config, override_launch
from kvquant_hf.triton_kernels.target import architecture

from . import subject
from .clock import Budget
from .launch_table import Bound, rewrite
from .machine import slug
from .plan import DTYPE, PAGE, Cell, Shape
from .timing import Stopwatch, attempt
from .trials import Trials

# What is tried for each field, in the order in which fields are varied.  ``rows``: a decode step has few and tries the
# least that matrix cores take (8; on AMD, 16).  ``stages``: how far pages are copied ahead.  ``residents``: shares of
# what the registers of a multiprocessor hold.
CANDIDATES = {"rows": (8, 16, 32), "warps": (1, 2, 4), "stages": (1, 2, 3, 5), "residents": (1, 2, 4)}
# A faster candidate has to be this much faster: what differs by less is noise.
MARGIN = 0.02
HEAD_DIMS = (128, 64, 256)
# The policy whose pages are timed for codes of up to so many bits, keys plus values; None for the last, open row.
POLICIES: dict[int | None, str] = {6: "turboquant", 8: "int4", 16: "int8", None: "exact"}
# Warps that the registers of a multiprocessor hold at 128 a thread; at 255 it is half of them.
_MOST_WARPS = 16
_COMPILE, _TIME = 30.0, 0.15


class Question(NamedTuple):
    """``bound`` is the row; ``workloads`` what is timed for it, each ``(cell, queries)``."""

    bound: Bound
    policy: str
    workloads: tuple[tuple[Cell, int], ...]


class Answer(NamedTuple):
    """The best configuration for a row, the present one, microseconds of both, and how many candidates were timed."""

    best: LaunchConfig
    present: LaunchConfig
    best_us: float
    present_us: float
    tried: int
    dropped: int


def questions(
    head_dims: Sequence[int] = HEAD_DIMS, context: int = 32768, batches: Sequence[int] = (8, 1), chunk: int = 128
) -> list[Question]:
    """Rows to measure: decoding (up to 8 rows) first, then chunks of queries."""
    found = []
    for rows, dim, (bits, policy) in itertools.product((0, 9), head_dims, POLICIES.items()):
        shape = Shape(32, 8, dim)
        queries, sizes = (1, batches) if rows == 0 else (chunk, (1,))
        workloads = tuple((Cell(shape, batch, context), queries) for batch in sizes)
        found.append(Question(Bound(dim, rows, bits), policy, workloads))
    return found


def choices(field: str, best: LaunchConfig, question: Question, wave: int) -> list[LaunchConfig]:
    """What to try for ``field``, the others as in ``best``; ``wave``: threads of a warp."""
    values = CANDIDATES[field]
    if field == "rows":
        enough = [rows for rows in values if rows >= (16 if wave == 64 else 8)]
        return [dataclasses.replace(best, rows=rows) for rows in (enough if question.bound.rows else enough[:1])]
    if field == "warps":
        full = _MOST_WARPS // 2
        return [dataclasses.replace(best, warps=n, residents=max(1, full // n)) for n in values]
    if field == "stages":
        return [dataclasses.replace(best, stages=stages) for stages in values]
    most = _MOST_WARPS // best.warps
    return [dataclasses.replace(best, residents=n) for n in dict.fromkeys(most // share for share in values) if n]


def present(question: Question, device: torch.device) -> LaunchConfig:
    """What the table says now."""
    cell, queries = question.workloads[0]
    codecs = parse_policy(question.policy)
    bits = CODECS[codecs.keys].bits + CODECS[codecs.values].bits
    elements = PAGE * cell.shape.head_dim
    return launch_config(architecture(device), DTYPE.itemsize, elements, cell.shape.group * queries, bits)


def answer(
    question: Question, trials: Trials, stopwatch: Stopwatch, device: torch.device, budget: Budget
) -> Answer | None:
    """Improve the present configuration of a row field by field.

    ``trials`` holds the times that a former run left, and gets those of this one.  None if the present configuration
    fails itself, or if there was no time for it.
    """
    loads = []
    for cell, queries in question.workloads:
        packed = subject.pack(question.policy, cell, device)
        query = subject.random_query(cell, queries, device)
        loads.append((query, packed, subject.attend(query, packed, "reference")))

    def trial(config: LaunchConfig) -> float:
        """Geometric mean of the workloads' medians, in microseconds."""
        logs = []
        with override_launch(**dataclasses.asdict(config)):
            for query, packed, reference in loads:
                wrong = subject.agrees(subject.attend(query, packed), reference)
                if wrong:
                    raise ArithmeticError(wrong)
                ready = stopwatch.prepare(lambda query=query, packed=packed: subject.attend(query, packed))
                logs.append(math.log(stopwatch.measure({"": ready}, _TIME)[""].p50))
        return math.exp(sum(logs) / len(logs))

    times: dict[LaunchConfig, float] = {}  # infinite where it does not run

    def microseconds(config: LaunchConfig) -> float:
        if config not in times:
            known = trials.known(question.bound, as_source(config))
            if known is None:
                if budget.left() <= 0:
                    return math.inf
                found, reason = attempt(lambda: trial(config), stopwatch, min(_COMPILE, budget.left()))
                if found is None and budget.left() <= 0:
                    return math.inf  # it was the time that failed
                known = trials.add(question.bound, as_source(config), found, reason)
            times[config] = known
        return times[config]

    best = start = present(question, device)
    if microseconds(start) == math.inf:
        return None
    for field in CANDIDATES:
        for config in choices(field, best, question, 64 if torch.version.hip else 32):
            if budget.left() > 1 and microseconds(config) < microseconds(best):
                best = config
    if microseconds(best) > microseconds(start) * (1 - MARGIN):
        best = start
    dropped = sum(time == math.inf for time in times.values())
    return Answer(best, start, microseconds(best), microseconds(start), len(times) - dropped, dropped)


def table(
    asked: Sequence[Question],
    source: str,
    facts: Mapping[str, str],
    out: Path,
    stopwatch: Stopwatch,
    device: torch.device,
    budget: Budget,
) -> str | None:
    """Answer questions, and write ``launch-<gpu>.py`` into ``out`` anew after each; returns its text.

    Args:
        asked: the questions, in their order.
        source: the text of ``launch.py``.
        facts: constant columns.
        out: folder of the results; ``tune-<gpu>.csv`` with all times goes there too.
        stopwatch, device, budget: as in ``answer``.

    Returns:
        None if no question was answered.
    """
    measured_on = f"{facts['gpu']}, Triton {facts['triton']}, {facts['date']}"
    path = out / f"launch-{slug(facts['gpu'])}.py"
    # Rows that are not measured are written too, as they are: the measured ones would answer for them otherwise.
    configs = {question.bound: as_source(present(question, device)) for question in questions()}
    text = None
    with Trials(out / f"tune-{slug(facts['gpu'])}.csv", facts) as trials:
        for question in asked:
            found = _tuned(question, trials, stopwatch, device, budget)
            if found is not None:
                configs[question.bound] = as_source(found.best)
                text = rewrite(source, architecture(device), configs, measured_on)
                path.write_text(text, encoding="utf-8")
    if text is not None:
        typer.echo(f"wrote {path} and {trials.path}")
    return text


def _tuned(
    question: Question, trials: Trials, stopwatch: Stopwatch, device: torch.device, budget: Budget
) -> Answer | None:
    dim, rows, bits = question.bound
    title = f"head_dim {dim}, rows from {rows}, bits up to {bits or 'any'}"
    if budget.left() < 1:
        typer.echo(f"{title}: no time was left, stays as it is")
        return None
    # A second more than trials have, whose end is to be noted first: two alarms at once would be a race.
    found, reason = attempt(
        lambda: answer(question, trials, stopwatch, device, budget), stopwatch, max(budget.left(), 0.0) + 1.0
    )
    if found is None:
        typer.echo(f"{title}: not measured, stays as it is {reason}".rstrip())
        return None
    typer.echo(
        f"{title}: {as_source(found.best)} {found.best_us:.1f} us, was {as_source(found.present)} "
        f"{found.present_us:.1f} us; {found.tried} timed, {found.dropped} dropped"
    )
    return found


def difference(before: str, after: str) -> str:
    """What ``after`` changes, as a patch."""
    return "\n".join(difflib.unified_diff(before.splitlines(), after.splitlines(), "launch.py", "tuned", lineterm=""))


def as_source(config: LaunchConfig) -> str:
    """``config`` as it stands in the table: what is 0 differs in nothing."""
    fields = ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(config).items() if value)
    return f"LaunchConfig({fields})"
