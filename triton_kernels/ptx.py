"""Unpacking on NVIDIA GPUs: PTX on 32-bit registers of two words, in place of conversions and selections per code.

A register holds the words of two neighbouring rows or columns; ``unpack.py`` says which codes are in them.  A result is
one register for each part, with the level of the first word below that of the second.

Integer codes   masked and moved to the low bits of each half.  The bit pattern of a small integer, read as fp16, is a
                subnormal number: the integer times 2^-24.  Tensor cores take subnormals as they are, so no conversion
                and no subtraction of a magic number is left.
Table levels    ``prmt`` looks up four bytes at once: its selector is four nibbles, its table eight bytes.  fp16 levels
                are looked up as low and as high bytes, and two more ``prmt`` put these together.  Sixteen levels are
                symmetric around zero: the table has the eight magnitudes, and the sign is the code's highest bit.

Instructions per level: whole bytes 0.5, nibbles 0.875, pairs of bits by table 1.375, with a sign 1.84, nibbles by table
2.375; the codes of ``codecs/octet.py`` 1.66 with 2 bits and 2.19 with 3; ranked codes, which stay at the bits of their
bytes where they are, 0.81 with 4 bits, 0.63 with 3, 0.58 with 2; floating-point codes 1.75 with 8 bits, 1.88 with 4.
``tests/kernels/test_ptx.py`` runs these very strings over all inputs.
"""

import struct

from .target import tl, triton

WHOLE_BYTES = """{
    prmt.b32 $0, $2, 0, 0x4240;
    prmt.b32 $1, $2, 0, 0x4341;
}"""

NIBBLES = """{
    .reg .b32 x4, x8, x12;
    shr.u32 x4, $4, 4;
    shr.u32 x8, $4, 8;
    shr.u32 x12, $4, 12;
    and.b32 $0, $4, 0x000f000f;
    and.b32 $1, x8, 0x000f000f;
    and.b32 $2, x4, 0x000f000f;
    and.b32 $3, x12, 0x000f000f;
}"""

# Sign, exponent and mantissa of ``codecs/small_float.py`` to their places in fp16: numbers times 2^-8 and times 2^-14.
FLOAT8 = """{
    .reg .b32 x, s;
    shl.b32 s, $2, 8;
    shl.b32 x, $2, 7;
    and.b32 s, s, 0x80008000;
    lop3.b32 $0, x, 0x3f803f80, s, 0xea;
    and.b32 s, $2, 0x80008000;
    shr.u32 x, $2, 1;
    lop3.b32 $1, x, 0x3f803f80, s, 0xea;
}"""


def _float4() -> str:
    lines = ["{", "    .reg .b32 x, s;"]
    # Bits that the highest one of a nibble is moved by to the highest of its half, and the others.
    for part, (sign, rest) in enumerate(
        (
            ("shl.b32 s, $4, 12", "shl.b32 x, $4, 9"),
            ("shl.b32 s, $4, 4", "shl.b32 x, $4, 1"),
            ("shl.b32 s, $4, 8", "shl.b32 x, $4, 5"),
            ("mov.b32 s, $4", "shr.u32 x, $4, 3"),
        )
    ):
        lines += [f"    {sign};", f"    {rest};", "    and.b32 s, s, 0x80008000;"]
        lines.append(f"    lop3.b32 ${part}, x, 0x0e000e00, s, 0xea;")
    return "\n".join([*lines, "}"])


FLOAT4 = _float4()

# Codes of ``codecs/ranked.py``: a step that is divided by a power of two takes the place of a shift.  Words of
# ``codes`` are in $8, of ``rest`` in $9.
RANKED_4 = """{
    .reg .b32 x, a8, b8;
    shl.b32 x, $8, 2;
    lop3.b32 x, x, $9, 0x3c3c3c3c, 0xe4;
    and.b32 $0, x, 0x003f003f;
    shr.u32 x, x, 8;
    and.b32 $1, x, 0x003f003f;
    shr.u32 a8, $8, 8;
    and.b32 $2, $8, 0x00f000f0;
    and.b32 $3, a8, 0x00f000f0;
    shr.u32 b8, $9, 8;
    and.b32 $4, $9, 0x001c001c;
    and.b32 $5, b8, 0x001c001c;
    and.b32 $6, $9, 0x00e000e0;
    and.b32 $7, b8, 0x00e000e0;
}"""

