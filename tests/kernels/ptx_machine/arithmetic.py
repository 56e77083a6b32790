"""Arithmetic and bits: what is done to each thread's registers alone.

Sums, products, quotients and roots are rounded once to the type, as IEEE has it.  The approximate functions (``ex2``,
``lg2``, ``rsqrt``, ``div.full``) are right to the last bit here, where a GPU may be off by two.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .formats import SIGNED, UNSIGNED, bits_of, fused, is_real, is_signed, odd_float32
from .instruction import Instruction, elementwise

Builder = Callable[[Instruction], Any]


def _extreme(instruction: Instruction) -> Any:
    """``min`` and ``max``, of three from sm_100 on; ``.relu`` puts the end of the result at zero."""
    choose = functools.partial(extreme_of_two, largest=instruction.name == "max")
    if not instruction.has("relu"):
        return elementwise(lambda *operands: functools.reduce(choose, operands))(instruction)
    if not is_signed(instruction.kind):
        raise instruction.refusal("modifier relu")
    return elementwise(lambda *operands: np.maximum(functools.reduce(choose, operands), 0))(instruction)


def extreme_of_two(a: np.ndarray, b: np.ndarray, largest: bool) -> np.ndarray:
    """Of floats NaN loses, and -0 is below +0."""
    if a.dtype.kind != "f":
        return np.maximum(a, b) if largest else np.minimum(a, b)
    zeros = (a == b) & (np.signbit(a) != np.signbit(b))
    return np.where(zeros, np.float32(0.0 if largest else -0.0), np.fmax(a, b) if largest else np.fmin(a, b))


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of integers towards zero; by zero it is anything."""
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return a // b
    size = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
    return np.where((a < 0) != (b < 0), -size, size).astype(b.dtype)


def _in_float64(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


def permuted_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """``prmt``: four bytes of ``b:a``, each chosen by three bits of a nibble; the fourth asks for the byte's sign."""
    sources = [(word >> np.uint32(8 * i)) & np.uint32(0xFF) for word in (a, b) for i in range(4)]
    pool = np.stack(np.broadcast_arrays(*sources, selector)[:8])  # [8, threads]
    selector = np.broadcast_to(selector, pool.shape[1:])
    result = np.uint32(0)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = np.take_along_axis(pool, (nibble & np.uint32(7))[None].astype(np.intp), 0)[0]
        sign = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        result = result | (np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i))
    return result


