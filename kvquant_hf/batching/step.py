"""One step: the rows of a packed batch, grouped into as few calls as pages allow.

transformers packs the new tokens of all requests into one row, prompts and single tokens mixed.  A call on pages takes
sequences that are equally long, in neighbouring slots.  So tokens of requests that generate are one call for each run
of neighbours, in which they are mostly all; a chunk of a prompt is a call of its own.  Page tables and lengths are made
once for all layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..pages.table import to_device


class Row(NamedTuple):
    """New tokens of one request: ``new`` of them at ``start`` of the packed batch, behind ``past`` tokens, of which
    ``sealed`` pages lie in ``blocks``, one list for each lane of layers; its open page is in ``slot``."""

    slot: int
    start: int
    new: int
    past: int
    sealed: int
    blocks: list[list[int]]


class Group(NamedTuple):
    """Rows of one call.

    Args:
        slots: their slots.
        new: tokens of each.
        at: where their tokens are in the packed batch, row after row.
        tables: int32 ``[rows, blocks]`` for each lane of layers.
        lengths: int32 ``[rows, 2]``: sealed pages and tokens in the open page before the step.
        after: the same after it; written by the first layer, and by each other with the same numbers.
        sealed: pages that the step seals, for each lane of layers, on the host, row after row.
        sealing: rows that seal pages, each as many.
        held: tokens in the open pages of these.
        exact: whether this is a first prompt that attends to its exact keys and values.
    """

    slots: slice
    new: int
    at: slice | torch.Tensor
    tables: list[torch.Tensor]
    lengths: torch.Tensor
    after: torch.Tensor
    sealed: list[np.ndarray]
    sealing: np.ndarray
    held: int
    exact: bool

    def pick(self, packed: torch.Tensor) -> torch.Tensor:
        """Its part of ``packed`` ``[1, heads, tokens, dim]``, as ``[rows, heads, new, dim]``."""
        mine = packed[0][:, self.at]
        return mine.unsqueeze(0) if self.new != 1 else mine.transpose(0, 1).unsqueeze(2)

    def place(self, output: torch.Tensor, packed: torch.Tensor) -> None:
        """Write ``output`` ``[rows, heads, new, dim]`` where it belongs in ``packed`` ``[tokens, heads, dim]``."""
        packed[self.at] = output[0].transpose(0, 1) if self.new != 1 else output[:, :, 0]


def group_rows(rows: Sequence[Row], page_size: int, exact_prefill: bool, device: torch.device) -> list[Group]:
    """The calls of a step.

    Args:
        rows: the requests in it, in any order; those without new tokens take part in nothing.
        page_size: tokens per page.
        exact_prefill: whether a prompt that is read in one step attends to its exact keys and values.
        device: where the pages live.
    """
    single = sorted(row for row in rows if row.new == 1)
    runs: list[list[Row]] = []
    for row in single:
        if runs and runs[-1][-1].slot + 1 == row.slot:
            runs[-1].append(row)
        else:
            runs.append([row])
    runs += [[row] for row in rows if row.new > 1]
    return [_group(run, page_size, exact_prefill, device) for run in runs]


def _group(run: list[Row], page_size: int, exact_prefill: bool, device: torch.device) -> Group:
    first, count = run[0], len(run)
    tables, sealed = [], []
    for lane in zip(*(row.blocks for row in run), strict=True):
        table = np.zeros((count, max(map(len, lane))), dtype=np.int32)
        for entries, blocks in zip(table, lane, strict=True):
            entries[: len(blocks)] = blocks
        tables.append(to_device(table, device))
        new = [ids[row.sealed : (row.past + row.new - 1) // page_size] for ids, row in zip(lane, run, strict=True)]
        sealed.append(np.array([page for pages in new for page in pages], dtype=np.int64))
    full = [i for i, row in enumerate(run) if (row.past + row.new - 1) // page_size > row.sealed]
    held = [(row.sealed, row.past - row.sealed * page_size) for row in run]
    lengths = to_device(np.array(held, dtype=np.int32), device)
    at: slice | torch.Tensor = slice(first.start, first.start + count * first.new)
    starts = [row.start for row in run]
    if count > 1 and starts != list(range(first.start, first.start + count)):
        at = to_device(np.array(starts, dtype=np.int64), device)
    return Group(
        slots=slice(first.slot, first.slot + count),
        new=first.new,
        at=at,
        tables=tables,
        lengths=lengths,
        after=torch.empty_like(lengths),
        sealed=sealed,
        sealing=np.array(full, dtype=np.int64),
        held=held[full[0]][1] if full else 0,
        exact=exact_prefill and first.past == 0 and first.new > 1,
    )
