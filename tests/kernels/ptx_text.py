"""Kernels written by hand, and numbers as the IEEE formats define them, for the checks of the PTX machine itself."""

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from kernels.ptx_machine import Machine

COUNT = 400  # rows of numbers for each check
DTYPES = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
# Bits with the leading one, exponents of the smallest and of the largest normal number, and bits of the exponent.
FORMATS = {"f16": (11, -14, 15, 5), "bf16": (8, -126, 127, 8), "f32": (24, -126, 127, 8)}


def kernel(body: str, parameters: int, threads: int = 32, registers: str = "") -> str:
    """PTX of a kernel ``k`` with pointers as parameters.  Registers are %r0 to %r15, %d0 to %d15 (64 bits), %p0 to %p3,
    and what ``registers`` declares."""
    pointers = ",\n".join(f".param .u64 .ptr .global .align 1 k_param_{i}" for i in range(parameters))
    return f"""
.version 8.7
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
{pointers}
)
.reqntid {threads}
{{
.reg .b32 %r<16>;
.reg .b64 %d<16>;
.reg .pred %p<4>;
{registers}
{body}
ret;
}}
"""


def pointer(register: str, parameter: int, width: int, index: str = "%r0") -> str:
    """Code that makes ``register`` the address of element ``index`` of ``width`` bytes."""
    return f"ld.param.b64 {register}, [k_param_{parameter}];\nmad.wide.s32 {register}, {index}, {width}, {register};\n"


