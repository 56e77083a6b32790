"""Merge the splits of ``decode.py`` by log-sum-exp, rotate packed values back, divide.

    m = max_s m_s      out = sum_s 2^(m_s - m) o_s / sum_s 2^(m_s - m) l_s

One program serves one row and reads its splits ``BLOCK`` at a time, as wide loads: with few rows it is the number of
loads in flight that decides.  Splits over pages hold their accumulator in the values' domain, the last split (the open
page) is not rotated.  A merged accumulator of rotated values is rotated back by butterflies, once per row and not once
per split.

Chunks of queries have rows enough to fill a device otherwise: there a program serves ``MANY_ROWS`` of them, takes one
split after the other, and multiplies by Hadamard signs, made ``SLICE`` channels at a time for all its rows.
"""

from typing import Any

from .hadamard import hadamard_block
from .target import tl, triton
from .tile_math import hadamard_rotate, hadamard_signs


@triton.jit(do_not_specialize=["state_at", "queries", "splits"])
def _combine_kernel(
    out_ptr,
    partial_ptr,
    state_at,
    sinks_ptr,
    heads,
    queries,
    splits,
    stride_out_b,
    stride_out_h,
    stride_out_q,
    VALUE_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
    ROTATED: tl.constexpr,
    ORDER: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Grid: (batch * heads * rows,), rows = GROUP * queries."""
    state_ptr = partial_ptr + state_at
    rows = GROUP * queries
    row = tl.program_id(0) % rows
    batch_head = tl.program_id(0) // rows
    query_head = batch_head % heads * GROUP + row // queries
    columns = tl.arange(0, COLUMNS)
    exists = columns < VALUE_DIM
    offs_s = tl.arange(0, BLOCK)
    first = batch_head.to(tl.int64) * (splits + 1) * rows + row

    # The open page first: it is there for every row.
    at = first + splits.to(tl.int64) * rows
    tail = tl.load(partial_ptr + at * COLUMNS + columns, mask=exists, other=0.0)  # [COLUMNS]
    maximum = tl.load(state_ptr + at * 2)
    if SINKS:
        sink = tl.load(sinks_ptr + query_head).to(tl.float32) * 1.4426950408889634
        maximum = tl.maximum(maximum, sink)
    origin = tl.where(maximum == float("-inf"), 0.0, maximum)
    tail_factor = tl.exp2(tl.load(state_ptr + at * 2) - origin)
    total = tail_factor * tl.load(state_ptr + at * 2 + 1)
    if SINKS:
        total += tl.exp2(sink - origin)

    packed = tl.zeros([COLUMNS], tl.float32)
    for block in range(0, splits, BLOCK):
        there = block + offs_s < splits
        here = first + (block + offs_s).to(tl.int64) * rows  # [BLOCK]
        split_max = tl.load(state_ptr + here * 2, mask=there, other=float("-inf"))  # [BLOCK]
        new_max = tl.maximum(maximum, tl.max(split_max, 0))
        origin = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp2(maximum - origin)
        factor = tl.exp2(split_max - origin)  # [BLOCK]
        maximum = new_max
        split_sum = tl.load(state_ptr + here * 2 + 1, mask=there, other=0.0)  # [BLOCK]
        pointers = partial_ptr + here[:, None] * COLUMNS + columns[None, :]
        values = tl.load(pointers, mask=there[:, None] & exists[None, :], other=0.0)  # [BLOCK, COLUMNS]
        total = total * decay + tl.sum(factor * split_sum, 0)
        packed = packed * decay + tl.sum(factor[:, None] * values, 0)
        tail_factor = tail_factor * decay
    total = tl.where(total == 0.0, 1.0, total)

    out = out_ptr + (batch_head // heads).to(tl.int64) * stride_out_b + query_head.to(tl.int64) * stride_out_h
    out = out + (row % queries).to(tl.int64) * stride_out_q
    if ROTATED:
        packed = hadamard_rotate(packed, COLUMNS, ORDER)
    values = (packed + tail_factor * tail) / total
    tl.store(out + columns, values.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["state_at", "queries", "splits"])
def _combine_rows_kernel(
    out_ptr,
    partial_ptr,
    state_at,
    sinks_ptr,
    heads,
    queries,
    splits,
    stride_out_b,
    stride_out_h,
    stride_out_q,
    VALUE_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
    ROTATED: tl.constexpr,
    ORDER: tl.constexpr,
    PRECISION: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Grid: (batch * heads * row blocks,), blocks of ROWS of the GROUP * queries rows."""
    state_ptr = partial_ptr + state_at
    rows = GROUP * queries
    row_blocks = tl.cdiv(rows, ROWS)
    row = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    row_exists = row < rows
    batch_head = tl.program_id(0) // row_blocks
    query_head = batch_head % heads * GROUP + row // queries  # [ROWS]
    columns = tl.arange(0, COLUMNS)
    mask = row_exists[:, None] & (columns < VALUE_DIM)[None, :]
    first = batch_head.to(tl.int64) * (splits + 1) * rows + row  # [ROWS]

    at = first + splits.to(tl.int64) * rows
    maximum = tl.load(state_ptr + at * 2, mask=row_exists, other=float("-inf"))
    tail_max = maximum
    if SINKS:
        sink = tl.load(sinks_ptr + query_head, mask=row_exists, other=0.0).to(tl.float32) * 1.4426950408889634
        maximum = tl.maximum(maximum, sink)
    origin = tl.where(maximum == float("-inf"), 0.0, maximum)
    tail_factor = tl.exp2(tail_max - origin)
    total = tail_factor * tl.load(state_ptr + at * 2 + 1, mask=row_exists, other=0.0)
    if SINKS:
        total += tl.exp2(sink - origin)

    packed = tl.zeros([ROWS, COLUMNS], tl.float32)
    for split in range(splits):
        here = first + tl.cast(split, tl.int64) * rows  # [ROWS]
        split_max = tl.load(state_ptr + here * 2, mask=row_exists, other=float("-inf"))
        split_sum = tl.load(state_ptr + here * 2 + 1, mask=row_exists, other=0.0)
        values = tl.load(partial_ptr + here[:, None] * COLUMNS + columns[None, :], mask=mask, other=0.0)
        new_max = tl.maximum(maximum, split_max)
        origin = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp2(maximum - origin)
        factor = tl.exp2(split_max - origin)
        maximum = new_max
        total = total * decay + factor * split_sum
        packed = packed * decay[:, None] + factor[:, None] * values
        tail_factor = tail_factor * decay
    total = tl.where(total == 0.0, 1.0, total)

    out = out_ptr + (batch_head // heads).to(tl.int64) * stride_out_b + query_head.to(tl.int64) * stride_out_h
    out = (out + (row % queries).to(tl.int64) * stride_out_q)[:, None]
    tail = partial_ptr + at[:, None] * COLUMNS
    if ROTATED:
        for start in range(0, VALUE_DIM, SLICE):
            offs_v = start + tl.arange(0, SLICE)
            exists = row_exists[:, None] & (offs_v < VALUE_DIM)[None, :]
            signs = hadamard_signs(columns, offs_v, ORDER)  # [COLUMNS, SLICE]
            values = tl.dot(packed, signs, input_precision=PRECISION) * (1.0 / tl.sqrt(ORDER * 1.0))  # [ROWS, SLICE]
            values += tail_factor[:, None] * tl.load(tail + offs_v[None, :], mask=exists, other=0.0)
            tl.store(out + offs_v[None, :], (values / total[:, None]).to(out_ptr.dtype.element_ty), mask=exists)
    else:
        values = packed + tail_factor[:, None] * tl.load(tail + columns[None, :], mask=mask, other=0.0)
        tl.store(out + columns[None, :], (values / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


# Rows of a program where there are at least four times as many: a product has 16 rows at least.
MANY_ROWS = 16


def combine_constants(
    rotated: bool,
    ptx: bool,
    value_dim: int,
    columns: int,
    group: int,
    sinks: bool,
    many: bool,
) -> dict[str, Any]:
    """The constants of ``_combine_kernel``, or with ``many`` rows of ``_combine_rows_kernel``, and how it is launched.

    Args:
        rotated: whether the domain of the values' codec is.
        ptx: whether it is compiled for an NVIDIA GPU.
        value_dim: head_dim of the values.
        columns: width of ``partial``, a power of two.
        group: query heads per key/value head.
        sinks: whether there are any.
    """
    # Signs are exact in TF32, and accumulators in two parts of it but for the last bits.
    precision = "tf32x3" if ptx else "ieee"
    return {
        "VALUE_DIM": value_dim,
        "COLUMNS": columns,
        "GROUP": group,
        "SLICE": 32,
        "ROTATED": rotated,
        "ORDER": hadamard_block(value_dim),
        "SINKS": sinks,
        "num_warps": 8 if many and not rotated else 4,
        "enable_fp_fusion": True,
        **({"ROWS": MANY_ROWS, "PRECISION": precision} if many else {"BLOCK": 16}),
    }
