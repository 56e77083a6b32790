"""Codes of a page on their way into bytes: the counterpart of ``unpack.py``.

A byte holds ``FIELDS`` codes that are D / FIELDS channels apart (``codecs/packing.py``).  The tile that a codec encodes
keeps the codes of one byte together, so that packing moves little between threads; this is *byte order*:

    column c of the tile  =  channel (c % FIELDS) * (D / FIELDS) + c // FIELDS

With FIELDS = 1 it is the natural order.  Rows are padded to ``BYTES`` bytes, a power of two.
"""

from .target import tl, triton


@triton.jit
def byte_columns(HEAD_DIM: tl.constexpr, FIELDS: tl.constexpr, BYTES: tl.constexpr):
    """Channel of each column in byte order and whether it exists; two ``[BYTES * FIELDS]``."""
    columns = tl.arange(0, BYTES * FIELDS)
    within = columns // FIELDS
    return (columns % FIELDS) * (HEAD_DIM // FIELDS) + within, within < HEAD_DIM // FIELDS


@triton.jit
def split_fields(codes):
    """The four fields, each ``[N, BYTES]``, of codes ``[N, BYTES * 4]`` in byte order."""
    even, odd = tl.split(codes.reshape(codes.shape[0], codes.shape[1] // 4, 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def store_bytes(plane_ptr, page_head, offs_n, packed, PAGE: tl.constexpr, WIDTH: tl.constexpr):
    """Write ``packed`` ``[PAGE, BYTES]``, of which ``WIDTH`` exist, as one page of one head."""
    BYTES: tl.constexpr = packed.shape[1]
    offs_f = tl.arange(0, BYTES)
    pointers = plane_ptr + page_head * (PAGE * WIDTH) + offs_n[:, None] * WIDTH + offs_f[None, :]
    if BYTES == WIDTH:
        tl.store(pointers, packed)
    else:
        tl.store(pointers, packed, mask=(offs_f < WIDTH)[None, :])


@triton.jit
def pack_bytes(codes, FIELDS: tl.constexpr):
    """Bytes uint8 ``[N, BYTES]`` from integer codes ``[N, BYTES * FIELDS]`` in byte order."""
    N: tl.constexpr = codes.shape[0]
    BYTES: tl.constexpr = codes.shape[1] // FIELDS
    codes = codes.to(tl.uint8)
    if FIELDS == 1:
        return codes
    elif FIELDS == 2:
        low, high = tl.split(codes.reshape(N, BYTES, 2))
        return low | (high << 4)
    else:
        first, second, third, fourth = split_fields(codes)
        return first | (second << 2) | (third << 4) | (fourth << 6)


@triton.jit
def store_codes(
    codes_ptr,
    page_head,
    offs_n,
    codes,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Pack codes ``[PAGE, BYTES * FIELDS]`` in byte order and write them as one page of one head."""
    store_bytes(codes_ptr, page_head, offs_n, pack_bytes(codes, FIELDS), PAGE, HEAD_DIM // FIELDS)
