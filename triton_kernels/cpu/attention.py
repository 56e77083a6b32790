"""Attention over packed pages by the compiled kernels: how the work is cut, and the call."""

from functools import partial

import torch

from ..pages import PagedSide
from .native import ATTENTION, DTYPES, held_side, library

ROWS = 64  # rows per item of work, attention.h
_SPLITS_PER_THREAD = 4  # more than one, so that a thread that was held up does not hold up the others
_PAGES_PER_SPLIT = 4  # at least so many: a split costs as much as half a page
# Elements of keys and values per thread below which another thread costs more than it saves.
_ELEMENTS_PER_THREAD = 1 << 16


def split_count(items: int, pages: int, threads: int) -> int:
    """Parts into which the pages of each sequence and head are cut."""
    if threads == 1:
        return 1
    return max(1, min(-(-threads * _SPLITS_PER_THREAD // items), pages // _PAGES_PER_SPLIT))


def paged_attention_cpu(
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
    latent: bool = False,
) -> torch.Tensor:
    """``ops.paged_attention``, which see; planes are contiguous.

    With ``latent`` it is ``latent.latent_attention_reference``: keys are latents, which are summed too, and values the
    rotary keys beside them.
    """
    compiled = library()
    if query.stride(3) != 1:
        query = query.contiguous()
    batch, query_heads, queries, _ = query.shape
    heads, summed = values.tail.shape[1], keys if latent else values
    out = query.new_empty(batch, query_heads, queries, summed.tail.shape[3])
    mask_members: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    if mask is not None:
        if mask.dtype not in DTYPES:
            mask = mask.float()
        strides = (stride if size > 1 else 0 for size, stride in zip(mask.shape[:3], mask.stride(), strict=False))
        mask_members = (mask.data_ptr(), DTYPES[mask.dtype], *strides, mask.stride(3))
    if sinks is not None:
        sinks = sinks.float().contiguous()
    pages = page_table.shape[1]
    width = keys.tail.shape[3] + values.tail.shape[3]
    elements = batch * heads * pages * keys.page_size * width * -(-queries // 4)
    threads = max(1, min(torch.get_num_threads(), elements // _ELEMENTS_PER_THREAD))
    rows = query_heads // heads * queries
    call = ATTENTION.pack(
        query.data_ptr(),
        DTYPES[query.dtype],
        *query.stride()[:3],
        out.data_ptr(),
        batch,
        heads,
        query_heads // heads,
        queries,
        keys.page_size,
        page_table.data_ptr(),
        page_table.stride(0),
        lengths.data_ptr(),
        scale,
        softcap or 0.0,
        causal,
        window,
        *mask_members,
        0 if sinks is None else sinks.data_ptr(),
        0 if keys.first_at is None else keys.first_at.data_ptr(),
        0 if keys.first is None else keys.first.shape[2],
        latent,
        threads,
        split_count(batch * heads * -(-rows // ROWS), pages, threads),
        compiled.fork,
    )
    compiled.attend(call + held_side(keys) + held_side(values))
    return out


latent_attention_cpu = partial(paged_attention_cpu, latent=True)
