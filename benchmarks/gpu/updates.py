"""What a cache does beside decoding: append a token, seal a page, attend with a chunk of a prompt to its history."""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from . import subject
from .baselines import Call, chunk_contenders
from .plan import DTYPE, PAGE, SHAPES, Cell, Shape
from .results import Observation
from .sweep import LEAST, MOST, checked, contest, situation
from .tasks import Task
from .timing import Stopwatch

# Tokens held, and new tokens that make the difference between the two kinds of append.
_APPENDS = {"append": PAGE // 2, "append-seal": PAGE}
CHUNK, HISTORY = 512, 32768
_APPEND_CONTEXT = 8192


def append_cell(
    part: str, cell: Cell, policies: Sequence[str], stopwatch: Stopwatch, device: torch.device, seconds: float
) -> list[Observation]:
    """Store one token of every sequence, keys and values; ``part`` "append-seal": where that seals a page of each.

    The bf16 contender is two indexed writes into tensors that are long enough, as a static cache does them.
    """
    base = situation(cell, part)
    _, heads, dim = cell.shape
    new = subject.random_vectors(cell.batch, heads, 1, dim, device=device)
    rows: dict[str, Observation] = {}
    makers: dict[str, Callable[[], Call]] = {}
    for policy in policies:
        packed = subject.pack(policy, cell, device, held=_APPENDS[part], spare=1)
        lengths = torch.empty_like(packed.lengths)

        def call(packed: subject.Packed = packed, lengths: torch.Tensor = lengths) -> torch.Tensor:
            subject.append(new, packed, lengths)
            return lengths

        rows[policy] = dataclasses.replace(base, family="paged", contender=policy)
        makers[policy] = lambda call=call: call
    keys, values = (torch.empty(cell.batch, heads, cell.context, dim, device=device, dtype=DTYPE) for _ in range(2))
    position = torch.tensor([cell.context // 2], device=device)

    def write() -> torch.Tensor:
        keys.index_copy_(2, position, new)
        return values.index_copy_(2, position, new)

    rows["static-write"] = dataclasses.replace(base, family="bf16", contender="static-write")
    makers["static-write"] = lambda: write
    return contest(rows, makers, stopwatch, seconds)


def prefill_cell(
    cell: Cell, chunk: int, policies: Sequence[str], stopwatch: Stopwatch, device: torch.device, seconds: float
) -> list[Observation]:
    """The last ``chunk`` of ``cell.context`` tokens attends to all of them."""
    base = situation(cell, "prefill", queries=chunk)
    _, kv_heads, dim = cell.shape
    query = subject.random_query(cell, chunk, device)
    rows: dict[str, Observation] = {}
    makers: dict[str, Callable[[], Call]] = {}
    for policy in policies:
        packed = subject.pack(policy, cell, device)
        rows[policy] = dataclasses.replace(base, family="paged", contender=policy, bytes=cell.stored_bytes(policy))
        makers[policy] = lambda packed=packed: checked(query, packed, True)
    k, v = (subject.random_vectors(cell.batch, kv_heads, cell.context, dim, device=device) for _ in range(2))
    for name, make in chunk_contenders(query, k, v).items():
        rows[name] = dataclasses.replace(base, family="bf16", contender=name, bytes=cell.dense_bytes())
        makers[name] = make
    return contest(rows, makers, stopwatch, seconds)


def update_tasks(
    policies: Sequence[str],
    stopwatch: Stopwatch,
    device: torch.device,
    seconds: float,
    shape: Shape = SHAPES[0],
    batches: Sequence[int] = (8, 1, 64),
    context: int = _APPEND_CONTEXT,
    chunk: int = CHUNK,
    history: int = HISTORY,
) -> list[Task]:
    """The prefill, then both kinds of append for every batch."""

    def prefill() -> list[Observation]:
        return prefill_cell(whole, chunk, policies, stopwatch, device, seconds)

    def append(part: str, cell: Cell) -> Callable[[], list[Observation]]:
        return lambda: append_cell(part, cell, policies, stopwatch, device, seconds)

    whole = Cell(shape, 1, history + chunk)
    tasks = [Task(dataclasses.replace(situation(whole, "prefill", chunk), contender="all"), prefill, LEAST, MOST)]
    for batch in batches:
        for part in _APPENDS:
            cell = Cell(shape, batch, context)
            base = dataclasses.replace(situation(cell, part), contender="all")
            tasks.append(Task(base, append(part, cell), LEAST, MOST))
    return tasks
