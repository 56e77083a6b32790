"""Decode steps of one layer: every policy against bf16 attention and against a copy of the same bytes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch

from . import subject
from .baselines import Call, UnavailableError, decode_contenders
from .machine import clocks
from .plan import ANCHOR_BATCH, LARGEST_COPY, SHAPES, Cell, fit
from .results import Observation, compared
from .tasks import Task
from .timing import Prepared, Stopwatch, attempt

# Seconds for one contender to compile and warm up.
PREPARATION = 60.0
# Above this many bytes of bf16 keys and values the comparison with the reference would take longer than the timing.
CHECKED_BYTES = 4 << 30
# Seconds that a cell takes at least, contenders compiled before; and at most, with everything.
LEAST, MOST = 5.0, 150.0


def contest(
    rows: Mapping[str, Observation],
    makers: Mapping[str, Callable[[], Call]],
    stopwatch: Stopwatch,
    seconds: float,
) -> list[Observation]:
    """Prepare every contender, time those that run side by side, and fill the others' rows with the reason.

    Args:
        rows: the row to fill, by the contender's key.
        makers: how to make the contender, under the same keys.
        stopwatch: what times.
        seconds: for timing, all contenders together.
    """
    unavailable = f"{UnavailableError.__name__}: "
    ready: dict[str, Prepared] = {}
    done: dict[str, Observation] = {}
    for key, make in makers.items():

        def prepare(make: Callable[[], Call] = make) -> Prepared:
            return stopwatch.prepare(make())

        prepared, reason = attempt(prepare, stopwatch, PREPARATION)
        if prepared is None:
            status = "skipped" if reason.startswith(unavailable) else "failed"
            done[key] = dataclasses.replace(rows[key], status=status, reason=reason.removeprefix(unavailable))
        else:
            ready[key] = prepared
    if ready:
        timings = stopwatch.measure(ready, seconds)
        now = clocks()
        for key, timing in timings.items():
            done[key] = dataclasses.replace(rows[key], how=ready[key].how, **now).timed(timing)
    return compared([done[key] for key in makers])


def checked(query: torch.Tensor, packed: subject.Packed, check: bool) -> Call:
    """The contender "attention over pages", compared with the reference before anybody times it.

    Raises:
        ArithmeticError: the results differ.
    """
    if check:
        wrong = subject.agrees(subject.attend(query, packed), subject.attend(query, packed, "reference"))
        if wrong:
            raise ArithmeticError(wrong)
    return lambda: subject.attend(query, packed)


def copier(stored: int, buffer: torch.Tensor) -> tuple[int, Callable[[], Call]]:
    """A copy that reads and writes ``stored`` bytes in all, or as many as ``buffer`` has; the bytes, and its maker."""
    half = min(stored, buffer.numel()) // 2
    return 2 * half, lambda: lambda: buffer[half : 2 * half].copy_(buffer[:half])


def situation(cell: Cell, part: str = "decode", queries: int = 1) -> Observation:
    """The columns that all rows of a cell share."""
    return Observation(part, cell.batch, cell.context, *cell.shape, queries=queries)


def decode_cell(
    cell: Cell, policies: Sequence[str], stopwatch: Stopwatch, device: torch.device, seconds: float
) -> list[Observation]:
    """One cell of the sweep; a contender that does not fit, run or agree gets a row that says so."""
    base = situation(cell)
    plan = fit(cell, policies, stopwatch.free())
    rows: dict[str, Observation] = {}
    makers: dict[str, Callable[[], Call]] = {}
    refused = [
        dataclasses.replace(
            base,
            family="bf16" if name == "bf16" else "paged",
            contender="all" if name == "bf16" else name,
            status="skipped",
            reason=reason,
        )
        for name, reason in plan.refused.items()
    ]
    _, kv_heads, dim = cell.shape
    query = subject.random_query(cell, 1, device)
    stored = {policy: cell.stored_bytes(policy) for policy in plan.policies}
    if plan.dense:
        stored["bf16"] = cell.dense_bytes()
    size = min(max(stored.values(), default=2), LARGEST_COPY)
    buffer = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    for policy in plan.policies:
        packed = subject.pack(policy, cell, device)
        rows[policy] = dataclasses.replace(base, family="paged", contender=policy, bytes=stored[policy])
        makers[policy] = lambda packed=packed: checked(query, packed, cell.dense_bytes() <= CHECKED_BYTES)
    if plan.dense:
        k, v = (subject.random_vectors(cell.batch, kv_heads, cell.context, dim, device=device) for _ in range(2))
        # FlexAttention compiles for tens of seconds, so it meets the others where that is affordable.
        flex = cell.shape == SHAPES[0] and cell.batch == ANCHOR_BATCH
        for name, make in decode_contenders(query, k, v, free=stopwatch.free(), flex=flex).items():
            rows[name] = dataclasses.replace(base, family="bf16", contender=name, bytes=stored["bf16"])
            makers[name] = make
    for name, size in stored.items():
        moved, makers[f"copy {name}"] = copier(size, buffer)
        rows[f"copy {name}"] = dataclasses.replace(base, family="copy", contender=name, bytes=moved)
    return refused + contest(rows, makers, stopwatch, seconds)


def decode_tasks(
    cells: Sequence[Cell], policies: Sequence[str], stopwatch: Stopwatch, device: torch.device, seconds: float
) -> list[Task]:
    """One task for each cell, in their order; ``seconds`` as in ``decode_cell``.

    A failure outside of the contenders, out of memory while filling for instance, belongs to the cell.
    """

    def measure(cell: Cell) -> Callable[[], list[Observation]]:
        return lambda: decode_cell(cell, policies, stopwatch, device, seconds)

    whole = {"contender": "all"}
    return [Task(dataclasses.replace(situation(cell), **whole), measure(cell), LEAST, MOST) for cell in cells]
