"""Attention of many queries: blocks of pages are multiplied out once, and read by dense flash attention.

``decode.py`` unpacks a page for every block of 8 or 16 rows.  From ``MANY_QUERIES`` on, that is more work than writing
the page out and reading it back.  Memory stays bounded whatever the context and the chunk:

    dense keys and values of a block of pages           at most DENSE_BYTES, or one page
    accumulators and rotated queries of some queries    at most STATE_BYTES, or MANY_QUERIES queries

Queries are taken some at a time; for each of these, block after block of pages is multiplied out and attended to, and
what a block leaves (accumulator, maximum and sum, float32) is where the next one goes on.  Where one block holds all
tokens and values are not rotated, the result is written at once.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import launching
from .dense_pages import PackedPages, dense_pages
from .rotate import rotate
from .target import architecture, tl, triton
from .tile_math import online_softmax, scores_to_base2

# Queries of a call from which on pages are multiplied out.
MANY_QUERIES = 64
DENSE_BYTES = 64 << 20
STATE_BYTES = 160 << 20


@triton.jit(
    do_not_specialize=[
        "queries",
        "behind",
        "first_token",
        "block_tokens",
        "first",
        "last",
        "stride_mask_b",
        "stride_mask_h",
        "stride_mask_q",
    ]
)
def _chunk_kernel(
    out_ptr,
    accumulator_ptr,
    state_ptr,
    query_ptr,
    keys_ptr,
    values_ptr,
    lengths_ptr,
    mask_ptr,
    sinks_ptr,
    scale,
    softcap,
    query_heads,
    queries,
    behind,
    first_token,
    block_tokens,
    first,
    last,
    stride_query_b,
    stride_query_h,
    stride_query_q,
    stride_out_b,
    stride_out_h,
    stride_out_q,
    stride_mask_b,
    stride_mask_h,
    stride_mask_q,
    stride_mask_n,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: (query blocks of ROWS, batch * query heads).

    ``behind`` tokens come after the last of the queries.  ``first`` and ``last`` say whether no block
    came before this one, and none comes after it; it holds ``block_tokens`` tokens from ``first_token`` on.
    """
    query_head = tl.program_id(1) % query_heads
    batch = tl.program_id(1) // query_heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_exists = row < queries
    tokens = tl.load(lengths_ptr + batch * 2) * PAGE + tl.load(lengths_ptr + batch * 2 + 1)
    before = tokens - behind - queries  # tokens before the first query
    query_position = before + row

    begin, end = first_token, tl.minimum(tokens, first_token + block_tokens)
    if CAUSAL:
        last_row = tl.minimum(tl.program_id(0) * ROWS + ROWS, queries) - 1
        end = tl.minimum(end, before + last_row + 1)
    if WINDOW > 0:
        hidden = tl.maximum(before + tl.program_id(0) * ROWS + 1 - WINDOW, 0)
        begin = tl.maximum(begin, hidden // TOKENS * TOKENS)

    offs_k = tl.arange(0, KEY_COLUMNS)
    offs_v = tl.arange(0, VALUE_COLUMNS)
    offs_n = tl.arange(0, TOKENS)
    # Rows of what one block leaves to the next.
    kept = tl.program_id(1).to(tl.int64) * queries + row
    kept_values = accumulator_ptr + kept[:, None] * VALUE_DIM + offs_v[None, :]
    kept_mask = row_exists[:, None] & (offs_v < VALUE_DIM)[None, :]
    if first:
        running_max = tl.full([ROWS], float("-inf"), tl.float32)
        running_sum = tl.zeros([ROWS], tl.float32)
        accumulator = tl.zeros([ROWS, VALUE_COLUMNS], tl.float32)
    else:
        running_max = tl.load(state_ptr + kept * 2, mask=row_exists, other=float("-inf"))
        running_sum = tl.load(state_ptr + kept * 2 + 1, mask=row_exists, other=0.0)
        accumulator = tl.load(kept_values, mask=kept_mask, other=0.0)

    query_ptr += batch.to(tl.int64) * stride_query_b + query_head.to(tl.int64) * stride_query_h
    pointers = query_ptr + row.to(tl.int64)[:, None] * stride_query_q + offs_k[None, :]
    query = tl.load(pointers, mask=row_exists[:, None] & (offs_k < KEY_DIM)[None, :], other=0.0)  # [ROWS, KEY_COLUMNS]
    query = query.to(keys_ptr.dtype.element_ty)
    mask_rows = mask_ptr + batch.to(tl.int64) * stride_mask_b + query_head.to(tl.int64) * stride_mask_h
    mask_rows = mask_rows + row.to(tl.int64) * stride_mask_q  # [ROWS]
    dense_head = (batch * (query_heads // GROUP) + query_head // GROUP).to(tl.int64) * block_tokens - first_token
    keys_ptr += dense_head * KEY_DIM
    values_ptr += dense_head * VALUE_DIM

    for token in tl.range(begin, end, TOKENS, num_stages=STAGES):
        rows_n = (token + offs_n)[:, None]
        k = tl.load(keys_ptr + rows_n * KEY_DIM + offs_k[None, :], mask=(offs_k < KEY_DIM)[None, :], other=0.0)
        v = tl.load(values_ptr + rows_n * VALUE_DIM + offs_v[None, :], mask=(offs_v < VALUE_DIM)[None, :], other=0.0)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION)  # [ROWS, TOKENS]
        logits = scores_to_base2(
            tl.trans(scores),
            offs_n,
            token,
            tokens - token,
            query_position,
            mask_rows,
            stride_mask_n,
            row_exists,
            scale,
            softcap,
            CAUSAL,
            WINDOW,
            SOFTCAP,
            MASK,
            False,
        )
        weights, decay, running_max, running_sum = online_softmax(logits, running_max, running_sum)
        product = tl.dot(tl.trans(weights).to(v.dtype), v, input_precision=PRECISION)  # [ROWS, VALUE_COLUMNS]
        accumulator = accumulator * decay[:, None] + product

    if last:
        if SINKS:
            sink = tl.load(sinks_ptr + query_head).to(tl.float32) * 1.4426950408889634
            new_max = tl.maximum(running_max, sink)
            decay = tl.exp2(running_max - new_max)
            running_sum = running_sum * decay + tl.exp2(sink - new_max)
            accumulator = accumulator * decay[:, None]
        accumulator = accumulator / tl.where(running_sum == 0.0, 1.0, running_sum)[:, None]
        out_ptr += batch.to(tl.int64) * stride_out_b + query_head.to(tl.int64) * stride_out_h
        out_rows = out_ptr + row.to(tl.int64)[:, None] * stride_out_q + offs_v[None, :]
        tl.store(out_rows, accumulator.to(out_ptr.dtype.element_ty), mask=kept_mask)
    else:
        tl.store(kept_values, accumulator, mask=kept_mask)
        tl.store(state_ptr + kept * 2, running_max, mask=row_exists)
        tl.store(state_ptr + kept * 2 + 1, running_sum, mask=row_exists)


def _launch(device: torch.device, dtype: torch.dtype, columns: int) -> tuple[int, int, int, int]:
    """Rows and tokens of a program's tiles, warps, stages; as registers and shared memory allow (docs/kernels.md)."""
    gpu = architecture(device)
    if dtype == torch.float32 or gpu.startswith("sm_7"):  # without tensor cores, whose tiles registers would not hold
        return (16, 16, 8, 1) if columns > 128 else (32, 32, 8, 1)
    if gpu.startswith("gfx"):
        return 32, 32, 4, 1
    large = gpu in ("sm_80", "sm_90") or gpu.startswith("sm_10")
    if columns > 128:
        return (64, 64, 8, 2) if large else (64, 32, 8, 2)
    if large:
        return 128, 64, 8, 3 if gpu in ("sm_80", "sm_90") else 2
    return 64, 64, 4, 2


class Sizes(NamedTuple):
    """How much is taken at a time: pages that are multiplied out, and queries; whether blocks leave accumulators."""

    pages: int
    queries: int
    kept: bool


def sizes(query_shape: Sequence[int], dtype: torch.dtype, pages: PackedPages) -> Sizes:
    """What of a call fits in DENSE_BYTES and STATE_BYTES.

    Args:
        query_shape: batch, query heads, queries, key_dim.
        dtype: of the pages multiplied out.
        pages: the packed pages.
    """
    batch, query_heads, queries, key_dim = query_shape
    heads, page_size, value_dim = pages.value_tail.shape[1:]
    all_pages = pages.page_table.shape[1] + 1
    page_bytes = batch * heads * page_size * (key_dim + value_dim) * dtype.itemsize
    block = min(all_pages, max(1, DENSE_BYTES // page_bytes))
    kept = block < all_pages or pages.value_rotated
    numbers = kept * (value_dim + 2) + pages.key_rotated * key_dim  # float32, of one query of one head
    if not numbers:
        return Sizes(block, queries, kept)
    fits = STATE_BYTES // (batch * query_heads * numbers * 4) // MANY_QUERIES * MANY_QUERIES
    return Sizes(block, min(queries, max(MANY_QUERIES, fits)), kept)


def _part(numbers: torch.Tensor, *shape: int) -> torch.Tensor:
    """The first of ``numbers`` as a contiguous tensor of ``shape``."""
    return numbers[: math.prod(shape)].view(shape)


def chunk_attention(
    out: torch.Tensor,
    query: torch.Tensor,
    pages: PackedPages,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    *,
    scale: float,
    causal: bool,
    window: int,
    softcap: float | None,
) -> None:
    """Write ``out`` ``[batch, query_heads, queries, value_dim]``; arguments as of ``ops.paged_attention``."""
    batch, query_heads, queries, key_dim = query.shape
    heads, page_size, value_dim = pages.key_tail.shape[1], pages.key_tail.shape[2], pages.value_tail.shape[3]
    device, dtype = query.device, torch.promote_types(pages.key_tail.dtype, pages.value_tail.dtype)

    all_pages = pages.page_table.shape[1] + 1
    block_pages, count, kept = sizes(query.shape, dtype, pages)
    block = block_pages * page_size
    keys = query.new_empty(batch, heads, block, key_dim, dtype=dtype)
    values = query.new_empty(batch, heads, block, value_dim, dtype=dtype)
    numbers = batch * query_heads * count  # of queries that are taken at a time
    accumulators = query.new_empty(kept * numbers * value_dim, dtype=torch.float32)
    states = query.new_empty(kept * numbers * 2, dtype=torch.float32)
    rotated = query.new_empty(pages.key_rotated * numbers * key_dim, dtype=torch.float32)
    strides = (0, 0, 0, 0) if mask is None else mask.expand(batch, query_heads, queries, mask.shape[-1]).stride()
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    rows, tokens, warps, stages = _launch(device, dtype, triton.next_power_of_2(max(key_dim, value_dim)))
    tokens = min(tokens, page_size)

    for begin in range(0, queries, count):
        part = query[:, :, begin : begin + count]
        result = out[:, :, begin : begin + count]
        size = part.shape[2]
        behind = queries - begin - size
        asked, written = part, result
        if pages.key_rotated:
            asked = rotate(part, _part(rotated, batch, query_heads, size, key_dim))
        if pages.value_rotated:
            written = _part(accumulators, batch, query_heads, size, value_dim)
        seen = mask if mask is None or mask.shape[2] == 1 else mask[:, :, begin : begin + count]
        shown = query if seen is None else seen.view(torch.uint8) if kind == 1 else seen
        for first_page in range(0, all_pages, block_pages):
            dense_pages(
                keys,
                values,
                pages,
                first_page=first_page,
                queries=(behind + size - 1, behind),
                causal=causal,
                window=window,
            )
            launching.launch(
                _chunk_kernel,
                (triton.cdiv(size, rows), batch * query_heads),
                written,
                accumulators,
                states,
                asked,
                keys,
                values,
                pages.lengths,
                shown,
                query if sinks is None else sinks,
                scale,
                0.0 if softcap is None else softcap,
                query_heads,
                size,
                behind,
                first_page * page_size,
                block,
                int(first_page == 0),
                int(first_page + block_pages >= all_pages),
                *asked.stride()[:3],
                *written.stride()[:3],
                *strides,
                KEY_DIM=key_dim,
                VALUE_DIM=value_dim,
                KEY_COLUMNS=max(16, triton.next_power_of_2(key_dim)),
                VALUE_COLUMNS=max(16, triton.next_power_of_2(value_dim)),
                GROUP=query_heads // heads,
                PAGE=page_size,
                ROWS=rows,
                TOKENS=tokens,
                CAUSAL=causal,
                WINDOW=window,
                SOFTCAP=softcap is not None,
                MASK=kind,
                SINKS=sinks is not None,
                PRECISION="ieee",
                STAGES=stages,
                num_warps=warps,
                enable_fp_fusion=True,
            )
        if pages.value_rotated:
            rotate(written, result)
