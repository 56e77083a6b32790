"""Packed bytes of a page as the operands of a tensor-core product.

A row of codes is read as 16-bit words, the unit that a GPU can transpose on its way from shared memory to registers.
A word holds ``2 * FIELDS`` codes, and a tile of words becomes as many tiles of levels, the *parts*:

    part p of word w  =  channel (p // 2) * (D / FIELDS) + 2 w + p % 2        p = 0 .. 2 * FIELDS - 1

    word     byte 1                  byte 0
    int8     part 1                  part 0
    int4     part 3      part 1      part 2      part 0
    2 bit    7   5   3   1           6   4   2   0

Each part goes into its own product with the same part of the query (keys), or has its own accumulator (values), so no
code ever moves to another thread.  Codecs of whole vectors have one part in natural order.  ``WORDS`` is padded to a
power of two, and words past the head are zero.

Levels leave here in the dtype of the product.  On NVIDIA GPUs integer codes leave as fp16 *subnormals*, bit pattern =
code, which is the code times 2^-24 exactly; ``KernelCodec.constants`` has the unit that undoes it, in float32.
"""

from .ptx import (
    nibbles,
    ranked_2,
    ranked_3,
    ranked_4,
    ranked_steps,
    run_on_four_words,
    run_on_words,
    run_on_words_and_bytes,
    run_on_words_and_numbers,
    whole_bytes,
)
from .target import tl, triton


@triton.jit
def part_channels(PART: tl.constexpr, HEAD_DIM: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr):
    """Channel of each word's part and whether it exists; two ``[WORDS]``.  ``FIELDS`` = 0: whole vectors."""
    words = tl.arange(0, WORDS)
    if FIELDS == 0:
        return words, words < HEAD_DIM
    else:
        within = words * 2 + PART % 2
        return PART // 2 * (HEAD_DIM // FIELDS) + within, within < HEAD_DIM // FIELDS


@triton.jit
def column_channels(HEAD_DIM: tl.constexpr, FIELDS: tl.constexpr, COLUMNS: tl.constexpr):
    """Channel of each column of an accumulator, parts one after the other, and whether it exists; two ``[COLUMNS]``."""
    columns = tl.arange(0, COLUMNS)
    if FIELDS == 0:
        return columns, columns < HEAD_DIM
    else:
        WORDS: tl.constexpr = COLUMNS // (2 * FIELDS)
        part = columns // WORDS
        within = columns % WORDS * 2 + part % 2
        return part // 2 * (HEAD_DIM // FIELDS) + within, within < HEAD_DIM // FIELDS