RANKED_2 = """{
    .reg .b32 a8;
    shr.u32 a8, $6, 8;
    and.b32 $0, $6, 0x000f000f;
    and.b32 $1, a8, 0x000f000f;
    and.b32 $2, $6, 0x00300030;
    and.b32 $3, a8, 0x00300030;
    and.b32 $4, $6, 0x00c000c0;
    and.b32 $5, a8, 0x00c000c0;
}"""

# Steps of two words, whose bytes become bits 14 to 7 of fp16 numbers.
RANKED_STEPS = """{
    shl.b32 $0, $2, 7;
    and.b32 $0, $0, 0x7f807f80;
    shr.u32 $1, $2, 1;
    and.b32 $1, $1, 0x7f807f80;
}"""


def _ranked_3() -> str:
    """Four words of ``codes`` in ``$16`` and ``$17``, their bytes of ``rest`` in ``$18``."""
    lines = ["{", "    .reg .b32 a8, x;"]
    for pair, selector in ((0, "0x4140"), (1, "0x4342")):
        a = f"${16 + pair}"
        lines += [f"    shr.u32 a8, {a}, 8;", f"    prmt.b32 x, $18, 0, {selector};"]
        sources = ((a, 0x0F), ("a8", 0x0F), (a, 0xF0), ("a8", 0xF0), ("x", 0x03), ("x", 0x30), ("x", 0x0C), ("x", 0xC0))
        for part, (source, mask) in enumerate(sources):
            lines.append(f"    and.b32 ${2 * part + pair}, {source}, 0x{mask * 0x10001:08x};")
    return "\n".join([*lines, "}"])


RANKED_3 = _ranked_3()


def _tables(levels: tuple[float, ...]) -> list[str]:
    """Low bytes, then high bytes, of four or eight fp16 ``levels``, four in a word, as immediates."""
    halves = [struct.unpack("<H", struct.pack("<e", level))[0] for level in levels]
    planes = [bytes(half & 0xFF for half in halves), bytes(half >> 8 for half in halves)]
    return [f"0x{int.from_bytes(plane[i : i + 4], 'little'):08x}" for plane in planes for i in range(0, len(plane), 4)]


def _held(low: str, high: str, operation: str = "or") -> list[str]:
    """The first four entries of both tables, in registers ``table_lo`` and ``table_hi``.

    The lowest bit of what is 0, the highest bit of a mask of lower lanes, keeps them there: plain constants end up in
    uniform registers, which ``prmt`` cannot read, and are then copied before every use.  A table whose lowest bit is 1
    is a plain constant after "or", which the assembler sees; "xor" holds it too, and takes one register more.
    """
    return [
        "    .reg .b32 nil, table_lo, table_hi;",
        "    mov.u32 nil, %lanemask_lt;",
        "    shr.u32 nil, nil, 31;",
        f"    {operation}.b32 table_lo, nil, {low};",
        f"    {operation}.b32 table_hi, nil, {high};",
        "    .reg .b32 x, s, lo, hi;",
    ]


def pair_lookup(levels: tuple[float, ...]) -> str:
    """PTX that looks up codes of 2 bits in four ``levels``."""
    low, high = _tables(levels)
    # Bytes 0, 2, 1, 3: those of the same part side by side, so that one selector serves fields f and f + 2 of a part.
    lines = ["{", *_held(low, high), "    prmt.b32 x, $8, 0, 0x3120;"]
    for field in (0, 1):
        lines += ["    shr.u32 x, x, 2;"] if field else []
        lines += ["    and.b32 s, x, 0x33333333;"]
        for byte in (0, 1):
            lines += ["    shr.u32 s, s, 16;"] if byte else []
            lines += [
                "    prmt.b32 lo, table_lo, 0, s;",
                "    prmt.b32 hi, table_hi, 0, s;",
                f"    prmt.b32 ${2 * field + byte}, lo, hi, 0x6240;",
                f"    prmt.b32 ${2 * field + byte + 4}, lo, hi, 0x7351;",
            ]
    return "\n".join([*lines, "}"])


