"""Multiply out a block of pages, for queries so many that unpacking for each row block would cost more.

    dense[b, h, t] = x_hat of token first_page * PAGE + t,     t in [0, block pages x PAGE)

in the model's dtype and in the codec's own domain; the open page is copied to its place, and so are the first tokens
that are read as they came, rotated where packed pages are.  One program serves one page of one head of one sequence, of
keys or of values.
"""

from typing import NamedTuple

import torch

from . import launching
from .codecs.jit import KernelCodec
from .hadamard import hadamard_block
from .target import has_ptx, tl, triton
from .tile_math import first_tokens, hadamard_signs, round_saturating
from .unpack import part_channels


@triton.jit
def _store_page(
    out_ptr,
    planes,
    page_head,
    offs_n,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS: tl.constexpr,
    PARTS: tl.constexpr,
    FIELDS: tl.constexpr,
    WORDS: tl.constexpr,
    LEVELS: tl.constexpr,
    UNIT: tl.constexpr,
    CODED: tl.constexpr,
    CHANNEL_OF: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    PTX: tl.constexpr,
    FIRST: tl.constexpr,
    begin,
    end,
):
    """Multiply tokens of one packed page out, to rows of HEAD_DIM; with FIRST not those from ``begin`` to ``end``.

    ``CODED`` of its parts have levels."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    levels, token_scale, token_offset = TILE(
        planes, page_head, offs_n, HEAD_DIM, PAGE, FIELDS, WORDS, LEVELS, False, PTX
    )
    channel_scale, channel_offset = CHANNELS(planes, page_head, HEAD_DIM, FIELDS, WORDS)
    dense = ()
    for part in tl.static_range(PARTS):
        if part < CODED:
            x = levels[part].to(tl.float32)
            if UNIT != 1.0:
                x = x * UNIT
            if HAS[2]:
                x = x * channel_scale[part][None, :]
        else:
            x = tl.zeros([offs_n.shape[0], WORDS], tl.float32)
        if HAS[0]:
            x = x * token_scale[:, None]
        if HAS[1]:
            x = x + token_offset[:, None]
        if HAS[3]:
            x = x + channel_offset[part][None, :]
        x = round_saturating(x, DTYPE)
        dense = dense + (x,)  # type: ignore[assignment]  # a tuple of another length is another type for Triton too
    if FIELDS == 0:
        offs_d, exists = part_channels(0, HEAD_DIM, FIELDS, WORDS)
        mask = exists[None, :]
        if FIRST > 0:
            mask = mask & _outside(offs_n, begin, end)
        tl.store(out_ptr + offs_n[:, None] * HEAD_DIM + offs_d[None, :], x, mask=mask)
    else:
        WIDTH: tl.constexpr = HEAD_DIM // FIELDS
        within = tl.arange(0, 2 * WORDS)
        if CHANNEL_OF is not None:
            places = CHANNEL_OF(planes, page_head, HEAD_DIM, FIELDS, WORDS)
        for field in tl.static_range(FIELDS):
            # Two parts are every other channel of a field: side by side, they are stored as one run.
            x = tl.join(dense[2 * field], dense[2 * field + 1]).reshape(offs_n.shape[0], 2 * WORDS)
            if CHANNEL_OF is None:
                channel = field * WIDTH + within
            else:
                channel = tl.join(places[2 * field], places[2 * field + 1]).reshape(2 * WORDS)
            pointers = out_ptr + offs_n[:, None] * HEAD_DIM + channel[None, :]
            mask = (within < WIDTH)[None, :]
            if FIRST > 0:
                mask = mask & _outside(offs_n, begin, end)
            tl.store(pointers, x, mask=mask)


@triton.jit
def _outside(offs_n, begin, end):
    """Rows that are not among those from ``begin`` to ``end``, ``[N, 1]``."""
    return ((offs_n < begin) | (offs_n >= end))[:, None]


@triton.jit
def _store_tail(
    out_ptr,
    tail_ptr,
    offs_n,
    tail,
    stride_tail_n,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ORDER: tl.constexpr,
    FIRST: tl.constexpr,
    begin,
    end,
):
    """Copy ``tail`` tokens of the open page, rotated in blocks of ORDER if that is not 0; zeros after them.  With FIRST
    not to the rows from ``begin`` to ``end``; with FIRST < 0 to these alone."""
    offs_d = tl.arange(0, COLUMNS)
    held, exists = (offs_n < tail)[:, None], (offs_d < HEAD_DIM)[None, :]
    if FIRST < 0:
        held = held & (offs_n >= begin)[:, None]
        exists = exists & held
    elif FIRST > 0:
        exists = exists & _outside(offs_n, begin, end)
    if ORDER > 0:
        SLICE: tl.constexpr = 16 if HEAD_DIM <= 16 else 32
        x = tl.zeros([offs_n.shape[0], COLUMNS], tl.float32)
        for first in range(0, HEAD_DIM, SLICE):
            offs_s = first + tl.arange(0, SLICE)
            pointers = tail_ptr + offs_n[:, None] * stride_tail_n + offs_s[None, :]
            rows = tl.load(pointers, mask=held & (offs_s < HEAD_DIM)[None, :], other=0.0)  # [PAGE, SLICE]
            signs = hadamard_signs(offs_s, offs_d, ORDER)  # [SLICE, COLUMNS]
            x = tl.dot(rows, signs.to(rows.dtype), x, input_precision="ieee")
        x = round_saturating(x * (ORDER**-0.5), out_ptr.dtype.element_ty)
    else:
        x = tl.load(tail_ptr + offs_n[:, None] * stride_tail_n + offs_d[None, :], mask=held & exists, other=0.0)
    tl.store(out_ptr + offs_n[:, None] * HEAD_DIM + offs_d[None, :], x, mask=exists)


@triton.jit(do_not_specialize=["first_page", "block_pages", "first_query", "last_query", "stride_table_b"])
def _dense_pages_kernel(
    keys_ptr,
    values_ptr,
    k_planes,
    v_planes,
    k_tail_ptr,
    v_tail_ptr,
    k_first_ptr,
    v_first_ptr,
    first_at_ptr,
    table_ptr,
    lengths_ptr,
    heads,
    first_page,
    block_pages,
    first_query,
    last_query,
    stride_k_tail_b,
    stride_k_tail_h,
    stride_k_tail_n,
    stride_v_tail_b,
    stride_v_tail_h,
    stride_v_tail_n,
    stride_table_b,
    K_TILE: tl.constexpr,
    K_CHANNELS: tl.constexpr,
    K_HAS: tl.constexpr,
    K_PARTS: tl.constexpr,
    K_FIELDS: tl.constexpr,
    K_WORDS: tl.constexpr,
    K_DTYPE: tl.constexpr,
    K_UNIT: tl.constexpr,
    K_LEVELS: tl.constexpr,
    K_CHANNEL_OF: tl.constexpr,
    K_COLUMNS: tl.constexpr,
    K_ORDER: tl.constexpr,
    V_TILE: tl.constexpr,
    V_CHANNELS: tl.constexpr,
    V_HAS: tl.constexpr,
    V_PARTS: tl.constexpr,
    V_FIELDS: tl.constexpr,
    V_WORDS: tl.constexpr,
    V_DTYPE: tl.constexpr,
    V_UNIT: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    V_ORDER: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIRST: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PTX: tl.constexpr,
):
    """Grid: (batch * heads, block pages, 2 for keys and values).  ``first_query`` and ``last_query`` are positions
    counted from the end: tokens - 1 is 0."""
    head = tl.program_id(0) % heads
    batch = tl.program_id(0) // heads
    page = first_page + tl.program_id(1)
    sealed = tl.load(lengths_ptr + batch * 2)
    tail = tl.load(lengths_ptr + batch * 2 + 1)
    wanted = page * PAGE < sealed * PAGE + tail
    if CAUSAL:
        wanted = wanted & (page * PAGE <= sealed * PAGE + tail - 1 - last_query)
    if WINDOW > 0:
        wanted = wanted & ((page + 1) * PAGE > sealed * PAGE + tail - first_query - WINDOW)
    offs_n = tl.arange(0, PAGE)
    place = (tl.program_id(0).to(tl.int64) * block_pages + tl.program_id(1)) * PAGE
    begin, end = first_tokens(first_at_ptr, batch, PAGE, FIRST)
    begin -= page * PAGE  # in this page
    end -= page * PAGE
    if wanted:
        if FIRST > 0:
            if (begin >= 0) & (begin < end) & (begin < PAGE):
                first_head = (batch.to(tl.int64) * heads + head) * FIRST - begin
                if tl.program_id(2) == 0:
                    k_first_ptr += first_head * KEY_DIM
                    k_out = keys_ptr + place * KEY_DIM
                    _store_tail(k_out, k_first_ptr, offs_n, end, KEY_DIM, KEY_DIM, K_COLUMNS, K_ORDER, -1, begin, end)
                else:
                    v_first_ptr += first_head * VALUE_DIM
                    v_out = values_ptr + place * VALUE_DIM
                    _store_tail(
                        v_out, v_first_ptr, offs_n, end, VALUE_DIM, VALUE_DIM, V_COLUMNS, V_ORDER, -1, begin, end
                    )
        if page < sealed:
            page_id = tl.load(table_ptr + batch.to(tl.int64) * stride_table_b + page)
            page_head = page_id.to(tl.int64) * heads + head
            if tl.program_id(2) == 0:
                _store_page(
                    keys_ptr + place * KEY_DIM,
                    k_planes,
                    page_head,
                    offs_n,
                    K_TILE,
                    K_CHANNELS,
                    K_HAS,
                    K_PARTS,
                    K_FIELDS,
                    K_WORDS,
                    K_DTYPE,
                    K_UNIT,
                    K_LEVELS,
                    K_CHANNEL_OF,
                    KEY_DIM,
                    PAGE,
                    PTX,
                    FIRST,
                    begin,
                    end,
                )
            else:
                _store_page(
                    values_ptr + place * VALUE_DIM,
                    v_planes,
                    page_head,
                    offs_n,
                    V_TILE,
                    V_CHANNELS,
                    V_HAS,
                    V_PARTS,
                    V_FIELDS,
                    V_WORDS,
                    V_DTYPE,
                    V_UNIT,
                    V_PARTS,
                    None,
                    VALUE_DIM,
                    PAGE,
                    PTX,
                    FIRST,
                    begin,
                    end,
                )
        else:
            if tl.program_id(2) == 0:
                k_tail_ptr += batch.to(tl.int64) * stride_k_tail_b + head * stride_k_tail_h
                k_out = keys_ptr + place * KEY_DIM
                _store_tail(
                    k_out, k_tail_ptr, offs_n, tail, stride_k_tail_n, KEY_DIM, K_COLUMNS, K_ORDER, FIRST, begin, end
                )
            else:
                v_tail_ptr += batch.to(tl.int64) * stride_v_tail_b + head * stride_v_tail_h
                v_out = values_ptr + place * VALUE_DIM
                _store_tail(
                    v_out, v_tail_ptr, offs_n, tail, stride_v_tail_n, VALUE_DIM, V_COLUMNS, V_ORDER, FIRST, begin, end
                )


class PackedPages(NamedTuple):
    """Packed pages as ``dense_pages`` takes them.

    Args:
        keys, values: codecs as kernels see them.
        key_planes, value_planes: planes of all pages, ``[pages, heads, ...]`` contiguous.
        key_tail, value_tail: open pages ``[batch, heads, page_size, dim]``, last dimension contiguous.
        key_rotated, value_rotated: whether the packed pages are.
        page_table: int32 ``[batch, pages]``.
        lengths: int32 ``[batch, 2]``: sealed pages and tokens in the open page of each sequence, on the device.
        key_first, value_first, first_at: the tokens that are read as they came, see ``PagedSide``; None for none.
    """

    keys: KernelCodec
    values: KernelCodec
    key_planes: list[torch.Tensor]
    value_planes: list[torch.Tensor]
    key_tail: torch.Tensor
    value_tail: torch.Tensor
    key_rotated: bool
    value_rotated: bool
    page_table: torch.Tensor
    lengths: torch.Tensor
    key_first: torch.Tensor | None = None
    value_first: torch.Tensor | None = None
    first_at: torch.Tensor | None = None


def dense_pages(
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: PackedPages,
    *,
    first_page: int,
    queries: tuple[int, int],
    causal: bool,
    window: int,
) -> None:
    """Multiply out ``keys`` ``[batch, heads, tokens, key_dim]`` and ``values`` ``[.., value_dim]``, both in the model's
    dtype: the tokens from ``first_page`` on.  What no query sees is not written, except in pages that one sees.

    Args:
        queries: how far the first and the last query that will read them are from the last token.
        causal, window: what these queries see.
    """
    batch, heads, tokens, key_dim = keys.shape
    value_dim, page_size, dtype = values.shape[3], pages.key_tail.shape[2], keys.dtype
    ptx = has_ptx(keys.device) and dtype != torch.float32
    k, v = pages.keys, pages.values
    launching.launch(
        _dense_pages_kernel,
        (batch * heads, tokens // page_size, 2),
        keys,
        values,
        k.arguments(pages.key_planes, heads),
        v.arguments(pages.value_planes, heads),
        pages.key_tail,
        pages.value_tail,
        *(pages.page_table if x is None else x for x in (pages.key_first, pages.value_first, pages.first_at)),
        pages.page_table,
        pages.lengths,
        heads,
        first_page,
        tokens // page_size,
        *queries,
        *pages.key_tail.stride()[:3],
        *pages.value_tail.stride()[:3],
        pages.page_table.stride(0),
        **k.constants("K", key_dim, dtype, ptx),
        **v.constants("V", value_dim, dtype, ptx),
        K_LEVELS=k.levels,
        K_CHANNEL_OF=k.channel_of,
        K_COLUMNS=max(16, triton.next_power_of_2(key_dim)),
        K_ORDER=hadamard_block(key_dim) if pages.key_rotated else 0,
        V_COLUMNS=max(16, triton.next_power_of_2(value_dim)),
        V_ORDER=hadamard_block(value_dim) if pages.value_rotated else 0,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        PAGE=page_size,
        FIRST=0 if pages.key_first is None else pages.key_first.shape[2],
        CAUSAL=causal,
        WINDOW=window,
        PTX=ptx,
        # Where products run without tensor cores, the rotation of the open page fills the registers of four warps.
        num_warps=8 if dtype == torch.float32 else 4,
        num_stages=1,
        enable_fp_fusion=True,
    )