def evaluate(code: str, inputs: Sequence[np.ndarray], results: int, result_bits: int = 32) -> list[np.ndarray]:
    """%o0 and following after ``code``, which reads %a, %b and %c, for unsigned inputs of any width; unsigned."""
    count = -(-len(inputs[0]) // 32) * 32
    body = "mov.u32 %r0, %ctaid.x;\nmov.u32 %r1, %tid.x;\nmad.lo.s32 %r0, %r0, 32, %r1;\n"
    declared, tensors = f".reg .b{result_bits} %o<{results}>;\n", []
    for i, (name, given) in enumerate(zip("abc", inputs, strict=False)):
        bits = given.dtype.itemsize * 8
        declared += f".reg .b{bits} %{name};\n"
        body += pointer(f"%d{i}", i, bits // 8) + f"ld.global.b{bits} %{name}, [%d{i}];\n"
        tensors.append(torch.from_numpy(np.resize(given, count).view(f"i{bits // 8}").copy()))
    body += "".join(f"mov.b{result_bits} %o{i}, 0;\n" for i in range(results)) + f"{code}\n"
    for i in range(results):
        body += pointer("%d9", len(tensors), result_bits // 8) + f"st.global.b{result_bits} [%d9], %o{i};\n"
        tensors.append(torch.zeros(count, dtype=DTYPES[result_bits]))
    machine = Machine(lanes=1 << 16)
    machine.launch(kernel(body, len(tensors), registers=declared), 0, (count // 32,), tensors)
    machine.check()
    return [tensor.numpy()[: len(inputs[0])].view(f"u{result_bits // 8}") for tensor in tensors[len(inputs) :]]


def elementwise(code: str, inputs: Sequence[np.ndarray], result_bits: int) -> np.ndarray:
    """%o after ``code``, as of ``evaluate``."""
    return evaluate(re.sub(r"%o\b", "%o0", code), inputs, 1, result_bits)[0]


def words(count: int, bits: int = 32, seed: int = 0) -> np.ndarray:
    """Random unsigned numbers, and the ends of their range."""
    x = np.random.default_rng(seed).integers(0, 1 << bits, count, np.uint64)
    x[:5] = 0, 1, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1
    return np.roll(x, seed).astype(f"u{bits // 8}")


def floats(count: int, kind: str = "f32", seed: int = 0) -> np.ndarray:
    """Bits of random numbers of all sizes, half of them near 1, with zeros, ends, infinities and NaN."""
    digits, _, largest, width = FORMATS[kind]
    total = digits + width
    x = words(count, total, seed).astype(np.int64)
    exponent = largest - 8 + np.random.default_rng(seed + 1).integers(0, 16, count)
    near = (x & ~((1 << width) - 1 << (digits - 1))) | exponent << (digits - 1)
    x = np.where(np.arange(count) % 2 == 0, near, x)
    infinity = ((1 << width) - 1) << (digits - 1)
    edges = [0, infinity, infinity + 1, 1, (1 << (digits - 1)) - 1, 1 << (digits - 1), infinity - 1]
    edges += [edge | 1 << (total - 1) for edge in edges]
    x[: len(edges)] = edges
    return np.roll(x, 3 * seed).astype(f"u{total // 8}")


def decoded(raw: int, kind: str) -> Any:
    """A Python number: int, or float, which has every number of these formats."""
    if kind[0] in "bsu" and kind != "bf16":
        bits = int(kind[1:])
        return raw - (1 << bits) if kind[0] == "s" and raw >> (bits - 1) else raw
    digits, smallest, _, width = FORMATS[kind]
    sign, raw = (-1.0, raw - (1 << (digits + width - 1))) if raw >> (digits + width - 1) else (1.0, raw)
    exponent, fraction = raw >> (digits - 1), raw & ((1 << (digits - 1)) - 1)
    if exponent == (1 << width) - 1:
        return math.nan if fraction else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(fraction, smallest - digits + 1)
    return sign * math.ldexp(fraction + (1 << (digits - 1)), exponent - 1 + smallest - digits + 1)


def encoded(value: Any, kind: str) -> int:
    """Bits of the number of type ``kind`` that is nearest to ``value`` (int, Fraction or float), ties to even."""
    if kind[0] in "bsu" and kind != "bf16":
        return int(value) & ((1 << int(kind[1:])) - 1)
    digits, smallest, largest, width = FORMATS[kind]
    sign = (1 << (digits + width - 1)) if value < 0 or (value == 0 and math.copysign(1, value) < 0) else 0
    infinity = ((1 << width) - 1) << (digits - 1)
    if value in (math.inf, -math.inf):
        return sign | infinity
    size = abs(Fraction(value))
    exponent = smallest
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    units = round(size / Fraction(2) ** (exponent - digits + 1))  # Python rounds halves to even
    if units == 1 << digits:
        exponent, units = exponent + 1, units >> 1
    if exponent > largest:
        return sign | infinity
    return sign | (units if units < 1 << (digits - 1) else (exponent - smallest) * (1 << (digits - 1)) + units)


def differing(
    got: np.ndarray, function: Callable[..., Any], inputs: Sequence[np.ndarray], kinds: Sequence[str], result: str
) -> list[str]:
    """Where the bits ``got`` are not those of ``function`` of the numbers: of Fractions where all are finite floats.

    Any NaN is NaN, and where a Fraction is zero, zeros of both signs are right: it does not know its sign.
    """
    wrong = []
    for found, *raws in zip(got, *inputs, strict=True):
        numbers = [decoded(int(raw), kind) for raw, kind in zip(raws, kinds, strict=True)]
        if all(isinstance(number, float) and math.isfinite(number) for number in numbers):
            answer = function(*map(Fraction, numbers))
        else:
            answer = function(*numbers)
        if answer != answer:
            right = math.isnan(decoded(int(found), result))
        elif isinstance(answer, Fraction) and answer == 0:
            right = decoded(int(found), result) == 0
        else:
            right = int(found) == encoded(answer, result)
        if not right:
            wrong.append(f"{[hex(raw) for raw in raws]}: {found:#x}, should be {answer}")
    return wrong


def inputs_of(kinds: Sequence[str]) -> list[np.ndarray]:
    """Random bits for operands; those of type "n" are counts up to 40."""
    made = []
    for seed, kind in enumerate(kinds):
        if kind == "n":
            made.append(np.random.default_rng(seed).integers(0, 40, COUNT).astype(np.uint32))
        else:
            made.append(floats(COUNT, kind, seed) if kind in FORMATS else words(COUNT, int(kind[1:]), seed))
    return made


def check(code: str, kinds: str, result: str, function: Callable[..., Any]) -> None:
    """%o after ``code`` has the bits of ``function`` of the operands, whose types are ``kinds``."""
    operands = kinds.split()
    given = inputs_of(operands)
    if code.startswith(("div", "rem")):
        given[1] |= given[1].dtype.type(1)  # by zero is undefined
    got = elementwise(code, given, int(result.lstrip("bfsu")))
    wrong = differing(got, function, given, ["u32" if kind == "n" else kind for kind in operands], result)
    assert not wrong, f"{len(wrong)} of {COUNT}: {wrong[:3]}"
