"""What every kernel repeats, by name: packed column order, unpacking, masks, the online softmax, the rotation's signs.

Packed column order.  A byte holds ``FIELDS`` codes that are D / FIELDS channels apart.  A tile of unpacked codes keeps
the codes of one byte together, so that unpacking moves nothing between threads:

    column c of a tile  =  channel (c % FIELDS) * (D / FIELDS) + c // FIELDS

Queries are loaded and outputs are stored in this order; with FIELDS = 1 it is the natural one.  D / FIELDS is padded
to a power of two, and columns past it are masked.
"""

from .target import tl, triton


@triton.jit
def packed_columns(HEAD_DIM: tl.constexpr, FIELDS: tl.constexpr, COLUMNS: tl.constexpr):
    """Channel of each packed column and whether it exists; two ``[COLUMNS]``."""
    columns = tl.arange(0, COLUMNS)
    within = columns // FIELDS
    return (columns % FIELDS) * (HEAD_DIM // FIELDS) + within, within < HEAD_DIM // FIELDS


@triton.jit
def unpack_bytes(packed, FIELDS: tl.constexpr, DTYPE: tl.constexpr):
    """Codes ``[N, F * FIELDS]`` of ``DTYPE`` in packed column order, from bytes ``[N, F]``."""
    if FIELDS == 1:
        return packed.to(DTYPE)
    elif FIELDS == 2:
        low = (packed & 0xF).to(DTYPE)
        high = (packed >> 4).to(DTYPE)
        return tl.join(low, high).reshape(packed.shape[0], packed.shape[1] * 2)
    else:
        even = tl.join((packed & 3).to(DTYPE), ((packed >> 4) & 3).to(DTYPE))
        odd = tl.join(((packed >> 2) & 3).to(DTYPE), (packed >> 6).to(DTYPE))
        return tl.join(even, odd).reshape(packed.shape[0], packed.shape[1] * 4)


@triton.jit
def load_bytes(codes_ptr, page_head, offs_n, PAGE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """The packed bytes of one page of one head, ``[N, COLUMNS]``; rows of ``WIDTH`` bytes, zero past them."""
    offs_f = tl.arange(0, COLUMNS)
    pointers = codes_ptr + page_head * (PAGE * WIDTH) + offs_n[:, None] * WIDTH + offs_f[None, :]
    if COLUMNS == WIDTH:
        return tl.load(pointers)  # [N, WIDTH]
    return tl.load(pointers, mask=(offs_f < WIDTH)[None, :], other=0)  # [N, COLUMNS]


@triton.jit
def online_softmax(scores, running_max, running_sum):
    """One step over scores ``[N, M]`` of N tokens in base 2; masked scores are -inf.

    Returns weights ``[N, M]``, the factor for what is accumulated ``[M]``, the new maximum and the new sum.
    """
    new_max = tl.maximum(running_max, tl.max(scores, 0))
    # A row that has seen no token yet keeps maximum -inf; measure from 0 there, so that no inf - inf arises.
    origin = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - origin[None, :])
    decay = tl.exp2(running_max - origin)
    return weights, decay, new_max, running_sum * decay + tl.sum(weights, 0)


@triton.jit
def scores_to_base2(
    scores,
    offs_n,
    first_token,
    visible,
    query_position,
    mask_rows,
    stride_mask_n,
    row_exists,
    scale,
    softcap,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    SHARED_MASK: tl.constexpr,
):
    """Scale, softcap and mask raw scores ``[N, ROWS]`` of tokens ``first_token + offs_n``; base-2 logits.

    ``scale`` is a number, or ``[1, ROWS]``.  ``visible`` tokens exist; all of them if it is None.  ``mask_rows``
    ``[ROWS]`` points to each row of the mask, or to the one row of a SHARED_MASK.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (e^2x + 1), which saturates at both ends.
        doubled = tl.exp2(scores * (scale * 2.0 * LOG2E / softcap))
        logits = (softcap * LOG2E) * (1.0 - 2.0 / (doubled + 1.0))
    else:
        logits = scores * (scale * LOG2E)
    token = first_token + offs_n
    if visible is not None:
        logits = tl.where((offs_n < visible)[:, None], logits, float("-inf"))
    if CAUSAL:
        logits = tl.where(token[:, None] <= query_position[None, :], logits, float("-inf"))
    if WINDOW > 0:
        logits = tl.where(token[:, None] > query_position[None, :] - WINDOW, logits, float("-inf"))
    if MASK != 0:
        if SHARED_MASK:
            exists = (offs_n < visible) if visible is not None else (offs_n >= 0)
            entry = tl.load(mask_rows + token * stride_mask_n, mask=exists, other=0)[:, None]  # [N, 1]
        else:
            pointers = mask_rows[None, :] + (token * stride_mask_n)[:, None]
            seen = row_exists[None, :]
            if visible is not None:
                seen = seen & (offs_n < visible)[:, None]
            entry = tl.load(pointers, mask=seen, other=0)  # [N, ROWS]
        if MASK == 1:
            # A limit instead of a selection: predicates and the tile they select from crowd the registers of a warp.
            logits = tl.minimum(logits, tl.where(entry != 0, float("inf"), float("-inf")))
        else:
            logits = logits + entry.to(tl.float32) * LOG2E
    return logits


@triton.jit
def first_tokens(first_at_ptr, batch, PAGE: tl.constexpr, FIRST: tl.constexpr):
    """Where the tokens of a sequence begin and end that are read as they came; both are 0 where there are none."""
    begin, end = 0, 0
    if FIRST > 0:
        at = tl.load(first_at_ptr + batch)
        begin = tl.maximum(at, 0)
        end = tl.where(at < 0, 0, tl.minimum(begin + FIRST, (begin // PAGE + 1) * PAGE))
    return begin, end


@triton.jit
def hide_tokens(logits, token, begin, end):
    """``logits`` ``[N, ROWS]`` of tokens ``token`` ``[N]``, minus infinity for those from ``begin`` to ``end``."""
    limit = tl.where((token >= begin) & (token < end), float("-inf"), float("inf"))
    return tl.minimum(logits, limit[:, None])


@triton.jit
def ordered_query(
    table,
    order,
    channel_scale,
    channel_offset,
    PARTS: tl.constexpr,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Queries in the order of a page's channels.

    Args:
        table: points to them, ``[channels, ROWS]``: all rows of a channel are read at once.
        order: channels, as ``load_order`` gives them.
        channel_scale, channel_offset: parts ``[WORDS]`` in the dtype of the table, of scales the first ``LEVELS``.

    Returns:
        A tuple of the first ``LEVELS`` parts, scaled, ``[WORDS, ROWS]`` in that dtype, and the products of all with
        ``channel_offset``, float32 ``[ROWS]``.
    """
    row = tl.arange(0, ROWS)
    operands = ()
    for field in tl.static_range(PARTS // 2):
        # Channels are not negative, which no address shows that is made of signed numbers.
        channel = order[field].to(tl.uint32).to(tl.int64)
        q = tl.load(table + channel[:, None] * ROWS + row[None, :])  # [2 * WORDS, ROWS]
        both = tl.split(q.reshape(2, WORDS, ROWS).permute(1, 2, 0))
        for byte in tl.static_range(2):
            # A product of 16 equal rows: the sum over channels is the tensor core's, in float32.
            again = tl.broadcast_to(channel_offset[2 * field + byte][None, :], (16, WORDS))
            if 2 * field + byte == 0:
                shift = tl.dot(again, both[byte], input_precision=PRECISION)  # [16, ROWS]
            else:
                shift = tl.dot(again, both[byte], shift, input_precision=PRECISION)
            if 2 * field + byte < LEVELS:
                operands = operands + (both[byte] * channel_scale[2 * field + byte][:, None],)
    return operands, tl.max(shift, 0)


@triton.jit
def hadamard_signs(rows, columns, ORDER: tl.constexpr):
    """+1 or -1 of the block-diagonal Hadamard matrix, float32 ``[R, C]``; 0 outside of the diagonal blocks.

    ``rows`` ``[R]`` and ``columns`` ``[C]`` are channels; the sign is the parity of the bits that both indices have.
    """
    common = (rows[:, None] & columns[None, :]) & (ORDER - 1)
    common = common ^ (common >> 8)
    common = common ^ (common >> 4)
    common = common ^ (common >> 2)
    common = common ^ (common >> 1)
    same_block = (rows // ORDER)[:, None] == (columns // ORDER)[None, :]
    return tl.where(same_block, 1.0 - 2.0 * (common & 1).to(tl.float32), 0.0)


@triton.jit
def hadamard_rotate(x, COLUMNS: tl.constexpr, ORDER: tl.constexpr):
    """``x`` ``[COLUMNS]`` float32 times the block-diagonal orthonormal Hadamard matrix: log2(ORDER) butterflies."""
    for power in tl.static_range(ORDER.bit_length() - 1):
        pairs = tl.trans(x.reshape(COLUMNS >> (power + 1), 2, 1 << power), 0, 2, 1)
        a, b = tl.split(pairs)
        x = tl.trans(tl.join(a + b, a - b), 0, 2, 1).reshape(COLUMNS)
    return x * (1.0 / tl.sqrt(ORDER * 1.0))


@triton.jit
def lookup_levels(codes, TABLE: tl.constexpr, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    """``TABLE[codes]`` in ``DTYPE``, by selection among ``COUNT`` entries."""
    levels = tl.full(codes.shape, TABLE[0], DTYPE)
    for i in tl.static_range(1, COUNT):
        levels = tl.where(codes == i, tl.full(codes.shape, TABLE[i], DTYPE), levels)
    return levels


@triton.jit
def bucket_levels(u, BOUNDARIES: tl.constexpr, LEVELS: tl.constexpr, COUNT: tl.constexpr, UNIT: tl.constexpr):
    """Codes (int32) and levels (float32) of numbers ``u`` by tables of ``COUNT`` levels and one boundary less.

    A code is the number of boundaries strictly below.  Tables are multiplied by ``UNIT`` in float32, like in torch.
    """
    codes = tl.zeros(u.shape, tl.int32)
    levels = tl.full(u.shape, LEVELS[0], tl.float32) * UNIT
    for i in tl.static_range(1, COUNT):
        above = u > tl.full(u.shape, BOUNDARIES[i - 1], tl.float32) * UNIT
        codes += above.to(tl.int32)
        levels = tl.where(above, tl.full(u.shape, LEVELS[i], tl.float32) * UNIT, levels)
    return codes, levels


@triton.jit
def round_half_even(x):
    """The integer next to ``x`` (float32, below 2^22 in magnitude), ties to even, as float32.

    1.5 * 2^23 moves the point of rounding to the units; the addition itself rounds to even.
    """
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """``x`` (float32) rounded to ``DTYPE``, ties to even; infinity past its range."""
    if DTYPE.is_bf16():
        # By bits, because Triton's interpreter truncates where a GPU rounds.
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def round_saturating(x, DTYPE: tl.constexpr):
    """``x`` (float32) rounded to ``DTYPE``; values outside its range become its ends instead of infinity."""
    if DTYPE.is_fp16():
        LIMIT: tl.constexpr = 65504.0
    elif DTYPE.is_bf16():
        LIMIT: tl.constexpr = 3.3895313892515355e38
    else:
        LIMIT: tl.constexpr = 3.4028234663852886e38
    return round_to(tl.minimum(tl.maximum(x, -LIMIT), LIMIT), DTYPE)


@triton.jit
def fp16_at_most(x):
    """Largest fp16 number <= ``x`` (float32).  Values outside the fp16 range saturate to its ends."""
    h = round_saturating(x, tl.float16)
    bits = h.to(tl.int16, bitcast=True)
    # The fp16 number below: towards zero for positive ones, and -2^-24 (0x8001) under zero.
    below = tl.where(bits >= 0, bits - 1, bits + 1)
    below = tl.where(h == 0.0, tl.full(bits.shape, -32767, tl.int16), below)
    value = h.to(tl.float32)
    return tl.where((value > x) & (value > -65504.0), below, bits).to(tl.float16, bitcast=True)


@triton.jit
def fp16_at_least(x):
    """Smallest fp16 number >= ``x`` (float32).  Values outside the fp16 range saturate to its ends."""
    h = round_saturating(x, tl.float16)
    bits = h.to(tl.int16, bitcast=True)
    # The fp16 number above: towards zero for negative ones, and 2^-24 (0x0001) over zero.
    above = tl.where(bits >= 0, bits + 1, bits - 1)
    above = tl.where(h == 0.0, tl.full(bits.shape, 1, tl.int16), above)
    value = h.to(tl.float32)
    return tl.where((value < x) & (value < 65504.0), above, bits).to(tl.float16, bitcast=True)
