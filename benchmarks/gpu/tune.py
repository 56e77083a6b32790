"""Choose launch configurations for this GPU: every candidate is compared with the reference, then timed.

A row of the launch table is asked for by head_dim, rows of the query and bits of the codes.  For each such question one
field of the configuration after the other is varied through ``override_launch``; what does not compile, does not fit or
differs from the reference is dropped, and the present row stays unless another is faster by more than ``MARGIN``.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from kvquant_hf.policies.table import parse_policy
from kvquant_hf.triton_kernels.codecs import CODECS
from kvquant_hf.triton_kernels.launch import LaunchConfig, launch_config, override_launch
from kvquant_hf.triton_kernels.target import architecture

from . import subject
from .launch_table import Bound
from .plan import DTYPE, PAGE, Budget, Cell, Shape
from .timing import Stopwatch, attempt

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
    if field == "rows":
        decoding = question.bound.rows == 0
        values = (16,) if wave == 64 and decoding else (16, 32) if wave == 64 else (8,) if decoding else (8, 16, 32)
        return [dataclasses.replace(best, rows=rows) for rows in values]
    if field == "warps":
        full = _MOST_WARPS // 2
        return [dataclasses.replace(best, warps=n, residents=max(1, full // n)) for n in (1, 2, 4)]
    if field == "stages":
        return [dataclasses.replace(best, stages=stages) for stages in (1, 2, 3)]
    most = _MOST_WARPS // best.warps
    return [dataclasses.replace(best, residents=n) for n in dict.fromkeys((most, most // 2, most // 4)) if n]


def present(question: Question, device: torch.device) -> LaunchConfig:
    """What the table says now."""
    cell, queries = question.workloads[0]
    codecs = parse_policy(question.policy)
    bits = CODECS[codecs.keys].bits + CODECS[codecs.values].bits
    elements = PAGE * cell.shape.head_dim
    return launch_config(architecture(device), DTYPE.itemsize, elements, cell.shape.group * queries, bits)


def answer(question: Question, stopwatch: Stopwatch, device: torch.device, budget: Budget) -> Answer | None:
    """Improve the present configuration of a row field by field.

    None if it fails itself, or if there was no time for it.
    """
    loads = []
    for cell, queries in question.workloads:
        packed = subject.pack(question.policy, cell, device)
        query = subject.random_query(cell, queries, device)
        loads.append((query, packed, subject.attend(query, packed, "reference")))
    times: dict[LaunchConfig, float | None] = {}

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

    def microseconds(config: LaunchConfig) -> float:
        if config not in times:
            times[config], _ = attempt(lambda: trial(config), stopwatch, _COMPILE)
        return times[config] or math.inf

    best = start = present(question, device)
    if microseconds(start) == math.inf:
        return None
    for field in ("rows", "warps", "stages", "residents"):
        for config in choices(field, best, question, 64 if torch.version.hip else 32):
            if budget.left() > 1 and microseconds(config) < microseconds(best):
                best = config
    if microseconds(best) > microseconds(start) * (1 - MARGIN):
        best = start
    dropped = sum(time is None for time in times.values())
    return Answer(best, start, microseconds(best), microseconds(start), len(times) - dropped, dropped)


def as_source(config: LaunchConfig) -> str:
    """``config`` as it stands in the table: what is 0 differs in nothing."""
    fields = ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(config).items() if value)
    return f"LaunchConfig({fields})"