def signed_pair_lookup(magnitudes: tuple[float, ...]) -> str:
    """PTX that looks up codes of 2 bits in four ``magnitudes`` and gives part p the sign of bit 4 (p % 2) + p // 2 of
    the word's byte of signs: four words in ``$16`` and ``$17``, their bytes in ``$18``.

    A sign is the third bit of a selector: it chooses between the bytes of the magnitudes and those of their negatives.
    """
    low, high = _tables(magnitudes)
    minus = f"0x{int(high, 16) ^ 0x80808080:08x}"
    lines = ["{", *_held(low, high, "xor"), "    .reg .b32 high_signs, signs, t;", "    shr.u32 high_signs, $18, 4;"]
    for pair, selector in ((0, "0x5410"), (1, "0x7632")):
        # Bytes in the order of those of x: the four signs of a byte of codes are the low half of each.
        lines += [f"    prmt.b32 x, ${16 + pair}, 0, 0x3120;", f"    prmt.b32 signs, $18, high_signs, {selector};"]
        # Fields f and f + 2 of a byte go to bits 2 and 6; what else the product has there is masked.
        for field, mask, factor in ((0, "0x05050505", 20), (1, "0x0a0a0a0a", 10)):
            lines += ["    shr.u32 x, x, 2;"] if field else []
            lines += [
                f"    and.b32 t, signs, {mask};",
                f"    mul.lo.u32 t, t, {factor};",
                "    and.b32 s, x, 0x33333333;",
                "    lop3.b32 s, t, 0x44444444, s, 0xea;",
            ]
            for byte in (0, 1):
                even, odd = 2 * (2 * field + byte) + pair, 2 * (2 * field + byte + 4) + pair
                lines += ["    shr.u32 s, s, 16;"] if byte else []
                lines += [
                    "    prmt.b32 lo, table_lo, table_lo, s;",
                    f"    prmt.b32 hi, table_hi, {minus}, s;",
                    f"    prmt.b32 ${even}, lo, hi, 0x6240;",
                    f"    prmt.b32 ${odd}, lo, hi, 0x7351;",
                ]
    return "\n".join([*lines, "}"])


