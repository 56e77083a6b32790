"""Append and attention over packed pages by Triton kernels.

Append is one launch, attention of few queries three at most: rotate the query, ``decode``, ``combine``.  Many queries
go through ``chunk_attention``.
"""

import torch

from .append import append
from .chunk import MANY_QUERIES, chunk_attention
from .combine import combine
from .decode import decode
from .dense_pages import PackedPages
from .launch import launch_config, split_count
from .pages import PagedSide
from .rotate import rotate
from .target import architecture, processors, triton


def append_triton(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_side: PagedSide,
    value_side: PagedSide,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    new_lengths: torch.Tensor,
) -> None:
    """``ops.append_pages``, which see."""
    append(
        keys,
        values,
        key_side.codec,
        value_side.codec,
        list(key_side.planes),
        list(value_side.planes),
        key_side.tail,
        value_side.tail,
        page_table,
        lengths,
        new_lengths,
    )


def paged_attention_triton(
    query: torch.Tensor,
    keys: PagedSide,
    values: PagedSide,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    window: int = 0,
) -> torch.Tensor:
    """``ops.paged_attention``, which see."""
    if query.stride(-1) != 1:
        query = query.contiguous()
    if mask is not None and mask.stride(-1) not in (0, 1):
        mask = mask.contiguous()
    batch, query_heads, queries, key_dim = query.shape
    heads, value_dim = values.tail.shape[1], values.head_dim
    rows = query_heads // heads * queries
    k, v = keys.codec.kernel, values.codec.kernel
    assert k is not None and v is not None, "choose() lets no other codec through"
    out = query.new_empty(batch, query_heads, queries, value_dim)
    if queries >= MANY_QUERIES:
        planes = list(keys.planes), list(values.planes)
        rotated = keys.codec.rotated, values.codec.rotated
        packed = PackedPages(k, v, *planes, keys.tail, values.tail, *rotated, page_table, lengths)
        chunk_attention(out, query, packed, mask, sinks, scale=scale, causal=causal, window=window, softcap=softcap)
        return out
    elements = keys.page_size * max(key_dim, value_dim)
    bits = keys.codec.bits + values.codec.bits
    code_planes = k.code_planes + v.code_planes
    config = launch_config(architecture(query.device), query.element_size(), elements, rows, bits, code_planes)
    if mask is not None:
        config = config.masked()
    programs = batch * heads * triton.cdiv(rows, config.rows)
    pages = page_table.shape[1]
    if window:
        pages = min(pages, triton.cdiv(window + queries - 1, keys.page_size) + 1)  # more are never seen
    splits = split_count(config, programs, pages, processors(query.device))
    columns = max(triton.next_power_of_2(value_dim), 16)
    partial = query.new_empty(batch, heads, splits + 1, rows, columns, dtype=torch.float32)
    state = query.new_empty(batch, heads, splits + 1, rows, 2, dtype=torch.float32)
    rotated = rotate(query) if keys.codec.rotated else query
    decode(
        partial,
        state,
        query,
        rotated,
        k,
        v,
        list(keys.planes),
        list(values.planes),
        keys.tail,
        values.tail,
        page_table,
        lengths,
        mask,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        page_size=keys.page_size,
        splits=splits,
        config=config,
    )
    combine(out, partial, state, values.codec.rotated, sinks)
    return out