def _logic(instruction: Instruction) -> Any:
    """``lop3``: any function of three bits, by its table."""
    table = int(instruction.operands.pop(), 0)

    def combine(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        result = np.uint32(0)
        for i in range(8):
            if table >> i & 1:
                result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        return result

    return elementwise(combine)(instruction)


def _product(instruction: Instruction) -> Any:
    """``mul`` and ``mad``: ``.wide`` has a result of twice the bits, ``.hi`` keeps their upper half."""
    kind, adds = instruction.kind, instruction.name == "mad"
    if is_real(kind) or instruction.has("lo"):
        return elementwise((lambda a, b, c: a * b + c) if adds else (lambda a, b: a * b))(instruction)
    bits = bits_of(kind)
    if bits > 32:
        raise instruction.refusal()
    wide, double = f"{kind[0]}{2 * bits}", (SIGNED if is_signed(kind) else UNSIGNED)[2 * bits]
    if instruction.has("wide"):
        if adds:
            function = lambda a, b, c: a.astype(double) * b.astype(double) + c  # noqa: E731
            return elementwise(function, [kind, kind, wide], wide)(instruction)
        return elementwise(lambda a, b: a.astype(double) * b.astype(double), [kind, kind], wide)(instruction)
    if adds or not instruction.has("hi"):
        raise instruction.refusal()
    return elementwise(lambda a, b: (a.astype(double) * b.astype(double)) >> double(bits))(instruction)


def _fused(instruction: Instruction) -> Any:
    """``fma``: rounded once.  To odd on the way, so that the rounding to the type is that of the exact result."""
    if "f64" in instruction.kinds:
        raise instruction.refusal()
    # bf16 is made from float32, the others from float64.
    through_float32 = instruction.kinds[0].startswith("bf16")
    return elementwise((lambda a, b, c: odd_float32(fused(a, b, c))) if through_float32 else fused)(instruction)


def _shift(instruction: Instruction) -> Any:
    """``shl`` and ``shr``: by more bits than there are gives zero, or the sign."""
    kind, left = instruction.kind, instruction.name == "shl"
    bits, signed = bits_of(kind), is_signed(kind)
    number = (SIGNED if signed else UNSIGNED)[bits]

    def shift(a: np.ndarray, count: np.ndarray) -> np.ndarray:
        far = count >= np.uint32(bits)
        within = np.where(far, number(bits - 1), count.astype(number))
        if signed and not left:
            return a >> within
        return np.where(far, number(0), a << within if left else a >> within)

    return elementwise(shift, [kind, "u32"])(instruction)


def _funnel_shift(instruction: Instruction) -> Any:
    """``shf``: the upper (left) or lower (right) half of two words that are shifted as one."""
    left, wraps = instruction.has("l"), instruction.has("wrap")

    def shift(low: np.ndarray, high: np.ndarray, count: np.ndarray) -> np.ndarray:
        count = (count & np.uint32(31) if wraps else np.minimum(count, np.uint32(32))).astype(np.uint64)
        both = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
        return ((both << count) >> np.uint64(32) if left else both >> count).astype(np.uint32)

    return elementwise(shift, ["u32"] * 3, "b32")(instruction)


def _extract_field(instruction: Instruction) -> Any:
    """``bfe``: ``length`` bits from ``position`` on; signed ones take the sign of the field's highest bit."""
    kind = instruction.kind
    bits, signed = bits_of(kind), is_signed(kind)
    unsigned = UNSIGNED[bits]

    def extract(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        position, length = position & np.uint32(255), length & np.uint32(255)
        end = np.minimum(position + length, np.uint32(bits))
        count = np.where(end > position, end - position, np.uint32(0))
        up = (np.uint32(bits) - end).astype(unsigned)
        down = (np.uint32(bits) - np.maximum(count, np.uint32(1))).astype(unsigned)
        top = a.view(unsigned) << up  # the field to the top, and back down with or without its sign
        x = (top.view(SIGNED[bits]) >> down.astype(SIGNED[bits])).view(unsigned) if signed else top >> down
        sign = (a >> a.dtype.type(bits - 1)).view(unsigned) if signed else unsigned(0)
        return np.where(count == 0, np.where(length == 0, unsigned(0), sign), x)

    return elementwise(extract, [kind, "u32", "u32"], f"u{bits}")(instruction)


def _insert_field(instruction: Instruction) -> Any:
    """``bfi``: the low ``length`` bits of ``a`` into ``b`` at ``position``."""
    kind = instruction.kind
    bits = bits_of(kind)
    unsigned = UNSIGNED[bits]

    def insert(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        position, length = position & np.uint32(255), length & np.uint32(255)
        short = np.minimum(length, np.uint32(bits - 1)).astype(unsigned)
        ones = np.where(length >= np.uint32(bits), ~unsigned(0), (unsigned(1) << short) - unsigned(1))
        place = np.minimum(position, np.uint32(bits - 1)).astype(unsigned)
        mask = np.where(position >= np.uint32(bits), unsigned(0), ones << place)
        return (b & ~mask) | ((a << place) & mask)

    return elementwise(insert, [kind, kind, "u32", "u32"])(instruction)


# Opcode: what builds its step, and the modifiers that it understands.
OPCODES: dict[str, tuple[Builder, str]] = {
    "add": (elementwise(lambda a, b: a + b), "rn ftz"),
    "sub": (elementwise(lambda a, b: a - b), "rn ftz"),
    "mul": (_product, "rn ftz lo hi wide"),
    "mad": (_product, "lo wide"),
    "fma": (_fused, "rn ftz"),
    "div": (elementwise(quotient), "rn full approx ftz"),
    "rem": (elementwise(lambda a, b: a - quotient(a, b) * b), ""),
    "min": (_extreme, "ftz relu"),
    "max": (_extreme, "ftz relu"),
    "neg": (elementwise(lambda a: -a), "ftz"),
    "abs": (elementwise(np.abs), "ftz"),
    "sqrt": (elementwise(np.sqrt), "rn approx ftz"),
    "rcp": (elementwise(lambda a: a.dtype.type(1) / a), "rn approx ftz"),
    "rsqrt": (elementwise(_in_float64(lambda x: 1.0 / np.sqrt(x))), "approx ftz"),
    "ex2": (elementwise(_in_float64(np.exp2)), "approx ftz"),
    "lg2": (elementwise(_in_float64(np.log2)), "approx ftz"),
    "and": (elementwise(lambda a, b: a & b), ""),
    "or": (elementwise(lambda a, b: a | b), ""),
    "xor": (elementwise(lambda a, b: a ^ b), ""),
    "not": (elementwise(lambda a: ~a), ""),
    "popc": (elementwise(np.bitwise_count, result="u32"), ""),
    "prmt": (elementwise(permuted_bytes), ""),
    "lop3": (_logic, ""),
    "shl": (_shift, ""),
    "shr": (_shift, ""),
    "shf": (_funnel_shift, "l r wrap clamp"),
    "bfe": (_extract_field, ""),
    "bfi": (_insert_field, ""),
}