@triton.jit
def load_words(
    codes_ptr,
    page_head,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    WORDS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """The codes of one page of one head as int16 ``[N, WORDS]``, or ``[WORDS, N]``; zero past the head."""
    WIDTH: tl.constexpr = HEAD_DIM // FIELDS // 2
    offs_w = tl.arange(0, WORDS)
    words_ptr = codes_ptr.to(tl.pointer_type(tl.int16)) + page_head * (PAGE * WIDTH)
    # Transposed pointers and not a transposed tile: this keeps the load asynchronous.
    if TRANSPOSED:
        pointers = words_ptr + offs_n[None, :] * WIDTH + offs_w[:, None]
        mask_w = (offs_w < WIDTH)[:, None]
    else:
        pointers = words_ptr + offs_n[:, None] * WIDTH + offs_w[None, :]
        mask_w = (offs_w < WIDTH)[None, :]
    if WORDS == WIDTH:
        return tl.load(pointers)  # [N, WORDS] or [WORDS, N]
    else:
        return tl.load(pointers, mask=mask_w, other=0)  # [N, WORDS] or [WORDS, N]


@triton.jit
def load_word_bytes(
    plane_ptr,
    page_head,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WORDS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """One byte for each word of eight codes of one page of one head, ``[N, WORDS]`` or ``[WORDS, N]``; zero past the
    head."""
    WIDTH: tl.constexpr = HEAD_DIM // 8
    offs_w = tl.arange(0, WORDS)
    bytes_ptr = plane_ptr + page_head * (PAGE * WIDTH)
    if TRANSPOSED:
        pointers = bytes_ptr + offs_n[None, :] * WIDTH + offs_w[:, None]
        mask_w = (offs_w < WIDTH)[:, None]
    else:
        pointers = bytes_ptr + offs_n[:, None] * WIDTH + offs_w[None, :]
        mask_w = (offs_w < WIDTH)[None, :]
    return tl.load(pointers, mask=mask_w, other=0)  # [N, WORDS] or [WORDS, N]


@triton.jit
def load_channels(vector_ptr, page_head, HEAD_DIM: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr):
    """fp16 numbers per channel of one page of one head, as a tuple of parts, each float32 ``[WORDS]``."""
    WIDTH: tl.constexpr = HEAD_DIM // FIELDS // 2
    offs_w = tl.arange(0, WORDS)
    # Two numbers at a time: 4 bytes are the least that a GPU copies asynchronously.
    pairs_ptr = vector_ptr.to(tl.pointer_type(tl.int32)) + page_head * (HEAD_DIM // 2)
    parts = ()
    for field in tl.static_range(FIELDS):
        both = tl.load(pairs_ptr + field * WIDTH + offs_w, mask=offs_w < WIDTH, other=0)  # [WORDS]
        even = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        odd = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        parts = parts + (even, odd)
    return parts


@triton.jit
def load_channel_bytes(vector_ptr, page_head, PRESENT: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr):
    """Bytes per channel of one page of one head, ``WIDTH`` words (an even number) of two channels in each of
    ``PRESENT`` fields, as a tuple of parts, each int32 ``[WORDS]``; zero past the head."""
    offs_w = tl.arange(0, WORDS)
    # Four at a time, which are asked for twice: 4 bytes are the least that a GPU copies asynchronously.
    fours_ptr = vector_ptr.to(tl.pointer_type(tl.int32)) + page_head * (PRESENT * WIDTH // 2)
    parts = ()
    for field in tl.static_range(PRESENT):
        four = tl.load(fours_ptr + field * (WIDTH // 2) + offs_w // 2, mask=offs_w < WIDTH, other=0)  # [WORDS]
        two = four >> (offs_w % 2 * 16)
        parts = parts + (two & 0xFF, (two >> 8) & 0xFF)
    return parts


@triton.constexpr_function
def channel_blocks(head_dim):
    """Blocks of channels, of which each has 256 at most, that are ranked by themselves (``codecs/ranked.py``)."""
    return 1 if head_dim <= 256 else 2 if head_dim <= 512 else 4 if head_dim <= 1024 else 8


@triton.jit
def load_order(order_ptr, page_head, HEAD_DIM: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr):
    """The channels of the ranks of one page of one head, as a tuple of fields, each int32 ``[2 * WORDS]``: those of the
    field's first part, then those of the second; zero past the head."""
    QUARTER: tl.constexpr = HEAD_DIM // FIELDS
    BLOCKS: tl.constexpr = channel_blocks(HEAD_DIM)
    offs_w = tl.arange(0, 2 * WORDS) % WORDS
    within = 2 * offs_w + tl.arange(0, 2 * WORDS) // WORDS
    # Four at a time, as in ``load_channel_bytes``.
    fours_ptr = order_ptr.to(tl.pointer_type(tl.int32)) + page_head * (HEAD_DIM // 4)
    fields = ()
    for field in tl.static_range(FIELDS):
        four = tl.load(fours_ptr + field * (QUARTER // 4) + within // 4, mask=within < QUARTER, other=0)  # [2 * WORDS]
        channel = (four >> (within % 4 * 8)) & 0xFF
        if BLOCKS > 1:
            channel = channel * BLOCKS + (field * QUARTER + within) % BLOCKS
        fields = fields + (channel,)
    return fields


@triton.jit
def load_offsets(
    vector_ptr, page_head, HEAD_DIM: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr, DTYPE: tl.constexpr
):
    """``load_channels`` in ``DTYPE``."""
    wide = load_channels(vector_ptr, page_head, HEAD_DIM, FIELDS, WORDS)
    parts = ()
    for part in tl.static_range(2 * FIELDS):
        parts = parts + (wide[part].to(DTYPE),)
    return parts


@triton.jit
def load_steps(
    steps_ptr,
    page_head,
    LEVELS: tl.constexpr,
    WIDTH: tl.constexpr,
    WORDS: tl.constexpr,
    UNITS: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Steps of ``codecs/ranked.py`` divided by ``2^UNITS``, as a tuple of ``LEVELS`` parts ``[WORDS]`` in
    ``DTYPE``, of ``WIDTH`` words in each field; zero past the head."""
    offs_w = tl.arange(0, WORDS)
    fours_ptr = steps_ptr.to(tl.pointer_type(tl.int32)) + page_head * (LEVELS * WIDTH // 4)
    parts = ()
    for field in tl.static_range(LEVELS // 2):
        four = tl.load(fours_ptr + field * (WIDTH // 2) + offs_w // 2, mask=offs_w < WIDTH, other=0)  # [WORDS]
        two = (four >> (offs_w % 2 * 16)).to(tl.int16)
        if PTX:
            both = ranked_steps(two)
        else:
            both = (
                ((two & 0xFF) << 7).to(tl.float16, bitcast=True),
                ((two >> 1) & 0x7F80).to(tl.float16, bitcast=True),
            )
        for byte in tl.static_range(2):
            step = both[byte].to(DTYPE)
            if UNITS[2 * field + byte] > 0:
                step = step * tl.full([WORDS], 2.0 ** -UNITS[2 * field + byte], DTYPE)
            parts = parts + (step,)
    return parts


@triton.jit
def unpack_codes(words, FIELDS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Codes as a tuple of parts, each of the shape of ``words``; fp16 subnormals if ``PTX``."""
    if PTX and FIELDS == 1:
        return whole_bytes(words)
    elif PTX and FIELDS == 2:
        return nibbles(words)
    else:
        parts = ()
        for part in tl.static_range(2 * FIELDS):
            shift = part // 2 * (8 // FIELDS) + part % 2 * 8
            parts = parts + (((words >> shift) & ((1 << (8 // FIELDS)) - 1)).to(DTYPE),)
        return parts


@triton.jit
def unpack_floats(words, FIELDS: tl.constexpr, ASM: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Floating-point codes as a tuple of parts, each of the shape of ``words``: e4m3 times 2^-8, or e2m1 times 2^-14.

    A sign, an exponent and a mantissa that lie in the places of fp16's, the exponent's lowest bit and the mantissa's
    highest, are that number but for the difference of what exponents are counted from, subnormal ones too."""
    if PTX:
        return run_on_words(words, ASM, 2 * FIELDS)
    else:
        parts = ()
        for part in tl.static_range(2 * FIELDS):
            high = words << (16 - 8 // FIELDS - (part // 2 * (8 // FIELDS) + part % 2 * 8))
            if FIELDS == 1:
                half = ((high >> 1) & 0x3F80) | (high & -0x8000)
            else:
                half = ((high >> 3) & 0x0E00) | (high & -0x8000)
            parts = parts + (half.to(tl.float16, bitcast=True).to(DTYPE),)
        return parts


@triton.jit
def select_levels(codes, TABLE: tl.constexpr, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    """``TABLE[codes]`` in ``DTYPE``, by selection among ``COUNT`` entries."""
    levels = tl.full(codes.shape, TABLE[0], DTYPE)
    for i in tl.static_range(1, COUNT):
        levels = tl.where(codes == i, tl.full(codes.shape, TABLE[i], DTYPE), levels)
    return levels


@triton.jit
def unpack_levels(
    words, TABLE: tl.constexpr, ASM: tl.constexpr, FIELDS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr
):
    """``TABLE[code]`` as a tuple of parts, each of the shape of ``words``; ``ASM`` is the same in PTX."""
    if PTX:
        return run_on_words(words, ASM, 2 * FIELDS)
    else:
        parts = ()
        for part in tl.static_range(2 * FIELDS):
            shift = part // 2 * (8 // FIELDS) + part % 2 * 8
            codes = (words >> shift) & ((1 << (8 // FIELDS)) - 1)
            parts = parts + (select_levels(codes, TABLE, 1 << (8 // FIELDS), DTYPE),)
        return parts


@triton.jit
def unpack_magnitudes(words, signs, TABLE: tl.constexpr, ASM: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Codes of 2 bits: ``TABLE[code]``, or minus that where bit 4 (p % 2) + p // 2 of ``signs`` (uint8, of the shape of
    ``words``) is set for part p, as a tuple of 8 parts."""
    if PTX:
        return run_on_words_and_bytes(words, signs, ASM)
    else:
        signs = signs.to(tl.int16)
        parts = ()
        for part in tl.static_range(8):
            codes = (words >> (part // 2 * 2 + part % 2 * 8)) & 3
            level = select_levels(codes, TABLE, 4, DTYPE)
            parts = parts + (tl.where(((signs >> (part % 2 * 4 + part // 2)) & 1) != 0, -level, level),)
        return parts


@triton.jit
def octet_signs(words):
    """Of int16 ``words`` of codes of ``codecs/octet.py``: bit 2 f is set where field f of both bytes is negative."""
    differ = (words ^ (words >> 8)) & 0x55
    again = differ | (differ << 8)
    return (again >> 2) ^ (again >> 4)


@triton.jit
def unpack_octets(
    words,
    high,
    TABLE: tl.constexpr,
    COUNT: tl.constexpr,
    ASM: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """The levels of ``codecs/octet.py`` as a tuple of 8 parts; ``TABLE`` has ``COUNT`` = 4 of them, or 8,
    and then bit p of ``high`` (uint8, of the shape of ``words``) is the third bit of part p's code."""
    if PTX and COUNT == 4:
        return run_on_four_words(words, ASM)
    elif PTX:
        return run_on_words_and_bytes(words, high, ASM)
    else:
        signs = octet_signs(words)
        parts = ()
        for part in tl.static_range(8):
            codes = (words >> (part // 2 * 2 + part % 2 * 8)) & 3
            if COUNT == 8:
                codes |= ((high.to(tl.int16) >> part) & 1) << 2
            level = select_levels(codes, TABLE, COUNT, DTYPE)
            parts = parts + (tl.where(((signs >> (part // 2 * 2)) & 1) != 0, -level, level),)
        return parts


@triton.jit
def unpack_signed_levels(words, rho, TABLE: tl.constexpr, ASM: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Nibbles of 3 bits and a sign: ``TABLE[low 3 bits]`` plus (sign bit 1) or minus ``rho``, as a tuple of 4 parts.

    ``rho`` is of ``DTYPE`` and broadcasts to ``words``.
    """
    if PTX:
        # Entries of a constexpr tuple are plain strings in Triton 3.6, which no function under jit takes.
        EVEN: tl.constexpr = ASM[0]
        ODD: tl.constexpr = ASM[1]
        even = run_on_words_and_numbers(words, rho, EVEN)
        odd = run_on_words_and_numbers(words, rho, ODD)
        return even[0], odd[0], even[1], odd[1]
    else:
        parts = ()
        for part in tl.static_range(4):
            shift = part // 2 * 4 + part % 2 * 8
            level = select_levels((words >> shift) & 7, TABLE, 8, DTYPE)
            parts = parts + (tl.where(((words >> shift) & 8) != 0, level + rho, level - rho),)
        return parts


# Parts of ranked codes leave times 2^unit: they stay at the bits of their bytes where they are.
RANKED_UNITS = {4: (0, 0, 4, 4, 2, 2, 5, 5), 3: (0, 0, 4, 4, 0, 4, 2, 6), 2: (0, 0, 4, 4, 6, 6)}


@triton.jit
def unpack_ranked_4(words, rest, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Codes of ``int4-ranked`` times their units, as a tuple of eight parts; fp16 subnormals if ``PTX``."""
    if PTX:
        return ranked_4(words, rest)
    else:
        parts = ()
        for part in tl.static_range(8):
            low, other = words >> (part % 2 * 8), rest >> (part % 2 * 8)
            if part // 2 == 0:
                code = ((low & 15) << 2) | (other & 3)
            elif part // 2 == 1:
                code = low & 0xF0
            elif part // 2 == 2:
                code = other & 0x1C
            else:
                code = other & 0xE0
            parts = parts + (code.to(DTYPE),)
        return parts


@triton.jit
def unpack_ranked_3(words, rest, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The same for ``int3-ranked``; ``rest`` is uint8, of the shape of ``words``."""
    if PTX:
        return ranked_3(words, rest)
    else:
        rest = rest.to(tl.int16)
        parts = ()
        for part in tl.static_range(8):
            if part < 4:
                code = (words >> (part % 2 * 8)) & (0x0F << (part // 2 * 4))
            else:
                code = rest & (3 << (part % 2 * 4 + part // 2 * 2 - 4))
            parts = parts + (code.to(DTYPE),)
        return parts


@triton.jit
def unpack_ranked_2(words, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The same for ``int2-ranked``, of which six parts have bits."""
    if PTX:
        return ranked_2(words)
    else:
        parts = ()
        for part in tl.static_range(6):
            low = words >> (part % 2 * 8)
            if part // 2 == 0:
                code = low & 0x0F
            elif part // 2 == 1:
                code = low & 0x30
            else:
                code = low & 0xC0
            parts = parts + (code.to(DTYPE),)
        return parts
