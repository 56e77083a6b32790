"""Numbers as PTX has them: from the bits of a register to numbers and back, and roundings that NumPy does not have.

A register holds bits: an unsigned NumPy vector over all threads, or a bool one for a predicate.  Types are PTX's names:
``u8`` to ``b64``, ``f16``, ``bf16``, ``f32``, ``f64``, ``pred``, and with ``x2`` behind it two halves of one register.
"""

import functools
import re

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
NAN16 = np.uint16(0x7FFF)  # what a GPU makes of any NaN in 16 bits


@functools.cache
def bits_of(kind: str) -> int:
    """Bits of a register of type ``kind``; of both halves for packed types."""
    if kind == "pred":
        return 1
    width = int(re.findall(r"\d+", kind)[0])
    return width * 2 if kind.endswith("x2") else width


def is_real(kind: str) -> bool:
    return "f" in kind


def is_signed(kind: str) -> bool:
    return kind.startswith("s")


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """Bits of float32 ``x`` as bf16, to nearest even."""
    u = x.view(np.uint32)
    rounded = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), NAN16, rounded.astype(np.uint16))


def f16_bits(x: np.ndarray) -> np.ndarray:
    """Bits of float32 or float64 ``x`` as fp16, to nearest even; subnormals are kept."""
    return np.where(np.isnan(x), NAN16, x.astype(np.float16).view(np.uint16))


def numbers(raw: np.ndarray, kind: str) -> np.ndarray:
    """Bits to numbers: float32 for fp16, bf16 and float32; of packed types both halves of each register in turn."""
    base = kind.removesuffix("x2")
    if base != kind:
        raw = np.ascontiguousarray(raw).reshape(-1).view(np.uint32 if base == "f32" else np.uint16)
    if base == "f32":
        return raw.view(np.float32)
    if base == "f64":
        return raw.view(np.float64)
    if base == "f16":
        return raw.view(np.float16).astype(np.float32)
    if base == "bf16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.view(SIGNED[bits_of(base)]) if is_signed(base) else raw


def raw_bits(x: np.ndarray, kind: str) -> np.ndarray:
    """Numbers to bits, to nearest even; the inverse of ``numbers``."""
    base = kind.removesuffix("x2")
    if base == "f32":
        raw = x.astype(np.float32).view(np.uint32)
    elif base == "f64":
        raw = x.astype(np.float64).view(np.uint64)
    elif base == "f16":
        raw = f16_bits(np.asarray(x))
    elif base == "bf16":
        raw = bf16_bits(np.asarray(x, np.float32))
    elif base == "pred":
        raw = x
    else:
        raw = x.astype(UNSIGNED[bits_of(base)])
    return raw if base == kind else np.ascontiguousarray(raw).view(UNSIGNED[bits_of(kind)])


def flushed(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 numbers to zeros of the same sign (``.ftz``)."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _to_odd(rounded: np.ndarray, error: np.ndarray, bits: type, exact_sign: np.ndarray) -> np.ndarray:
    """``rounded`` where ``error`` is 0, else of the two neighbours of the exact number the one with an odd last bit.

    A number that was rounded to odd may be rounded again to fewer bits: the result is that of the exact number.
    """
    u = rounded.view(bits)
    moves = (error != 0) & ((u & 1) == 0) & np.isfinite(rounded)
    return (u + np.where(moves, np.where(exact_sign, 1, -1), 0).astype(bits)).view(rounded.dtype)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c`` of float32 numbers in float64, rounded to odd."""
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = np.atleast_1d(product + c)
    back = total - product
    error = np.atleast_1d((product - (total - back)) + (c - back))
    return _to_odd(total, error, np.int64, (error > 0) == (total > 0))


def odd_float32(x: np.ndarray) -> np.ndarray:
    """float64 to float32, rounded to odd."""
    rounded = x.astype(np.float32)
    error = x - rounded
    return _to_odd(rounded, error, np.int32, (error > 0) == (x > 0))


def to_integer(x: np.ndarray, kind: str, rounding: str) -> np.ndarray:
    """Bits of an integer; beyond its range the nearest that it has, and 0 for NaN."""
    x = ROUND[rounding](x.astype(np.float64))
    bits, signed = bits_of(kind), is_signed(kind)
    low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1)) if signed else (0.0, 2.0**bits)
    highest = np.nextafter(high, 0) if bits == 64 else high - 1
    whole = np.clip(np.where(np.isnan(x), 0.0, x), low, highest)
    return whole.astype((SIGNED if signed else UNSIGNED)[bits]).view(UNSIGNED[bits])


ROUND = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
