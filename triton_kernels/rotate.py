"""The Hadamard rotation of queries, one launch: what the keys' codec calls its domain, in float32.

The rotation is a product with signs made in registers.  Queries enter it as the model made them, so products are exact
in the model's dtype and only the float32 sums round.
"""

import functools
from collections.abc import Hashable
from typing import Any

import torch

from .hadamard import hadamard_block
from .launching import Launcher
from .target import compiled_for, tl, triton
from .tile_math import hadamard_signs


@triton.jit(do_not_specialize=["rows", "queries"])
def _rotate_kernel(
    out_ptr,
    x_ptr,
    rows,
    heads,
    queries,
    stride_b,
    stride_h,
    stride_q,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: (blocks of ROWS rows,); ``out`` is contiguous, ``[rows, HEAD_DIM]``."""
    SLICE: tl.constexpr = 16 if HEAD_DIM <= 16 else 32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    start = row // (heads * queries) * stride_b + row // queries % heads * stride_h + row % queries * stride_q
    columns = tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, HEAD_DIM, SLICE):
        offs_d = first + tl.arange(0, SLICE)
        pointers = x_ptr + start[:, None] + offs_d[None, :]
        x = tl.load(pointers, mask=exists[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)  # [ROWS, SLICE]
        signs = hadamard_signs(offs_d, columns, ORDER)  # [SLICE, COLUMNS]
        total = tl.dot(x, signs.to(x.dtype), total, input_precision="ieee")
    pointers = out_ptr + row[:, None] * HEAD_DIM + columns[None, :]
    tl.store(pointers, total * (ORDER**-0.5), mask=exists[:, None] & (columns < HEAD_DIM)[None, :])


ROWS = 16  # of a program: a product has as many at least


def rotate_constants(head_dim: int) -> dict[str, Any]:
    """The constants of ``_rotate_kernel``, and how it is launched."""
    return {
        "HEAD_DIM": head_dim,
        "COLUMNS": max(16, triton.next_power_of_2(head_dim)),
        "ORDER": hadamard_block(head_dim),
        "ROWS": ROWS,
        "num_warps": 4,
    }


@functools.lru_cache(maxsize=256)
def rotation(head_dim: int, dtype: torch.dtype, where: Hashable) -> Launcher:
    """The launch of ``rotate`` for queries of ``dtype``; ``where``: see ``target.compiled_for``."""
    return Launcher(_rotate_kernel, rotate_constants(head_dim))


def rotate(query: torch.Tensor) -> torch.Tensor:
    """``hadamard(query)`` in float32.

    Args:
        query: ``[batch, heads, queries, head_dim]``, last dimension contiguous, float16, bfloat16 or float32.

    Returns:
        ``[batch, heads, queries, head_dim]`` float32, contiguous.
    """
    batch, heads, queries, head_dim = query.shape
    rows = batch * heads * queries
    out = query.new_empty(query.shape, dtype=torch.float32)
    launcher = rotation(head_dim, query.dtype, compiled_for(query))
    launcher((-(-rows // ROWS), 1, 1), (out, query, rows, heads, queries, *query.stride()[:3]))
    return out
