"""Append and attention over packed pages by Triton kernels.

Append is one launch, attention of few queries three at most: rotate the query, ``decode``, ``combine``.  A decode step
of a layer differs from the one before in a few tensors; what does not is put together once and kept with the pages.
Many queries go through ``chunk_attention``.
"""

import torch

from .append import AppendCall
from .chunk import MANY_QUERIES, chunk_attention
from .dense_pages import PackedPages
from .launch import overridden
from .launching import Variant, aligned, nobody_watches
from .pages import PagedSide
from .plan import AttentionPlan, attention_plan
from .rotate import rotate
from .target import compiled_for

_MOST_CALLS = 64  # kept with one side


class AttentionCall:
    """A call of attention over given pages: what stays from step to step is put together once.

    Args:
        plan: of the call.
        query: of a first call; those of later ones have its shape, dtype and strides, and so has the ``mask``.
        keys, values: the pages.
        page_table: where they are.
    """

    def __init__(
        self,
        plan: AttentionPlan,
        query: torch.Tensor,
        keys: PagedSide,
        values: PagedSide,
        page_table: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> None:
        self._plan, self._kernels, self.values, self.page_table = plan, plan.kernels, values, page_table
        heads = plan.counts[0]
        key_planes = plan.kernels.keys.arguments(keys.planes, heads)
        value_planes = plan.kernels.values.arguments(values.planes, heads)
        firsts = (keys.first, values.first, keys.first_at)
        beside = tuple(page_table if x is None else x for x in firsts)  # a pointer that is not read
        self._pages = (key_planes, value_planes, keys.tail, values.tail, *beside, page_table)
        self._strides = (
            *query.stride()[:3],
            *(plan.rotated_strides if plan.kernels.rotated else query.stride()[:3]),
            *keys.tail.stride()[:3],
            *values.tail.stride()[:3],
            page_table.stride(0),
            *((0, 0, 0, 0) if mask is None else _mask_strides(mask)),
        )
        self._decode: Variant | None = None
        self._combine: Variant | None = None

    def __call__(
        self,
        query: torch.Tensor,
        lengths: torch.Tensor,
        scale: float,
        mask: torch.Tensor | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """The attention; arguments as of ``ops.paged_attention``."""
        plan, kernels = self._plan, self._kernels
        rotated = rotate(query) if kernels.rotated else query
        seen = lengths if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        inputs = (
            query,
            rotated,
            *self._pages,
            lengths,
            seen,
            float(scale),  # an integer would be another kernel
            0.0 if softcap is None else float(softcap),
            *plan.counts,
        )
        if not plan.splits:
            plan.settle((query.new_empty(1, dtype=torch.float32), 0, *inputs, 1, *self._strides))
        partial = query.new_empty(plan.scratch, dtype=torch.float32)
        out = query.new_empty(plan.out)
        state_at, splits = plan.state_at, plan.splits
        sinks = partial if sinks is None else sinks
        args = (partial, state_at, *inputs, splits, *self._strides)
        merged = (out, partial, state_at, sinks, *plan.counts, splits, *plan.out_strides)
        grid = (plan.programs, splits, 1)
        if aligned(partial, query, rotated, lengths, seen, out, sinks):
            direct = nobody_watches()
            self._decode = kernels.decode(grid, args, self._decode, direct)
            self._combine = kernels.combine(plan.combine_grid, merged, self._combine, direct)
        else:
            kernels.decode(grid, args)
            kernels.combine(plan.combine_grid, merged)
        return out


def _mask_strides(mask: torch.Tensor) -> list[int]:
    """Strides of a mask, 0 where one entry stands for all."""
    return [0 if size == 1 else stride for size, stride in zip(mask.shape[:3], mask.stride(), strict=False)] + [
        mask.stride(3)
    ]


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
    where = None if keys.is_cuda else compiled_for(keys)
    key = ("append", keys.shape, keys.stride(), keys.dtype, values.stride(), values.dtype, where)
    calls = key_side.__dict__.setdefault("calls", {})
    call = calls.get(key)
    if call is None or call.values is not value_side or call.page_table is not page_table:
        call = AppendCall(keys, values, key_side, value_side, page_table)
        _keep(calls, key, call)
    call(keys, values, lengths, new_lengths)


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
    if query.shape[2] >= MANY_QUERIES:
        return _many(query, keys, values, page_table, lengths, scale, causal, mask, softcap, sinks, window)
    key = (
        query.shape,
        query.stride(),
        query.dtype,
        None if mask is None else (mask.dtype, mask.shape, mask.stride()),
        causal,
        softcap is None,
        None if sinks is None else sinks.dtype,
        window,
        overridden(),
        None if query.is_cuda else compiled_for(query),
    )
    calls = keys.__dict__.setdefault("calls", {})
    call = calls.get(key)
    if call is None or call.values is not values or call.page_table is not page_table:
        plan = attention_plan(query, keys, values, page_table, mask, causal, window, softcap is not None, sinks)
        call = AttentionCall(plan, query, keys, values, page_table, mask)
        _keep(calls, key, call)
    return call(query, lengths, scale, mask, softcap, sinks)


def _many(
    query: torch.Tensor,
    keys: PagedSide,
    values: PagedSide,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    window: int,
) -> torch.Tensor:
    """``paged_attention_triton`` for many queries."""
    k, v = keys.codec.kernel, values.codec.kernel
    assert k is not None and v is not None, "choose() lets no other codec through"
    planes = list(keys.planes), list(values.planes)
    rotated = keys.codec.rotated, values.codec.rotated
    first = keys.first, values.first, keys.first_at
    pages = PackedPages(k, v, *planes, keys.tail, values.tail, *rotated, page_table, lengths, *first)
    out = query.new_empty(*query.shape[:3], values.head_dim)
    chunk_attention(out, query, pages, mask, sinks, scale=scale, causal=causal, window=window, softcap=softcap)
    return out


def _keep(calls: dict[object, object], key: object, call: object) -> None:
    if len(calls) >= _MOST_CALLS:
        calls.clear()
    calls[key] = call
