"""The Hadamard rotation of queries into the domain of the keys' codec, and of outputs back from that of the values'.

One launch.  The rotation is a product with signs made in registers.  Queries enter it as the model made them, so
products are exact in the model's dtype and only the float32 sums round.
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
    stride_out_b,
    stride_out_h,
    stride_out_q,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: (blocks of ROWS rows,); rows are those of ``[batch, heads, queries, HEAD_DIM]``."""
    SLICE: tl.constexpr = 16 if HEAD_DIM <= 16 else 32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    batch, head, query = row // (heads * queries), row // queries % heads, row % queries
    start = batch * stride_b + head * stride_h + query * stride_q
    columns = tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, HEAD_DIM, SLICE):
        offs_d = first + tl.arange(0, SLICE)
        pointers = x_ptr + start[:, None] + offs_d[None, :]
        x = tl.load(pointers, mask=exists[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)  # [ROWS, SLICE]
        signs = hadamard_signs(offs_d, columns, ORDER)  # [SLICE, COLUMNS]
        total = tl.dot(x, signs.to(x.dtype), total, input_precision="ieee")
    start = batch * stride_out_b + head * stride_out_h + query * stride_out_q
    total = (total * (ORDER**-0.5)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + start[:, None] + columns[None, :], total, mask=exists[:, None] & (columns < HEAD_DIM)[None, :])


ROWS = 16  # of a program: a product has as many at least


def rotate_constants(head_dim: int) -> dict[str, Any]:
    """The constants of ``_rotate_kernel``, and how it is launched."""
    return {
        "HEAD_DIM": head_dim,
        "COLUMNS": max(16, triton.next_power_of_2(head_dim)),
        "ORDER": hadamard_block(head_dim),
        "ROWS": ROWS,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


@functools.lru_cache(maxsize=256)
def rotation(head_dim: int, dtypes: tuple[torch.dtype, torch.dtype], where: Hashable) -> Launcher:
    """The launch of ``rotate`` from and to ``dtypes``; ``where``: see ``target.compiled_for``."""
    return Launcher(_rotate_kernel, rotate_constants(head_dim))


def rotate(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``hadamard(x)``.

    Args:
        x: ``[batch, heads, queries, head_dim]``, last dimension contiguous, float16, bfloat16 or float32.
        out: where the result goes, of the same shape, last dimension contiguous, any floating dtype; if None, a new
            contiguous float32 tensor.

    Returns:
        ``out``.
    """
    batch, heads, queries, head_dim = x.shape
    rows = batch * heads * queries
    if out is None:
        out = x.new_empty(x.shape, dtype=torch.float32)
    launcher = rotation(head_dim, (x.dtype, out.dtype), compiled_for(x))
    launcher((-(-rows // ROWS), 1, 1), (out, x, rows, heads, queries, *x.stride()[:3], *out.stride()[:3]))
    return out
