"""One instruction, and how its operands are read and written.

A *source* takes a ``Run`` and returns an operand for all its threads; a *target* takes a ``Run``, the active threads
(None for all) and the values.  Both are made once, when a kernel is parsed.
"""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .formats import UNSIGNED, bits_of, flushed, numbers, raw_bits

if TYPE_CHECKING:
    from .parser import Kernel
    from .run import Run

Source = Callable[["Run"], Any]
Target = Callable[["Run", Any, Any], None]

SHARED_BASE = 1024  # the first KiB of the window belongs to the system
LOCAL_BASE = 0x7E00_0000_0000
GLOBAL_BASE = 0x7F40_0000_0000

_KIND = re.compile(r"(?:[bsuf]|bf|tf)\d+(?:x2)?|pred")
_SPECIAL = re.compile(r"%(?:tid|ctaid|ntid|nctaid)\.[xyz]|%laneid|%warpid|%lanemask_lt")
_SYMBOLS = {"global_smem": SHARED_BASE, "__local_depot0": LOCAL_BASE}


class PtxError(Exception):
    """The machine cannot go on: something that it does not implement, or a warp that is not whole where it must be."""


class Instruction:
    """``name``, ``modifiers`` (types among them) and ``kinds`` (the types alone), ``operands``, and ``where`` it is."""

    def __init__(self, kernel: "Kernel", opcode: str, operands: list[str], where: str) -> None:
        self.kernel, self.opcode, self.operands, self.where = kernel, opcode, operands, where
        self.name, *self.modifiers = opcode.replace("::", "_").split(".")
        self.kinds = [modifier for modifier in self.modifiers if _KIND.fullmatch(modifier)]

    @property
    def kind(self) -> str:
        """The last type named, which is that of the operands if there is one alone."""
        return self.kinds[-1] if self.kinds else ""

    def has(self, *modifiers: str) -> bool:
        return any(modifier in self.modifiers for modifier in modifiers)

    def require(self, understood: str) -> None:
        """Refuse modifiers that are neither types nor among the words of ``understood``."""
        unknown = set(self.modifiers) - set(self.kinds) - set(understood.split())
        if unknown:
            raise self.refusal(f"modifier {', '.join(sorted(unknown))}")

    def refusal(self, what: str = "") -> PtxError:
        return PtxError(f"the PTX machine does not implement {self.opcode}{what and f' ({what})'}: {self.where}")

    def parts(self, operand: int) -> list[str]:
        """Names in a vector operand ``{a, b}``, or the one name."""
        return [name.strip() for name in self.operands[operand].strip("{} ").split(",")]

    def narrows(self, space: str, width: int) -> None:
        """Note an access of ``width`` bytes."""
        self.kernel.grain[space] = min(self.kernel.grain[space], width)

    def raw(self, operand: str, bits: int) -> Source:
        """Source of unsigned numbers of ``bits``; bool for 1."""
        if operand.startswith("!"):
            inverse = self.raw(operand[1:], bits)
            return lambda run: ~inverse(run)
        if operand.startswith("{"):
            return self._joined([name.strip() for name in operand[1:-1].split(",")], bits)
        if _SPECIAL.fullmatch(operand):
            return lambda run: run.special[operand]
        if operand in _SYMBOLS:
            return _constant(_SYMBOLS[operand], bits)
        if real := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]+)", operand):
            return _constant(int(real[1], 16), bits)
        if re.match(r"-?\d", operand):
            return _constant(int(operand.rstrip("U"), 0), bits)
        index = self.kernel.register(operand)
        if bits_of(self.kernel.kinds[index]) == bits:
            return lambda run: run.registers[index]
        return lambda run: run.registers[index].astype(UNSIGNED[bits])  # the low bits, or zeros above

    def _joined(self, names: Sequence[str], bits: int) -> Source:
        width = bits // len(names)
        parts = [self.raw(name, width) for name in names]

        def join(run: "Run") -> Any:
            total = UNSIGNED[bits](0)
            for i, part in enumerate(parts):
                total = total | (part(run).astype(UNSIGNED[bits]) << UNSIGNED[bits](width * i))
            return total

        return join

    def source(self, operand: str, kind: str) -> Source:
        """Source of numbers of type ``kind``."""
        raw = self.raw(operand, bits_of(kind))
        if kind == "pred" or (kind[0] in "bu" and not kind.startswith("bf")):
            return raw
        if kind.endswith("x2"):
            return lambda run: numbers(np.broadcast_to(raw(run), run.lanes), kind)
        if kind == "f32" and self.has("ftz"):
            return lambda run: flushed(numbers(raw(run), kind))
        return lambda run: numbers(raw(run), kind)

    def target(self, operand: str, kind: str) -> Target:
        """Target of numbers of type ``kind``; a wider register gets zeros above."""
        if operand == "_":
            return lambda run, active, values: None
        index = self.kernel.register(operand)
        bits = bits_of(self.kernel.kinds[index])
        flushes = kind == "f32" and self.has("ftz")

        def write(run: "Run", active: Any, values: Any) -> None:
            raw = raw_bits(flushed(values) if flushes else values, kind)
            if bits > 1 and raw.dtype.itemsize * 8 != bits:
                raw = raw.astype(UNSIGNED[bits])
            if np.ndim(raw) == 0 or len(raw) != run.lanes:
                raw = np.broadcast_to(raw, run.lanes).copy()
            run.registers[index] = raw if active is None else np.where(active, raw, run.registers[index])

        return write

    def address(self, operand: str) -> Source:
        """Source of the int64 addresses ``[register + offset]``."""
        base, _, offset = operand.strip("[] ").partition("+")
        base, distance = base.strip(), int(offset or "0", 0)
        wide = base.startswith("%") and bits_of(self.kernel.kinds[self.kernel.register(base)]) == 64
        raw = self.raw(base, 64 if wide else 32)
        return lambda run: np.asarray(raw(run)).astype(np.int64) + distance


def _constant(value: int, bits: int) -> Source:
    constant = bool(value & 1) if bits == 1 else UNSIGNED[bits](value & ((1 << bits) - 1))
    return lambda run: constant


def elementwise(
    function: Callable[..., Any], kinds: Sequence[str] | None = None, result: str = ""
) -> Callable[[Instruction], Any]:
    """Builder of ``target = function(*sources)``; types are the instruction's own unless they are given.

    An instruction of two types has the first for its target and its last source, and the second, narrower one for the
    other sources: ``sub.rn.f32.f16``.
    """

    def build(instruction: Instruction) -> Callable[["Run", Any], None]:
        first, *others = instruction.operands
        types = list(kinds or [instruction.kind] * len(others))
        if kinds is None and len(instruction.kinds) == 2:
            types[-1] = instruction.kinds[0]
        target = instruction.target(first, result or (instruction.kinds[0] if instruction.kinds else types[0]))
        sources = [instruction.source(operand, kind) for operand, kind in zip(others, types, strict=False)]
        if len(sources) == 1:
            (only,) = sources
            return lambda run, active: target(run, active, function(only(run)))
        if len(sources) == 2:
            one, two = sources
            return lambda run, active: target(run, active, function(one(run), two(run)))
        return lambda run, active: target(run, active, function(*[source(run) for source in sources]))

    return build