def octet_lookup(levels: tuple[float, ...]) -> str:
    """PTX that looks up the codes of ``codecs/octet.py`` in four ``levels``: four words in ``$16`` and ``$17``.

    With eight levels bit 2 f + p of a word's byte of ``$18`` is the third bit of the code in field f of byte p.
    """
    low, *low_end = _tables(levels)[: len(levels) // 4]
    high, *high_end = _tables(levels)[len(levels) // 4 :]
    lines = [
        "{",
        # The lowest bit of some table is 1 here and 0 there: "xor" holds both.
        *_held(low, high, "xor"),
        "    .reg .b32 b0, b1, v, t, u, g;",
        # The even bytes of four words, and the odd ones: signs are the same for both.
        "    prmt.b32 b0, $16, $17, 0x6420;",
        "    prmt.b32 b1, $16, $17, 0x7531;",
        "    xor.b32 v, b0, b1;",
        "    shr.u32 t, v, 2;",
    ]
    if len(levels) == 4:
        # Signs of fields f and f + 2 at bits 2 and 6, where a selector wants them: v turned by 0, 2 and 4 bits.
        lines += [
            "    .reg .b32 n0, n1;",
            "    shl.b32 u, v, 6;",
            "    lop3.b32 g, t, u, 0x3f3f3f3f, 0xe4;",
            "    lop3.b32 n0, v, g, 0x44444444, 0x28;",
            "    shr.u32 t, v, 4;",
            "    shl.b32 u, v, 4;",
            "    lop3.b32 v, t, u, 0x0f0f0f0f, 0xe4;",
            "    lop3.b32 n1, v, g, 0x44444444, 0x28;",
        ]
    else:
        # Signs of fields 0 to 3 at bit 7; the four are even in number.
        lines += [
            "    .reg .b32 n0, n1, n2, n3, m0, m1;",
            "    xor.b32 g, v, t;",
            "    shl.b32 n0, g, 5;",
            "    shl.b32 n1, g, 3;",
            "    shl.b32 n3, g, 7;",
            "    lop3.b32 n2, n0, n1, n3, 0x96;",
        ]
    for field in (0, 1):
        if len(levels) == 8:
            lines += [
                f"    prmt.b32 m0, n{field}, n{field + 2}, 0x5140;",
                f"    prmt.b32 m1, n{field}, n{field + 2}, 0x7362;",
            ]
        for byte in (0, 1):
            x = f"b{byte}"
            lines += [f"    shr.u32 {x}, {x}, 2;"] if field else []
            if len(levels) == 4:
                lines += [f"    lop3.b32 s, {x}, 0x33333333, n{field}, 0xea;"]
            else:
                move = {(0, 0): "shl.b32 t, $18, 2", (0, 1): "shl.b32 t, $18, 1", (1, 1): "shr.u32 t, $18, 1"}
                lines += [f"    {move.get((field, byte), 'mov.b32 t, $18')};"]
                lines += [f"    and.b32 s, {x}, 0x33333333;", "    lop3.b32 s, t, 0x44444444, s, 0xea;"]
            for pair in (0, 1):
                even, odd = (2 * (2 * f + byte) + pair for f in (field, field + 2))
                lines += ["    shr.u32 s, s, 16;"] if pair else []
                if len(levels) == 4:
                    minus = f"0x{int(high, 16) ^ 0x80808080:08x}"
                    lines += [
                        "    prmt.b32 lo, table_lo, table_lo, s;",
                        f"    prmt.b32 hi, table_hi, {minus}, s;",
                    ]
                else:
                    lines += [
                        f"    prmt.b32 lo, table_lo, {low_end[0]}, s;",
                        f"    prmt.b32 hi, table_hi, {high_end[0]}, s;",
                        f"    lop3.b32 hi, hi, m{pair}, 0x80808080, 0x78;",
                    ]
                lines += [f"    prmt.b32 ${even}, lo, hi, 0x6240;", f"    prmt.b32 ${odd}, lo, hi, 0x7351;"]
    return "\n".join([*lines, "}"])


def nibble_lookup(levels: tuple[float, ...]) -> str:
    """PTX that looks up nibbles in sixteen ``levels`` with ``levels[15 - i] == -levels[i]``."""
    if any(a != -b for a, b in zip(levels, reversed(levels), strict=True)):
        raise ValueError("the sixteen levels of nibble_lookup must be symmetric around zero")
    low, low_end, high, high_end = _tables(levels[8:])
    lines = [
        "{",
        *_held(low, high),
        "    .reg .b32 x4, t, u, sign;",
        "    prmt.b32 x, $4, 0, 0x3120;",
        # Codes below 8 count their magnitude downwards: flip the low 3 bits where the highest is 0.
        "    lop3.b32 t, x, 0x88888888, 0, 0x0c;",
        "    shr.u32 u, t, 3;",
        "    sub.u32 u, t, u;",
        "    lop3.b32 s, x, u, 0x77777777, 0x28;",
        "    shl.b32 x4, x, 4;",
    ]
    for byte, selector in ((0, "0xd9c8"), (1, "0xfbea")):
        lines += ["    shr.u32 s, s, 16;"] if byte else []
        lines += [
            f"    prmt.b32 lo, table_lo, {low_end}, s;",
            f"    prmt.b32 hi, table_hi, {high_end}, s;",
            # All bits of a byte from the highest bit of its code.
            f"    prmt.b32 sign, x4, x, {selector};",
            "    lop3.b32 hi, hi, sign, 0x80808080, 0xf2;",
            f"    prmt.b32 ${byte}, lo, hi, 0x6240;",
            f"    prmt.b32 ${byte + 2}, lo, hi, 0x7351;",
        ]
    return "\n".join([*lines, "}"])


def signed_octet_lookup(levels: tuple[float, ...], byte: int) -> str:
    """PTX that looks up the low 3 bits of the nibbles of byte 0 or 1 in eight ``levels``, and adds the fp16 number in
    ``$3`` where the highest bit is set, or subtracts it where it is not; one number for each of the two words."""
    low, low_end, high, high_end = _tables(levels)
    lines = ["{", *_held(low, high), "    prmt.b32 x, $2, 0, 0x3120;", "    and.b32 s, x, 0x77777777;"]
    lines += ["    shr.u32 s, s, 16;"] if byte else []
    lines += [
        f"    prmt.b32 lo, table_lo, {low_end}, s;",
        f"    prmt.b32 hi, table_hi, {high_end}, s;",
        "    prmt.b32 $0, lo, hi, 0x6240;",
        "    prmt.b32 $1, lo, hi, 0x7351;",
    ]
    for field, shift in enumerate((4, 0) if byte else (12, 8)):
        lines += [
            f"    shl.b32 x, $2, {shift};",
            # The number with its sign flipped where the bit is 0.
            "    lop3.b32 x, x, 0x80008000, $3, 0xa6;",
            f"    add.f16x2 ${field}, ${field}, x;",
        ]
    return "\n".join([*lines, "}"])


_WHOLE_BYTES, _NIBBLES = tl.constexpr(WHOLE_BYTES), tl.constexpr(NIBBLES)
_RANKED_4, _RANKED_3, _RANKED_2 = tl.constexpr(RANKED_4), tl.constexpr(RANKED_3), tl.constexpr(RANKED_2)
_RANKED_STEPS = tl.constexpr(RANKED_STEPS)


@triton.jit
def run_on_words(words, ASM: tl.constexpr, PARTS: tl.constexpr):
    """Run ``ASM`` on int16 ``words``; a tuple of ``PARTS`` fp16 tensors of their shape."""
    if PARTS == 2:
        return tl.inline_asm_elementwise(ASM, "=&r,=&r,r", [words], (tl.float16,) * 2, True, 2)
    elif PARTS == 4:
        return tl.inline_asm_elementwise(ASM, "=&r,=&r,=&r,=&r,r", [words], (tl.float16,) * 4, True, 2)
    else:
        return tl.inline_asm_elementwise(ASM, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [words], (tl.float16,) * 8, True, 2)


@triton.jit
def run_on_four_words(words, ASM: tl.constexpr):
    """Run ``ASM`` on int16 ``words``, four at a time; eight fp16 tensors of their shape."""
    CONSTRAINTS: tl.constexpr = "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r"
    return tl.inline_asm_elementwise(ASM, CONSTRAINTS, [words], (tl.float16,) * 8, True, 4)


@triton.jit
def run_on_words_and_bytes(words, others, ASM: tl.constexpr):
    """Run ``ASM`` on int16 ``words`` and uint8 ``others`` of their shape; eight fp16 tensors of it."""
    # Four at a time, which fill a register with bytes.
    CONSTRAINTS: tl.constexpr = "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r"
    return tl.inline_asm_elementwise(ASM, CONSTRAINTS, [words, others], (tl.float16,) * 8, True, 4)


@triton.jit
def run_on_words_and_numbers(words, numbers, ASM: tl.constexpr):
    """Run ``ASM`` on int16 ``words`` and fp16 ``numbers`` that broadcast to them; two fp16 tensors of their shape."""
    return tl.inline_asm_elementwise(ASM, "=&r,=&r,r,r", [words, numbers], (tl.float16,) * 2, True, 2)


@triton.jit
def whole_bytes(words):
    """Two parts of codes of 8 bits, times 2^-24."""
    return run_on_words(words, _WHOLE_BYTES, 2)


@triton.jit
def nibbles(words):
    """Four parts of codes of 4 bits, times 2^-24."""
    return run_on_words(words, _NIBBLES, 4)


@triton.jit
def ranked_4(words, rest):
    """Eight parts of codes from int16 words of both planes, times 2^-24 and a unit (``unpack.py``)."""
    CONSTRAINTS: tl.constexpr = "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r"
    return tl.inline_asm_elementwise(_RANKED_4, CONSTRAINTS, [words, rest], (tl.float16,) * 8, True, 2)


@triton.jit
def ranked_3(words, rest):
    """The same from int16 words and a byte of uint8 ``rest`` for each."""
    return run_on_words_and_bytes(words, rest, _RANKED_3)


@triton.jit
def ranked_2(words):
    """Six parts of codes, from int16 words alone."""
    CONSTRAINTS: tl.constexpr = "=&r,=&r,=&r,=&r,=&r,=&r,r"
    return tl.inline_asm_elementwise(_RANKED_2, CONSTRAINTS, [words], (tl.float16,) * 6, True, 2)


@triton.jit
def ranked_steps(words):
    """The steps, fp16, in the low and in the high bytes of int16 ``words``."""
    return run_on_words(words, _RANKED_STEPS, 2)


@triton.jit
def program_again(AXIS: tl.constexpr):
    """``tl.program_id(AXIS)`` of axis 0 or 1, read anew.

    A compiler computes what follows from the program's id once, at the start, and keeps it in registers up to its last
    use, over a loop that has none to spare.  It cannot know that this is the same number.
    """
    ASM: tl.constexpr = "mov.u32 $0, %ctaid.x;" if AXIS == 0 else "mov.u32 $0, %ctaid.y;"
    return tl.inline_asm_elementwise(ASM, "=r", [], tl.int32, False, 1)
