"""Attention of absorbed queries over latents (MLA) in packed pages and the open page: split-KV flash decoding.

One program serves one sequence, ROWS of its rows (query heads and their queries), and one split of the pages.  Latents
are keys and values at once, so a block of TOKENS tokens is multiplied out once, into scratch memory of the program (at
most 36 KiB in 16 bits, which stay in the caches of a multiprocessor), in the order of the channels whatever the codec
has; the rotary keys go beside it.  From there tensor cores read it twice, CHUNK channels at a time:

    scores   [TOKENS, ROWS]  =  latents [TOKENS, rank] . query [rank, ROWS]  +  rotary keys . rotary query
    gathered [rank, ROWS]   +=  latents^T . weights

Packed bytes are read once for all rows of a program.  The program of the last split takes the open page after its
pages, and the first tokens that are read as they came, as a result of its own: packed latents may be in another domain.
Splits leave what those of ``decode.py`` leave, and ``combine.py`` merges them.
"""

from typing import Any

import torch

from .codecs.jit import KernelCodec
from .dense_pages import _store_page
from .target import tl, triton
from .tile_math import first_tokens, hide_tokens, online_softmax, scores_to_base2


@triton.jit
def _score_chunks(
    scores,
    k_ptr,
    stride_k_n,
    q_pointers,
    row_exists,
    offs_t,
    held,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to ``scores`` ``[N, ROWS]`` the products of the tokens ``offs_t`` ``[N]`` at ``k_ptr``, those that are
    ``held``, with the queries at ``q_pointers`` ``[ROWS]``, ``DIM`` elements each."""
    offs_c = tl.arange(0, CHUNK)
    for start in tl.static_range(0, COLUMNS, CHUNK):
        exists = start + offs_c < DIM
        k_pointers = k_ptr + offs_t[:, None] * stride_k_n + (start + offs_c)[None, :]
        k = tl.load(k_pointers, mask=held[:, None] & exists[None, :], other=0.0)  # [N, CHUNK]
        q = tl.load(
            q_pointers[None, :] + (start + offs_c)[:, None], mask=exists[:, None] & row_exists[None, :], other=0.0
        )  # [CHUNK, ROWS]
        scores = tl.dot(k, q.to(k.dtype), scores, input_precision=PRECISION)
    return scores


@triton.jit
def _gather_chunks(
    gathered,
    weights,
    decay,
    v_ptr,
    stride_v_n,
    offs_t,
    held,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``gathered``, a tuple of ``[CHUNK, ROWS]``, times ``decay`` plus the tokens under ``weights`` ``[N, ROWS]``."""
    offs_c = tl.arange(0, CHUNK)
    added = ()
    for part in tl.static_range(COLUMNS // CHUNK):
        channel = part * CHUNK + offs_c
        v_pointers = v_ptr + offs_t[:, None] * stride_v_n + channel[None, :]
        v = tl.load(v_pointers, mask=held[:, None] & (channel < DIM)[None, :], other=0.0)  # [N, CHUNK]
        product = tl.dot(tl.trans(v), weights.to(v.dtype), input_precision=PRECISION)  # [CHUNK, ROWS]
        added = added + (gathered[part] * decay[None, :] + product,)  # type: ignore[assignment]
    return added


@triton.jit
def _store_parts(
    partial_ptr,
    state_ptr,
    first_row,
    row,
    row_exists,
    gathered,
    maximum,
    total,
    RANK: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write what a split leaves: accumulators, maxima and sums of the rows ``first_row + row``."""
    offs_c = tl.arange(0, CHUNK)
    for part in tl.static_range(COLUMNS // CHUNK):
        channel = part * CHUNK + offs_c
        pointers = partial_ptr + (first_row + row)[None, :] * COLUMNS + channel[:, None]
        tl.store(pointers, gathered[part], mask=(channel < RANK)[:, None] & row_exists[None, :])
    pointers = state_ptr + (first_row + row) * 2
    tl.store(pointers, maximum, mask=row_exists)
    tl.store(pointers + 1, total, mask=row_exists)


@triton.jit(
    do_not_specialize=[
        "state_at",
        "queries",
        "splits",
        "stride_table_b",
        "stride_mask_b",
        "stride_mask_h",
        "stride_mask_q",
    ]
)
def _latent_decode_kernel(
    partial_ptr,
    state_at,
    latent_scratch_ptr,
    rotary_scratch_ptr,
    query_ptr,
    domain_ptr,
    k_planes,
    r_planes,
    k_tail_ptr,
    r_tail_ptr,
    k_first_ptr,
    r_first_ptr,
    first_at_ptr,
    table_ptr,
    lengths_ptr,
    mask_ptr,
    scale,
    softcap,
    group,
    queries,
    splits,
    stride_query_b,
    stride_query_h,
    stride_query_q,
    stride_domain_b,
    stride_domain_h,
    stride_domain_q,
    stride_k_tail_b,
    stride_k_tail_n,
    stride_r_tail_b,
    stride_r_tail_n,
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
    K_CHANNEL_OF: tl.constexpr,
    R_TILE: tl.constexpr,
    R_CHANNELS: tl.constexpr,
    R_HAS: tl.constexpr,
    R_PARTS: tl.constexpr,
    R_FIELDS: tl.constexpr,
    R_WORDS: tl.constexpr,
    R_DTYPE: tl.constexpr,
    R_UNIT: tl.constexpr,
    R_LEVELS: tl.constexpr,
    R_CHANNEL_OF: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROPE_COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    SHARED_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """Grid: (batch * row blocks, splits).  ``query_ptr`` and ``domain_ptr``: queries of ``RANK + ROPE`` elements, as
    they are and in the domains of packed latents and packed rotary keys."""
    BLOCKS: tl.constexpr = PAGE // TOKENS
    state_ptr = partial_ptr + state_at
    program = tl.program_id(0)
    split = splits - 1 - tl.program_id(1)  # the last one, which has the open page too, begins first
    rows = group * queries
    row_blocks = tl.cdiv(rows, ROWS)
    row_block = program % row_blocks
    batch = program // row_blocks

    row = row_block * ROWS + tl.arange(0, ROWS)
    row_exists = row < rows
    query_index = row % queries
    query_head = row // queries
    sealed = tl.load(lengths_ptr + batch * 2)
    tail = tl.load(lengths_ptr + batch * 2 + 1)
    before = sealed * PAGE + tail - queries  # tokens before the first query
    query_position = before + query_index
    hidden, hidden_end = first_tokens(first_at_ptr, batch, PAGE, FIRST)
    mask_rows = mask_ptr + batch.to(tl.int64) * stride_mask_b
    if not SHARED_MASK:
        mask_rows = mask_rows + query_head.to(tl.int64) * stride_mask_h
        mask_rows = mask_rows + query_index.to(tl.int64) * stride_mask_q  # [ROWS]

    own = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + program
    latents = latent_scratch_ptr + own * (TOKENS * RANK)
    rotary = rotary_scratch_ptr + own * (TOKENS * ROPE)
    table_ptr += batch.to(tl.int64) * stride_table_b
    asked = domain_ptr + batch.to(tl.int64) * stride_domain_b + query_head.to(tl.int64) * stride_domain_h
    asked = asked + query_index.to(tl.int64) * stride_domain_q  # [ROWS]

    offs_t = tl.arange(0, TOKENS)
    everything = offs_t >= 0
    running_max = tl.full([ROWS], float("-inf"), tl.float32)
    running_sum = tl.zeros([ROWS], tl.float32)
    gathered = ()
    for _ in tl.static_range(COLUMNS // CHUNK):
        gathered = gathered + (tl.zeros([CHUNK, ROWS], tl.float32),)  # type: ignore[assignment]

    # Sealed pages that a row of the block may see, then those of this split.
    first_page, end_page = 0, sealed
    if CAUSAL or WINDOW > 0:
        count = tl.minimum(ROWS, rows - row_block * ROWS)
        # Rows are query heads, each with its queries: a block within one head has consecutive queries.
        within = row_block * ROWS % queries + count <= queries
        first_query = tl.where(within, row_block * ROWS % queries, 0)
        last_query = tl.where(within, first_query + count, queries) - 1
        if CAUSAL:
            end_page = tl.minimum(sealed, tl.maximum(before + last_query + PAGE, 0) // PAGE)
        if WINDOW > 0:
            first_page = tl.maximum(before + first_query + 1 - WINDOW, 0) // PAGE
    per_split = tl.cdiv(tl.maximum(end_page - first_page, 0), splits)
    first_page += split * per_split
    end_page = tl.minimum(first_page + per_split, end_page)

    # One stage: what the loop loads, it has just written.
    for block in tl.range(first_page * BLOCKS, tl.maximum(end_page, first_page) * BLOCKS, num_stages=1):
        page_id = tl.load(table_ptr + block // BLOCKS)
        begin = block % BLOCKS * TOKENS
        tl.debug_barrier()  # everybody has read the block before
        _store_page(
            latents - begin * RANK,
            k_planes,
            page_id.to(tl.int64),
            begin + offs_t,
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
            RANK,
            PAGE,
            PTX,
            0,
            0,
            0,
        )
        _store_page(
            rotary - begin * ROPE,
            r_planes,
            page_id.to(tl.int64),
            begin + offs_t,
            R_TILE,
            R_CHANNELS,
            R_HAS,
            R_PARTS,
            R_FIELDS,
            R_WORDS,
            R_DTYPE,
            R_UNIT,
            R_LEVELS,
            R_CHANNEL_OF,
            ROPE,
            PAGE,
            PTX,
            0,
            0,
            0,
        )
        tl.debug_barrier()
        scores = tl.zeros([TOKENS, ROWS], tl.float32)
        scores = _score_chunks(
            scores, latents, RANK, asked, row_exists, offs_t, everything, RANK, CHUNK, COLUMNS, PRECISION
        )
        scores = _score_chunks(
            scores,
            rotary,
            ROPE,
            asked + RANK,
            row_exists,
            offs_t,
            everything,
            ROPE,
            ROPE_COLUMNS,
            ROPE_COLUMNS,
            PRECISION,
        )
        logits = scores_to_base2(
            scores,
            offs_t,
            block * TOKENS,
            None,
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
        if FIRST > 0:
            logits = hide_tokens(logits, block * TOKENS + offs_t, hidden, hidden_end)
        weights, decay, running_max, running_sum = online_softmax(logits, running_max, running_sum)
        gathered = _gather_chunks(
            gathered, weights, decay, latents, RANK, offs_t, everything, RANK, CHUNK, COLUMNS, PRECISION
        )

    first_row = (batch.to(tl.int64) * (splits + 1) + split) * rows
    _store_parts(
        partial_ptr, state_ptr, first_row, row, row_exists, gathered, running_max, running_sum, RANK, CHUNK, COLUMNS
    )
    if split == splits - 1:
        running_max = tl.full([ROWS], float("-inf"), tl.float32)
        running_sum = tl.zeros([ROWS], tl.float32)
        exact = ()
        for _ in tl.static_range(COLUMNS // CHUNK):
            exact = exact + (tl.zeros([CHUNK, ROWS], tl.float32),)  # type: ignore[assignment]
        beside = query_ptr + batch.to(tl.int64) * stride_query_b + query_head.to(tl.int64) * stride_query_h
        beside = beside + query_index.to(tl.int64) * stride_query_q  # [ROWS]
        k_tail_ptr += batch.to(tl.int64) * stride_k_tail_b
        r_tail_ptr += batch.to(tl.int64) * stride_r_tail_b
        for begin in tl.range(0, tail, TOKENS, num_stages=1):
            held = begin + offs_t < tail
            scores = tl.zeros([TOKENS, ROWS], tl.float32)
            scores = _score_chunks(
                scores,
                k_tail_ptr,
                stride_k_tail_n,
                beside,
                row_exists,
                begin + offs_t,
                held,
                RANK,
                CHUNK,
                COLUMNS,
                PRECISION,
            )
            scores = _score_chunks(
                scores,
                r_tail_ptr,
                stride_r_tail_n,
                beside + RANK,
                row_exists,
                begin + offs_t,
                held,
                ROPE,
                ROPE_COLUMNS,
                ROPE_COLUMNS,
                PRECISION,
            )
            logits = scores_to_base2(
                scores,
                offs_t,
                sealed * PAGE + begin,
                tail - begin,
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
            if FIRST > 0:
                logits = hide_tokens(logits, sealed * PAGE + begin + offs_t, hidden, hidden_end)
            weights, decay, running_max, running_sum = online_softmax(logits, running_max, running_sum)
            exact = _gather_chunks(
                exact,
                weights,
                decay,
                k_tail_ptr,
                stride_k_tail_n,
                begin + offs_t,
                held,
                RANK,
                CHUNK,
                COLUMNS,
                PRECISION,
            )
        if FIRST > 0:
            k_first_ptr += batch.to(tl.int64) * (FIRST * RANK)
            r_first_ptr += batch.to(tl.int64) * (FIRST * ROPE)
            for begin in tl.static_range(0, FIRST, TOKENS):
                held = begin + offs_t < hidden_end - hidden
                scores = tl.zeros([TOKENS, ROWS], tl.float32)
                scores = _score_chunks(
                    scores, k_first_ptr, RANK, beside, row_exists, begin + offs_t, held, RANK, CHUNK, COLUMNS, PRECISION
                )
                scores = _score_chunks(
                    scores,
                    r_first_ptr,
                    ROPE,
                    beside + RANK,
                    row_exists,
                    begin + offs_t,
                    held,
                    ROPE,
                    ROPE_COLUMNS,
                    ROPE_COLUMNS,
                    PRECISION,
                )
                logits = scores_to_base2(
                    scores,
                    offs_t,
                    hidden + begin,
                    hidden_end - hidden - begin,
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
                weights, decay, running_max, running_sum = online_softmax(logits, running_max, running_sum)
                exact = _gather_chunks(
                    exact, weights, decay, k_first_ptr, RANK, begin + offs_t, held, RANK, CHUNK, COLUMNS, PRECISION
                )
        first_row = (batch.to(tl.int64) * (splits + 1) + splits) * rows
        _store_parts(
            partial_ptr, state_ptr, first_row, row, row_exists, exact, running_max, running_sum, RANK, CHUNK, COLUMNS
        )


def _side(prefix: str, codec: KernelCodec, dim: int, dtype: torch.dtype, ptx: bool) -> dict[str, Any]:
    """Constants of one side, as ``dense_pages.py`` reads it."""
    constants = codec.constants(prefix, dim, dtype, ptx)
    return constants | {f"{prefix}_LEVELS": codec.levels, f"{prefix}_CHANNEL_OF": codec.channel_of}


def latent_constants(
    latents: KernelCodec,
    rotary: KernelCodec,
    dtype: torch.dtype,
    ptx: bool,
    dims: tuple[int, int],
    page_size: int,
    *,
    first: int,
    causal: bool,
    window: int,
    softcap: bool,
    mask: int,
    shared_mask: bool,
    rows: int,
    warps: int,
) -> dict[str, Any]:
    """The constants of ``_latent_decode_kernel``, and how it is launched.

    Args:
        latents, rotary: codecs as kernels see them.
        dtype: the model's.
        ptx: whether it is compiled for an NVIDIA GPU.
        dims: elements of a latent and of a rotary key.
        page_size: tokens of a page.
        first: tokens of each sequence that are read as they came.
        causal: whether the causal rule hides anything.
        window: tokens that a query sees; 0 for all.
        softcap: whether there is one.
        mask: 0 for none, 1 for a bool mask, 2 for one that is added.
        shared_mask: whether all rows have the same row of the mask.
        rows, warps: of a program.
    """
    ptx = ptx and dtype != torch.float32
    columns, rope_columns = (max(16, triton.next_power_of_2(dim)) for dim in dims)
    wide = dtype == torch.float32
    return {
        **_side("K", latents, dims[0], dtype, ptx),
        **_side("R", rotary, dims[1], dtype, ptx),
        "RANK": dims[0],
        "ROPE": dims[1],
        "COLUMNS": columns,
        "ROPE_COLUMNS": rope_columns,
        "CHUNK": min(columns, 64 if wide else 128),
        "PAGE": page_size,
        "TOKENS": tokens_of(page_size, dtype),
        "FIRST": first,
        "ROWS": rows,
        "CAUSAL": causal,
        "WINDOW": window,
        "SOFTCAP": softcap,
        "MASK": mask,
        "SHARED_MASK": shared_mask,
        "PRECISION": "ieee",
        "PTX": ptx,
        "num_warps": warps,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def tokens_of(page_size: int, dtype: torch.dtype) -> int:
    """Tokens of a block: a page, or what has 32 KiB where latents have 512 elements."""
    return min(page_size, 16 if dtype == torch.float32 else 32)
