"""Attention over latents by Triton kernels: ``rotate`` where pages are rotated, ``latent_decode``, ``combine``."""

import functools
from typing import Any

import torch

from . import launching
from .combine import MANY_ROWS, _combine_kernel, _combine_rows_kernel, combine_constants
from .latent_decode import _latent_decode_kernel, latent_constants
from .launch import LaunchConfig, split_count
from .pages import PagedSide
from .rotate import rotate
from .target import has_ptx, processors

_ROWS = 16  # query heads of a program: a product of tensor cores has as many, or half


# Eight warps: with four, a block of 32 tokens and the sums of 512 channels do not fit in the registers.  They then take
# most of those of a multiprocessor, which holds one program; nothing is timed on a GPU yet.
_CONFIG = LaunchConfig(rows=_ROWS, warps=8, stages=1, residents=1)


def latent_attention_triton(
    query: torch.Tensor,
    latents: PagedSide,
    rotary: PagedSide,
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
    """``latent.latent_attention_reference``, which see.

    Raises:
        ValueError: rows of one sequence have 2^31 accumulated numbers or more, which 32-bit offsets do not reach.
    """
    k, r = latents.codec.kernel, rotary.codec.kernel
    assert k is not None and r is not None, "choose_for_latents() lets no other codec through"
    query = query if query.stride(-1) == 1 else query.contiguous()
    if mask is not None and mask.stride(-1) not in (0, 1):
        mask = mask.contiguous()
    batch, heads, queries, _ = query.shape
    rank, rope, page_size = latents.head_dim, rotary.head_dim, latents.page_size
    dtype, rows, pages = latents.tail.dtype, heads * queries, page_table.shape[1]
    kinds = _kinds(mask, queries)
    constants = _constants(
        (k, r),
        dtype,
        has_ptx(query.device),
        (rank, rope),
        page_size,
        first=0 if latents.first is None else latents.first.shape[2],
        causal=causal and queries > 1,
        window=window,
        softcap=softcap is not None,
        mask=kinds[0],
        shared_mask=kinds[1],
        rows=_CONFIG.rows,
        warps=_CONFIG.warps,
    )
    columns, tokens = constants["COLUMNS"], constants["TOKENS"]
    if rows * columns >= 1 << 31:
        raise ValueError(f"{queries} queries for {heads} heads are too many for one launch; pass them in chunks")
    if window:
        pages = min(pages, -(-(window + queries - 1) // page_size) + 1)  # more are never seen
    programs = batch * -(-rows // _CONFIG.rows)
    splits = split_count(_CONFIG, programs, pages, processors(query.device))
    results = batch * (splits + 1) * rows
    partial = query.new_empty(results * (columns + 2), dtype=torch.float32)
    # Of each program the block that it works on, multiplied out.
    scratch = [query.new_empty(programs * splits * tokens * dim, dtype=dtype) for dim in (rank, rope)]
    domain = _in_domain(query, latents, rotary)
    seen = lengths if mask is None else mask.view(torch.uint8) if kinds[0] == 1 else mask
    launching.launch(
        _latent_decode_kernel,
        (programs, splits, 1),
        partial,
        results * columns,
        *scratch,
        query,
        domain,
        k.arguments(latents.planes, 1),
        r.arguments(rotary.planes, 1),
        latents.tail,
        rotary.tail,
        *(page_table if x is None else x for x in (latents.first, rotary.first, latents.first_at)),
        page_table,
        lengths,
        seen,
        float(scale),
        0.0 if softcap is None else float(softcap),
        heads,
        queries,
        splits,
        *query.stride()[:3],
        *domain.stride()[:3],
        latents.tail.stride(0),
        latents.tail.stride(2),
        rotary.tail.stride(0),
        rotary.tail.stride(2),
        page_table.stride(0),
        *((0, 0, 0, 0) if mask is None else _mask_strides(mask)),
        **constants,
    )
    out = query.new_empty(batch, heads, queries, rank)
    many = rows >= 4 * MANY_ROWS
    launching.launch(
        _combine_rows_kernel if many else _combine_kernel,
        (batch * (-(-rows // MANY_ROWS) if many else rows), 1, 1),
        out,
        partial,
        results * columns,
        partial if sinks is None else sinks,
        1,
        queries,
        splits,
        *out.stride()[:3],
        **combine_constants(
            latents.codec.rotated, has_ptx(query.device), rank, columns, heads, sinks is not None, many
        ),
    )
    return out


@functools.lru_cache(maxsize=256)
def _constants(codecs: Any, *arguments: Any, **more: Any) -> dict[str, Any]:
    return latent_constants(*codecs, *arguments, **more)


def _kinds(mask: torch.Tensor | None, queries: int) -> tuple[int, bool]:
    """Kind of a mask, as ``latent_constants`` has it, and whether all rows of a sequence have the same row of it."""
    if mask is None:
        return 0, False
    return 1 if mask.dtype == torch.bool else 2, queries == 1 and (mask.shape[1] == 1 or mask.stride(1) == 0)


def _mask_strides(mask: torch.Tensor) -> list[int]:
    """Strides of a mask, 0 where one entry stands for all."""
    return [0 if size == 1 else stride for size, stride in zip(mask.shape[:3], mask.stride(), strict=False)] + [
        mask.stride(3)
    ]


def _in_domain(query: torch.Tensor, latents: PagedSide, rotary: PagedSide) -> torch.Tensor:
    """Queries in the domains of the packed sides; the same tensor where neither is rotated."""
    if not (latents.codec.rotated or rotary.codec.rotated):
        return query
    domain = query.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    start = 0
    for side in (latents, rotary):
        part = slice(start, start + side.head_dim)
        if side.codec.rotated:
            rotate(query[..., part], domain[..., part])
        start += side.head_dim
    return domain
