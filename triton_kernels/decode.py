"""Attention of few or many queries over packed pages and the open page: split-KV flash decoding.

One program serves one key/value head of one sequence, one block of rows, and one split of the pages; the query heads of
the group and the queries are the rows of ``tl.dot``, so every packed byte is loaded once per row block.  Scales stay
outside of the product (``codecs/base.py``): per-channel ones multiply the query once per page, per-token ones multiply
scores and probabilities.  The program of the last split, which has fewer pages, takes the open page after them, as a
result of its own, and the first tokens that are read as they came: packed values may be in another domain.  Each split,
and the open page, leaves

    accumulator [rows, columns] float32, maximum and sum [rows] float32 (base 2), these from ``state_at`` on

and ``combine.py`` merges them, rotating packed values back once per row.  Many queries are attended to in another way
(``chunk.py``).
"""

from typing import Any

import torch

from .codecs.jit import KernelCodec
from .launch import OPEN_COST, LaunchConfig
from .ptx import program_again
from .target import tl, triton
from .tile_math import first_tokens, hide_tokens, online_softmax, ordered_query, scores_to_base2
from .unpack import part_channels

# Tables of queries begin at a multiple of so many numbers.
TABLE_UNIT = tl.constexpr(16)


@triton.jit
def _seen_pages(
    row_block,
    queries,
    sealed,
    tail,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    PAGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """First sealed page that a row of the block may see, and the end of these pages: the others are not read."""
    first, end = 0, sealed
    if CAUSAL or WINDOW > 0:
        first_row = row_block * ROWS
        rows = tl.minimum(ROWS, GROUP * queries - first_row)
        # Rows are query heads, each with its queries: a block within one head has consecutive queries.
        within = first_row % queries + rows <= queries
        first_query = tl.where(within, first_row % queries, 0)
        last_query = tl.where(within, first_query + rows, queries) - 1
        before = sealed * PAGE + tail - queries  # tokens before the first query
        if CAUSAL:
            end = tl.minimum(sealed, tl.maximum(before + last_query + PAGE, 0) // PAGE)
        if WINDOW > 0:
            first = tl.maximum(before + first_query + 1 - WINDOW, 0) // PAGE
    return first, end


@triton.jit
def _store_state(state_ptr, first_row, row, maximum, total, row_exists):
    """Write maxima and sums ``[ROWS]`` of the rows ``first_row + row``."""
    pointers = state_ptr + first_row * 2 + row * 2
    tl.store(pointers, maximum, mask=row_exists)
    tl.store(pointers + 1, total, mask=row_exists)


@triton.jit
def _exact_tokens(
    gathered,
    running_max,
    running_sum,
    query,
    k_ptr,
    v_ptr,
    stride_k_n,
    stride_v_n,
    start,
    first_token,
    count,
    hidden,
    hidden_end,
    query_position,
    mask_rows,
    stride_mask_n,
    row_exists,
    scale,
    softcap,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    HIDDEN: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    SHARED_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend to TOKENS tokens from ``start`` on of ``count`` that begin at the position ``first_token``, with keys and
    values at ``k_ptr`` and ``v_ptr``; with HIDDEN not to those from ``hidden`` to ``hidden_end``.

    Returns values gathered ``[VALUE_COLUMNS, ROWS]``, maxima and sums ``[ROWS]``.
    """
    offs_k = tl.arange(0, KEY_COLUMNS)
    offs_v = tl.arange(0, VALUE_COLUMNS)
    offs_t = tl.arange(0, TOKENS)
    held = start + offs_t < count
    # With ``start`` in each offset: offsets that are the same in a loop would fill the registers of all of it.
    k_pointers = k_ptr + (start + offs_t)[:, None] * stride_k_n + offs_k[None, :]
    k = tl.load(k_pointers, mask=held[:, None] & (offs_k < KEY_DIM)[None, :], other=0.0)
    logits = scores_to_base2(
        tl.dot(k, query.to(k.dtype), input_precision=PRECISION),  # [TOKENS, ROWS]
        offs_t,
        first_token + start,
        count - start,
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
        SHARED_MASK,
    )
    if HIDDEN:
        logits = hide_tokens(logits, first_token + start + offs_t, hidden, hidden_end)
    weights, decay, running_max, running_sum = online_softmax(logits, running_max, running_sum)
    v_pointers = v_ptr + (start + offs_t)[:, None] * stride_v_n + offs_v[None, :]
    v = tl.load(v_pointers, mask=held[:, None] & (offs_v < VALUE_DIM)[None, :], other=0.0)
    product = tl.dot(tl.trans(v), weights.to(v.dtype), input_precision=PRECISION)
    return gathered * decay[None, :] + product, running_max, running_sum  # [VALUE_COLUMNS, ROWS]


# Numbers that change while a cache grows must not make new kernels.
_NOT_SPECIALIZED = (
    "state_at",
    "queries",
    "splits",
    "stride_table_b",
    "stride_mask_b",
    "stride_mask_h",
    "stride_mask_q",
)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _decode_kernel(
    partial_ptr,
    state_at,
    query_ptr,
    rotated_query_ptr,
    k_planes,
    v_planes,
    k_tail_ptr,
    v_tail_ptr,
    k_first_ptr,
    v_first_ptr,
    first_at_ptr,
    table_ptr,
    lengths_ptr,
    mask_ptr,
    scale,
    softcap,
    heads,
    queries,
    splits,
    stride_query_b,
    stride_query_h,
    stride_query_q,
    stride_rotated_b,
    stride_rotated_h,
    stride_rotated_q,
    stride_k_tail_b,
    stride_k_tail_h,
    stride_k_tail_n,
    stride_v_tail_b,
    stride_v_tail_h,
    stride_v_tail_n,
    stride_table_b,
    stride_mask_b,
    stride_mask_h,
    stride_mask_q,
    stride_mask_n,
    K_TILE: tl.constexpr,
    K_CHANNELS: tl.constexpr,
    K_HAS: tl.constexpr,
    K_PARTS: tl.constexpr,
    K_FIELDS: tl.constexpr,
    K_WORDS: tl.constexpr,
    K_DTYPE: tl.constexpr,
    K_UNIT: tl.constexpr,
    K_LEVELS: tl.constexpr,
    K_ORDER: tl.constexpr,
    K_NARROW: tl.constexpr,
    V_TILE: tl.constexpr,
    V_CHANNELS: tl.constexpr,
    V_HAS: tl.constexpr,
    V_PARTS: tl.constexpr,
    V_FIELDS: tl.constexpr,
    V_WORDS: tl.constexpr,
    V_DTYPE: tl.constexpr,
    V_UNIT: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    SHARED_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    STAGES: tl.constexpr,
    OPEN_COST: tl.constexpr,
):
    """Grid: (batch * heads * row blocks, splits).

    ``*_HAS`` = (token_scale, token_offset, channel_scale, channel_offset), each a flag; ``*_UNIT`` is what levels are
    to be multiplied by; KEY_COLUMNS and VALUE_COLUMNS are padded widths of the open page; FIRST tokens of each
    sequence are read as they came, or 0.  Tiles have tokens or channels first and the rows of the queries second: with
    few rows, that wastes least of a tensor core.
    """
    # The way of a scaled query into the layout of an operand may meet barriers, and where there are many, levels that
    # wait for them do not fit in the registers.
    SCALE_FIRST: tl.constexpr = K_HAS[2] and K_PARTS > 4
    ORDERED: tl.constexpr = K_ORDER is not None
    NORMALIZE: tl.constexpr = K_FIELDS > 0 and K_DTYPE == tl.float16
    TAIL: tl.constexpr = PAGE if PAGE < 32 else 32
    state_ptr = partial_ptr + state_at
    program = tl.program_id(0)
    split = splits - 1 - tl.program_id(1)  # the last one, which has the open page too, begins first
    row_blocks = tl.cdiv(GROUP * queries, ROWS)
    row_block = program % row_blocks
    head = (program // row_blocks) % heads
    batch = program // row_blocks // heads

    row = row_block * ROWS + tl.arange(0, ROWS)
    row_exists = row < GROUP * queries
    query_index = row % queries
    query_head = head * GROUP + row // queries
    sealed = tl.load(lengths_ptr + batch * 2)
    tail = tl.load(lengths_ptr + batch * 2 + 1)
    query_position = sealed * PAGE + tail - queries + query_index
    hidden, hidden_end = first_tokens(first_at_ptr, batch, PAGE, FIRST)

    running_max = tl.full([ROWS], float("-inf"), tl.float32)
    running_sum = tl.zeros([ROWS], tl.float32)
    offs_n = tl.arange(0, PAGE)
    mask_rows = mask_ptr + batch.to(tl.int64) * stride_mask_b
    if not SHARED_MASK:
        mask_rows = mask_rows + query_head.to(tl.int64) * stride_mask_h
        mask_rows = mask_rows + query_index.to(tl.int64) * stride_mask_q  # [ROWS]

    q = ()
    q_sum = tl.zeros([ROWS], tl.float32)
    row_largest = tl.zeros([ROWS], tl.float32)
    accumulator = ()
    for part in tl.static_range(K_PARTS):
        channel, mask_k = part_channels(part, KEY_DIM, K_FIELDS, K_WORDS)
        q_pointers = (
            rotated_query_ptr
            + batch.to(tl.int64) * stride_rotated_b
            + query_head.to(tl.int64)[None, :] * stride_rotated_h
        )
        q_pointers = q_pointers + query_index.to(tl.int64)[None, :] * stride_rotated_q + channel[:, None]
        q_part = tl.load(q_pointers, mask=mask_k[:, None] & row_exists[None, :], other=0.0)  # [K_WORDS, ROWS]
        q = q + (q_part.to(tl.float32),)
        q_sum += tl.sum(q[part], 0)
        if NORMALIZE:
            row_largest = tl.maximum(row_largest, tl.max(tl.abs(q[part]), 0))
    row_scale = scale
    if NORMALIZE:
        # fp16 ends at 65504, which a query, or its product with a channel's scale, may pass: the power of two above
        # the largest number of a row stays outside.  Subnormal numbers lose what is below 2^-24 of that one.
        exponent = tl.minimum(row_largest.to(tl.int32, bitcast=True) >> 23, 252)
        normalizer = ((253 - exponent) << 23).to(tl.float32, bitcast=True)
        normalized = ()
        for part in tl.static_range(K_PARTS):
            q_part = q[part] * normalizer[None, :]
            if not ORDERED:
                q_part = q_part.to(rotated_query_ptr.dtype.element_ty)
            normalized = normalized + (q_part,)
        q = normalized
        q_sum = q_sum * normalizer
        row_scale = scale * ((exponent + 1) << 23).to(tl.float32, bitcast=True)[None, :]
    if ORDERED:
        # Each page has an order of its own for its channels, in which the query is read anew: from a table of the
        # program's own, where the rows of a channel are side by side.  Tables begin behind the states.
        tables = state_at + tl.num_programs(0) // row_blocks * (splits + 1) * (GROUP * queries) * 2
        query_table = partial_ptr + tl.cdiv(tables, TABLE_UNIT).to(tl.int64) * TABLE_UNIT
        query_table = query_table.to(tl.pointer_type(K_DTYPE))
        query_table += (tl.program_id(1) * tl.num_programs(0) + program).to(tl.int64) * (KEY_DIM * ROWS)
        for part in tl.static_range(K_PARTS):
            channel, mask_k = part_channels(part, KEY_DIM, K_FIELDS, K_WORDS)
            pointers = query_table + channel[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
            tl.store(pointers, q[part].to(K_DTYPE), mask=mask_k[:, None])  # [K_WORDS, ROWS]
        tl.debug_barrier()
    for _ in tl.static_range(V_PARTS):
        accumulator = accumulator + (tl.zeros([V_WORDS, ROWS], tl.float32),)
    table_ptr += batch.to(tl.int64) * stride_table_b

    first_page, end_page = _seen_pages(row_block, queries, sealed, tail, GROUP, ROWS, PAGE, CAUSAL, WINDOW)
    # The open page counts for a few packed ones in the share of the last split.
    per_split = tl.cdiv(tl.maximum(end_page - first_page, 0) + OPEN_COST, splits)
    first_page += split * per_split
    end_page = tl.minimum(first_page + per_split, end_page)
    # The page after this one is looked up by hand: were its number loaded in the loop that copies it, the compiler
    # would load numbers ahead and no pages.
    page_id = tl.load(table_ptr + first_page, mask=first_page < end_page, other=0)
    for page_index in tl.range(first_page, end_page, num_stages=STAGES):
        page_head = page_id.to(tl.int64) * heads + head
        page_id = tl.load(table_ptr + tl.minimum(page_index + 1, end_page - 1))

        if ORDERED:
            order = K_ORDER(k_planes, page_head, KEY_DIM, K_FIELDS, K_WORDS)
            channel_scale, channel_offset = K_NARROW(k_planes, page_head, KEY_DIM, K_FIELDS, K_WORDS, K_DTYPE, PTX)
            operands, shift = ordered_query(
                query_table, order, channel_scale, channel_offset, K_PARTS, K_LEVELS, ROWS, K_WORDS, PRECISION
            )
        elif SCALE_FIRST:
            channel_scale, channel_offset = K_CHANNELS(k_planes, page_head, KEY_DIM, K_FIELDS, K_WORDS)
            operands = ()
            for part in tl.static_range(K_PARTS):
                operands = operands + ((q[part] * channel_scale[part][:, None]).to(K_DTYPE),)
        levels, token_scale, token_offset = K_TILE(
            k_planes, page_head, offs_n, KEY_DIM, PAGE, K_FIELDS, K_WORDS, K_DTYPE, False, PTX
        )
        if not (SCALE_FIRST or ORDERED):
            channel_scale, channel_offset = K_CHANNELS(k_planes, page_head, KEY_DIM, K_FIELDS, K_WORDS)
        scores = tl.zeros([PAGE, ROWS], tl.float32)
        for part in tl.static_range(K_LEVELS):
            if SCALE_FIRST or ORDERED:
                scaled = operands[part]
            elif K_HAS[2]:
                scaled = (q[part] * channel_scale[part][:, None]).to(K_DTYPE)
            else:
                scaled = q[part].to(K_DTYPE)
            scores = tl.dot(levels[part], scaled, scores, input_precision=PRECISION)  # [PAGE, ROWS]
        if K_HAS[0]:
            scores = scores * (token_scale * K_UNIT)[:, None]
        elif K_UNIT != 1.0:
            scores = scores * K_UNIT
        if K_HAS[1]:
            scores = scores + q_sum[None, :] * token_offset[:, None]
        if ORDERED:
            scores = scores + shift[None, :]
        elif K_HAS[3]:
            shift = q[0] * channel_offset[0][:, None]
            for part in tl.static_range(1, K_PARTS):
                shift += q[part] * channel_offset[part][:, None]
            scores = scores + tl.sum(shift, 0)[None, :]

        logits = scores_to_base2(
            scores,
            offs_n,
            page_index * PAGE,
            None,
            query_position,
            mask_rows,
            stride_mask_n,
            row_exists,
            row_scale,
            softcap,
            CAUSAL,
            WINDOW,
            SOFTCAP,
            MASK,
            SHARED_MASK,
        )
        if FIRST > 0:
            logits = hide_tokens(logits, page_index * PAGE + offs_n, hidden, hidden_end)
        weights, decay, running_max, running_sum = online_softmax(logits, running_max, running_sum)

        levels, token_scale, token_offset = V_TILE(
            v_planes, page_head, offs_n, VALUE_DIM, PAGE, V_FIELDS, V_WORDS, V_DTYPE, True, PTX
        )
        channel_scale, channel_offset = V_CHANNELS(v_planes, page_head, VALUE_DIM, V_FIELDS, V_WORDS)
        if V_HAS[0]:
            # Token scales reach into the subnormals of fp16; the page's largest is kept out of the product.
            largest = tl.maximum(tl.max(tl.abs(token_scale), 0), 1e-30)
            scaled = weights * (token_scale * (1.0 / largest))[:, None]
            unit = largest * V_UNIT
        else:
            scaled = weights
            unit = V_UNIT
        scaled = scaled.to(V_DTYPE)
        total_offset = tl.zeros([ROWS], tl.float32)
        if V_HAS[1]:
            total_offset = tl.sum(weights * token_offset[:, None], 0)
        if V_HAS[3]:
            total = tl.sum(weights, 0)
        added = ()
        for part in tl.static_range(V_PARTS):
            product = tl.dot(levels[part], scaled, input_precision=PRECISION)  # [V_WORDS, ROWS]
            if V_HAS[2]:
                product = product * channel_scale[part][:, None]
            if V_HAS[0] or V_UNIT != 1.0:
                product = product * unit
            if V_HAS[1]:
                product = product + total_offset[None, :]
            if V_HAS[3]:
                product = product + total[None, :] * channel_offset[part][:, None]
            added = added + (accumulator[part] * decay[None, :] + product,)
        accumulator = added

    if PTX and STAGES > 1 and K_FIELDS > 0:  # unpacking a page while the next one is copied takes all registers
        again = program_again(0)
        split = splits - 1 - program_again(1)
        row = again % row_blocks * ROWS + tl.arange(0, ROWS)
        row_exists = row < GROUP * queries
        head = (again // row_blocks) % heads
        batch = again // row_blocks // heads
    first_row = ((batch.to(tl.int64) * heads + head) * (splits + 1) + split) * (GROUP * queries)
    for part in tl.static_range(V_PARTS):
        channel, mask_v = part_channels(part, VALUE_DIM, V_FIELDS, V_WORDS)
        out_pointers = partial_ptr + first_row * VALUE_COLUMNS + row[None, :] * VALUE_COLUMNS + channel[:, None]
        tl.store(out_pointers, accumulator[part], mask=mask_v[:, None] & row_exists[None, :])  # [V_WORDS, ROWS]
    _store_state(state_ptr, first_row, row, running_max, running_sum, row_exists)
    if split == splits - 1:
        # A part at a time, so that it is the loop over packed pages that decides how much shared memory a program has.
        query_index = row % queries
        query_head = head * GROUP + row // queries
        sealed = tl.load(lengths_ptr + batch * 2)
        tail = tl.load(lengths_ptr + batch * 2 + 1)
        query_position = sealed * PAGE + tail - queries + query_index
        mask_rows = mask_ptr + batch.to(tl.int64) * stride_mask_b
        if not SHARED_MASK:
            mask_rows = mask_rows + query_head.to(tl.int64) * stride_mask_h
            mask_rows = mask_rows + query_index.to(tl.int64) * stride_mask_q  # [ROWS]
        running_max = tl.full([ROWS], float("-inf"), tl.float32)
        running_sum = tl.zeros([ROWS], tl.float32)
        hidden, hidden_end = first_tokens(first_at_ptr, batch, PAGE, FIRST)
        offs_k = tl.arange(0, KEY_COLUMNS)
        offs_v = tl.arange(0, VALUE_COLUMNS)
        query_pointers = query_ptr + batch.to(tl.int64) * stride_query_b
        query_pointers = query_pointers + query_head.to(tl.int64)[None, :] * stride_query_h
        query_pointers = query_pointers + query_index.to(tl.int64)[None, :] * stride_query_q + offs_k[:, None]
        q_mask = (offs_k < KEY_DIM)[:, None] & row_exists[None, :]
        query = tl.load(query_pointers, mask=q_mask, other=0.0)  # [KEY_COLUMNS, ROWS]
        k_tail_ptr += batch.to(tl.int64) * stride_k_tail_b + head * stride_k_tail_h
        v_tail_ptr += batch.to(tl.int64) * stride_v_tail_b + head * stride_v_tail_h
        gathered = tl.zeros([VALUE_COLUMNS, ROWS], tl.float32)
        for start in tl.range(0, tail, TAIL, num_stages=1):
            gathered, running_max, running_sum = _exact_tokens(
                gathered,
                running_max,
                running_sum,
                query,
                k_tail_ptr,
                v_tail_ptr,
                stride_k_tail_n,
                stride_v_tail_n,
                start,
                sealed * PAGE,
                tail,
                hidden,
                hidden_end,
                query_position,
                mask_rows,
                stride_mask_n,
                row_exists,
                scale,
                softcap,
                KEY_DIM,
                VALUE_DIM,
                KEY_COLUMNS,
                VALUE_COLUMNS,
                TAIL,
                FIRST,
                CAUSAL,
                WINDOW,
                SOFTCAP,
                MASK,
                SHARED_MASK,
                PRECISION,
            )
        if FIRST > 0:
            first_head = (batch.to(tl.int64) * heads + head) * FIRST
            for start in tl.static_range(0, FIRST, TAIL):
                gathered, running_max, running_sum = _exact_tokens(
                    gathered,
                    running_max,
                    running_sum,
                    query,
                    k_first_ptr + first_head * KEY_DIM,
                    v_first_ptr + first_head * VALUE_DIM,
                    KEY_DIM,
                    VALUE_DIM,
                    start,
                    hidden,
                    hidden_end - hidden,
                    0,
                    0,
                    query_position,
                    mask_rows,
                    stride_mask_n,
                    row_exists,
                    scale,
                    softcap,
                    KEY_DIM,
                    VALUE_DIM,
                    KEY_COLUMNS,
                    VALUE_COLUMNS,
                    TAIL,
                    0,
                    CAUSAL,
                    WINDOW,
                    SOFTCAP,
                    MASK,
                    SHARED_MASK,
                    PRECISION,
                )
        first_row = ((batch.to(tl.int64) * heads + head) * (splits + 1) + splits) * (GROUP * queries)
        tail_pointers = partial_ptr + first_row * VALUE_COLUMNS + row[:, None] * VALUE_COLUMNS + offs_v[None, :]
        tl.store(tail_pointers, tl.trans(gathered), mask=row_exists[:, None])  # [ROWS, VALUE_COLUMNS]
        _store_state(state_ptr, first_row, row, running_max, running_sum, row_exists)


def decode_constants(
    keys: KernelCodec,
    values: KernelCodec,
    dtype: torch.dtype,
    ptx: bool,
    dims: tuple[int, int],
    page_size: int,
    group: int,
    columns: int,
    config: LaunchConfig,
    *,
    first: int,
    causal: bool,
    window: int,
    softcap: bool,
    mask: int,
    shared_mask: bool,
) -> dict[str, Any]:
    """The constants of ``_decode_kernel``, and how it is launched.

    Args:
        keys, values: codecs as kernels see them.
        dtype: the model's.
        ptx: whether it is compiled for an NVIDIA GPU.
        dims: head_dim of keys and of values.
        page_size: tokens of a page.
        group: query heads per key/value head.
        columns: width of ``partial``: ``dims[1]`` padded to a power of two, 16 at least.
        config: how to launch.
        first: tokens of each sequence that are read as they came.
        causal: whether the causal rule hides anything.
        window: tokens that a query sees; 0 for all.
        softcap: whether there is one.
        mask: 0 for none, 1 for a bool mask, 2 for one that is added.
        shared_mask: whether all rows have the same row of the mask.
    """
    key_dim, value_dim = dims
    ptx = ptx and dtype != torch.float32
    return {
        # A product of tensor cores sums over 16 elements at least.
        **keys.constants("K", key_dim, dtype, ptx, least=16),
        **values.constants("V", value_dim, dtype, ptx),
        "K_LEVELS": keys.levels,
        "K_ORDER": keys.order,
        "K_NARROW": keys.narrow_channels,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "KEY_COLUMNS": max(16, triton.next_power_of_2(key_dim)),
        "VALUE_COLUMNS": columns,
        "GROUP": group,
        "PAGE": page_size,
        "FIRST": first,
        "ROWS": config.rows,
        "CAUSAL": causal,
        "WINDOW": window,
        "SOFTCAP": softcap,
        "MASK": mask,
        "SHARED_MASK": shared_mask,
        "PRECISION": "ieee",
        "PTX": ptx,
        # Where addresses of copies are copied themselves, the compiler divides stages by two.
        "STAGES": config.stages if keys.order is None else 2 * config.stages - 1,
        "OPEN_COST": OPEN_COST,
        "num_warps": config.warps,
        **({"maxnreg": config.registers} if config.registers else {}),
        "enable_fp_fusion": True,  # later versions of Triton turn it off where nobody asks
    }
