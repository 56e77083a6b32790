"""What is measured, in which order, and what fits into memory.  No tensors, no GPU."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from kvquant_hf.policies.table import parse_policy
from kvquant_hf.triton_kernels.codecs import CODECS

PAGE = 64
DTYPE = torch.bfloat16
POLICIES = ("int4", "turboquant", "int8", "exact")
# Work memory beside the contenders: the buffer that clears the cache, split accumulators, the copy that is the roof.
HEADROOM = 4 << 30
# A copy larger than this has the same bandwidth, and would only take memory from the contenders.
LARGEST_COPY = 2 << 30


class Shape(NamedTuple):
    """The attention of one layer."""

    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.query_heads // self.kv_heads


SHAPES = (Shape(32, 8, 128), Shape(28, 4, 128), Shape(24, 8, 64), Shape(16, 8, 256))
BATCHES = (1, 8, 32, 64)
CONTEXTS = (1024, 4096, 8192, 32768, 131072)
# The cell that says most: the heads of an 8B model, a batch and a context that make memory bind.
ANCHOR_BATCH, ANCHOR_CONTEXT = 8, 32768


class Cell(NamedTuple):
    """One decode step of one layer: ``batch`` sequences of ``context`` tokens."""

    shape: Shape
    batch: int
    context: int

    @property
    def sealed(self) -> int:
        """Sealed pages of a sequence; the last page is open and full, as it is just before a page is sealed."""
        return self.context // PAGE - 1

    def dense_bytes(self) -> int:
        """Keys and values in bf16."""
        return 2 * self.batch * self.shape.kv_heads * self.context * self.shape.head_dim * DTYPE.itemsize

    def stored_bytes(self, policy: str) -> int:
        """Bytes that a step has to read: sealed pages with their scales, and the open page."""
        parsed, (_, heads, dim) = parse_policy(policy), self.shape
        page = sum(CODECS[codec].bytes_per_token(dim, PAGE, DTYPE) for codec in (parsed.keys, parsed.values)) * PAGE
        open_page = 2 * PAGE * dim * DTYPE.itemsize
        return round(self.batch * heads * (self.sealed * page + open_page))

    def __str__(self) -> str:
        heads, kv_heads, dim = self.shape
        return f"{heads}/{kv_heads} heads x {dim}, batch {self.batch}, context {self.context}"


def cells(
    shapes: Sequence[Shape] = SHAPES, batches: Sequence[int] = BATCHES, contexts: Sequence[int] = CONTEXTS
) -> list[Cell]:
    """Every combination, the most informative first: the anchor, then what is near it, the larger of equals first.

    So whatever a time limit leaves out is the least of the table.
    """

    def distance(cell: Cell) -> tuple[float, int]:
        batch, context = math.log2(cell.batch / ANCHOR_BATCH), math.log2(cell.context / ANCHOR_CONTEXT)
        return 1.5 * shapes.index(cell.shape) + abs(context) + abs(batch) / 1.5, -cell.dense_bytes()

    return sorted(itertools.starmap(Cell, itertools.product(shapes, batches, contexts)), key=distance)


class Fit(NamedTuple):
    """``dense``: whether the bf16 contenders fit; ``policies`` that fit beside them; why the others do not."""

    dense: bool
    policies: tuple[str, ...]
    refused: dict[str, str]


def fit(cell: Cell, policies: Sequence[str], free: int) -> Fit:
    """Which contenders of a cell fit into ``free`` bytes at once, in the order bf16 first, then ``policies``."""
    left = free - HEADROOM
    chosen: list[str] = []
    refused: dict[str, str] = {}
    needs = {"bf16": cell.dense_bytes()} | {policy: cell.stored_bytes(policy) for policy in policies}
    for name, needed in needs.items():
        if needed <= left:
            chosen.append(name)
            left -= needed
        else:
            refused[name] = f"needs {needed / 2**30:.1f} GiB, {max(left, 0) / 2**30:.1f} GiB are left"
    return Fit("bf16" in chosen, tuple(name for name in chosen if name != "bf16"), refused)
