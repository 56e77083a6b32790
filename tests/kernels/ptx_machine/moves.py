"""Moves, choices, comparisons and conversions."""

import re
from typing import Any

import numpy as np

from .arithmetic import Builder
from .formats import ROUND, SIGNED, UNSIGNED, bf16_bits, bits_of, f16_bits, is_real, is_signed, to_integer
from .instruction import Instruction, elementwise


def _move(instruction: Instruction) -> Any:
    kind = "pred" if instruction.kind == "pred" else f"b{bits_of(instruction.kind)}"
    if not instruction.operands[0].startswith("{"):
        return elementwise(lambda a: a, [kind], kind)(instruction)
    names, bits = instruction.parts(0), bits_of(kind)
    width = bits // len(names)
    source = instruction.raw(instruction.operands[1], bits)
    targets = [instruction.target(name, f"b{width}") for name in names]

    def split(run: Any, active: Any) -> None:
        value = source(run)
        for i, target in enumerate(targets):
            target(run, active, (value >> UNSIGNED[bits](width * i)).astype(UNSIGNED[width]))

    return split


def _select(instruction: Instruction) -> Any:
    kind = f"b{bits_of(instruction.kind)}"
    return elementwise(lambda a, b, p: np.where(p, a, b), [kind, kind, "pred"], kind)(instruction)


_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_OF_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_JOINS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _compare(instruction: Instruction) -> Any:
    """``setp``: with a "u" behind the comparison of floats it is true for NaN, and false without."""
    comparison, kind = instruction.modifiers[0], instruction.kind
    real = is_real(kind)
    join = next((_JOINS[m] for m in instruction.modifiers[1:] if m in _JOINS), None)
    name = _OF_UNSIGNED.get(comparison, comparison)
    unordered = real and len(name) == 3 and name.endswith("u")
    name = name[:2] if unordered else name
    if name not in _COMPARISONS and comparison not in ("num", "nan"):
        raise instruction.refusal()

    def compare(a: np.ndarray, b: np.ndarray, *other: np.ndarray) -> np.ndarray:
        nan = np.isnan(a) | np.isnan(b) if real else False
        if comparison in ("num", "nan"):
            result = nan if comparison == "nan" else ~nan
        else:
            result = _COMPARISONS[name](a, b)
            if real:
                result = result | nan if unordered else result & ~nan
        return join(result, other[0]) if join else result

    first, _, second = instruction.operands[0].partition("|")
    if not second:
        return elementwise(compare, [kind, kind, "pred"], "pred")(instruction)
    if join or not kind.endswith("x2"):
        raise instruction.refusal("two predicates")
    one, two = (instruction.source(operand, kind) for operand in instruction.operands[1:3])
    targets = [instruction.target(name, "pred") for name in (first, second)]

    def halves(run: Any, active: Any) -> None:
        result = compare(one(run), two(run))
        for i, target in enumerate(targets):
            target(run, active, np.ascontiguousarray(result[i::2]))

    return halves


def _tensor_float(x: np.ndarray) -> np.ndarray:
    """float32 to tf32: ten bits behind the point, ties away from zero."""
    u = x.view(np.uint32)
    return np.where(np.isfinite(x), (u + np.uint32(0x1000)) & ~np.uint32(0x1FFF), u)


def _convert(instruction: Instruction) -> Any:
    to, source = instruction.modifiers[-2:]
    rounding = next((m for m in instruction.modifiers if re.fullmatch(r"r[nzmp]i?|rna", m)), "")
    if rounding == "rna" or to == "tf32":
        if (rounding, to, source) != ("rna", "tf32", "f32"):
            raise instruction.refusal()
        return elementwise(_tensor_float, ["f32"], "b32")(instruction)
    if to.endswith("x2"):
        return _convert_pair(instruction, to, source)
    if is_real(source) and not is_real(to):
        return elementwise(lambda x: to_integer(x, to, rounding), [source], f"u{bits_of(to)}")(instruction)
    if is_real(source):
        whole = ROUND.get(rounding, lambda x: x)
        return elementwise(whole, [source], to)(instruction)
    if is_real(to):
        between = np.float32 if to == "f32" else np.float64  # what an integer is rounded to, or exact in
        return elementwise(lambda x: x.astype(between), [source], to)(instruction)
    bits = bits_of(to)
    wide = (SIGNED if is_signed(source) else UNSIGNED)[bits]
    return elementwise(lambda x: x.astype(wide).view(UNSIGNED[bits]), [source], f"u{bits}")(instruction)


def _convert_pair(instruction: Instruction, to: str, source: str) -> Any:
    """Two float32 numbers to a packed register: the first one becomes the upper half."""
    if source != "f32" or to not in ("f16x2", "bf16x2"):
        raise instruction.refusal()
    bits = bf16_bits if to == "bf16x2" else f16_bits

    def pack(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        upper, lower = (bits(np.atleast_1d(x)).astype(np.uint32) for x in (high, low))
        return (upper << np.uint32(16)) | lower

    return elementwise(pack, ["f32", "f32"], "b32")(instruction)


OPCODES: dict[str, tuple[Builder, str]] = {
    "mov": (_move, ""),
    "selp": (_select, ""),
    "setp": (_compare, " ".join([*_COMPARISONS, "ltu leu gtu geu equ neu num nan ftz", *_OF_UNSIGNED, *_JOINS])),
    "cvt": (_convert, "rn rna rni rzi rmi rpi ftz"),
    "cvta": (elementwise(lambda a: a), "local global shared to"),
}
