"""Append and attention over packed pages by Triton kernels.

Append is one launch, attention three at most: rotate the query, ``decode``, ``combine``.
"""

import torch

from .append import append
from .pages import PagedSide
from .plan import attention_plan
from .rotate import rotate


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
        key_side.planes,
        value_side.planes,
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
    """``ops.paged_attention``, which see.

    Scratch memory, float32: ``partial`` ``[batch, heads, splits + 1, rows, columns]``, the accumulator of each split
    and of the open page, and ``state`` ``[.., rows, 2]``, its maximum (base 2) and sum.
    """
    if query.stride(-1) != 1:
        query = query.contiguous()
    if mask is not None and mask.stride(-1) not in (0, 1):
        mask = mask.contiguous()
    plan = attention_plan(query, keys, values, page_table, mask, causal, window, softcap is not None, sinks)
    kernels, splits = plan.kernels, plan.splits
    batch, query_heads, queries, _ = query.shape
    key_tail, value_tail = keys.tail, values.tail
    heads, value_dim = value_tail.shape[1], value_tail.shape[3]
    rotated = rotate(query) if kernels.rotated else query
    seen, *mask_strides = (lengths, 0, 0, 0, 0) if mask is None else _broadcast(mask)
    inputs = (
        query,
        rotated,
        kernels.keys.arguments(keys.planes, heads),
        kernels.values.arguments(values.planes, heads),
        key_tail,
        value_tail,
        page_table,
        lengths,
        seen,
        float(scale),
        0.0 if softcap is None else float(softcap),
        heads,
        queries,
    )
    strides = (
        *query.stride()[:3],
        *rotated.stride()[:3],
        *key_tail.stride()[:3],
        *value_tail.stride()[:3],
        page_table.stride(0),
        *mask_strides,
    )
    rows = query_heads // heads * queries
    if not splits:
        scratch = query.new_empty(1, dtype=torch.float32)
        plan.settle((scratch, scratch, *inputs, 1, *strides))
        splits = plan.splits
    partial = query.new_empty((batch, heads, splits + 1, rows, kernels.columns), dtype=torch.float32)
    state = query.new_empty((batch, heads, splits + 1, rows, 2), dtype=torch.float32)
    out = query.new_empty((batch, query_heads, queries, value_dim))
    kernels.decode((plan.programs, splits + 1, 1), partial, state, *inputs, splits, *strides)
    kernels.combine(
        plan.combine_grid,
        out,
        partial,
        state,
        state if sinks is None else sinks,
        heads,
        queries,
        splits,
        *out.stride()[:3],
    )
    return out


def _broadcast(mask: torch.Tensor) -> tuple[torch.Tensor, int, int, int, int]:
    """A mask as kernels read it, and its strides, 0 where one entry stands for all."""
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    strides[3] = mask.stride(3)
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask, *strides)  # type: ignore[return-value]
