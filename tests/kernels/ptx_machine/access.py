"""Loads, stores, asynchronous copies, and the fences that this machine has no use for."""

import re
from typing import Any

import numpy as np

from .arithmetic import Builder
from .formats import SIGNED, UNSIGNED, bits_of, is_signed, numbers
from .instruction import Instruction

_HINTS = "relaxed gpu cta weak ca cg cs lu cv nc L1_evict_last L1_evict_first L1_evict_normal L1_no_allocate"


def _access(instruction: Instruction) -> tuple[str, int, int]:
    """Memory, bits of an element, and elements."""
    # Without a memory in its name it is a generic address, which Triton's kernels have of the stack alone.
    space = next((name for name in ("shared", "global") if instruction.has(name, f"{name}_cta")), "local")
    count = next((int(m[1:]) for m in instruction.modifiers if re.fullmatch(r"v\d", m)), 1)
    bits = bits_of(instruction.kind)
    instruction.narrows(space, bits // 8)
    return space, bits, count


def active_threads(run: Any, active: Any) -> np.ndarray:
    return run.all if active is None else np.flatnonzero(active)


def _load(instruction: Instruction) -> Any:
    if instruction.has("param"):
        return _load_parameter(instruction)
    space, bits, count = _access(instruction)
    kernel, where = instruction.kernel, instruction.where
    kind = instruction.kind if is_signed(instruction.kind) else f"u{bits}"
    registers = [None if name == "_" else kernel.register(name) for name in instruction.parts(0)]
    widths = [0 if register is None else bits_of(kernel.kinds[register]) for register in registers]
    address = instruction.address(instruction.operands[1])

    def load(run: Any, active: Any) -> None:
        threads = active_threads(run, active)
        if not len(threads):
            return
        memory, offsets = run.locate(space, address(run), threads)
        good, granules = memory.allowed(run, threads, offsets, bits // 8 * count, where, "read")
        if good is not None:  # registers keep what they had
            threads, offsets = threads[good], offsets[good]
        memory.note_read(run, threads, granules, where)
        for register, width, value in zip(registers, widths, memory.load(offsets, bits, count), strict=True):
            if register is None:
                continue
            wide = (SIGNED if is_signed(kind) else UNSIGNED)[width]
            value = numbers(value, kind).astype(wide).view(UNSIGNED[width])
            if len(threads) == run.lanes:
                run.registers[register] = value
            else:
                run.registers[register] = run.registers[register].copy()
                run.registers[register][threads] = value

    return load


def _load_parameter(instruction: Instruction) -> Any:
    name = instruction.operands[1].strip("[] ")
    target = instruction.target(instruction.operands[0], f"b{bits_of(instruction.kind)}")
    return lambda run, active: target(run, active, run.special[name])


def _store(instruction: Instruction) -> Any:
    space, bits, _ = _access(instruction)
    sources = [instruction.raw(name, bits) for name in instruction.parts(1)]
    address, where = instruction.address(instruction.operands[0]), instruction.where

    def store(run: Any, active: Any) -> None:
        threads = active_threads(run, active)
        if len(threads):
            memory, offsets = run.locate(space, address(run), threads)
            values = [np.broadcast_to(source(run), run.lanes)[threads] for source in sources]
            memory.store(run, threads, offsets, bits, values, where)

    return store


def _asynchronous(instruction: Instruction) -> Any:
    """``cp.async``: what it writes is there when its thread has waited for the group, and poison until then."""
    kind = instruction.modifiers[1]
    if kind == "commit_group":
        return lambda run, active: run.copies.commit(active)
    if kind in ("wait_group", "wait_all"):
        left = int(instruction.operands[0]) if instruction.operands else None
        return lambda run, active: run.copies.wait(run, active, left)
    if instruction.modifiers[0] != "async" or kind not in ("ca", "cg"):
        raise instruction.refusal()
    to, source = (instruction.address(operand) for operand in instruction.operands[:2])
    size, where = int(instruction.operands[2], 0), instruction.where
    # Bytes that are copied; the rest of ``size`` becomes zeros.
    given = instruction.raw(instruction.operands[3] if len(instruction.operands) > 3 else str(size), 32)
    instruction.narrows("shared", size)
    instruction.narrows("global", 2)

    def copy(run: Any, active: Any) -> None:
        threads = active_threads(run, active)
        if not len(threads):
            return
        count = np.broadcast_to(given(run), run.lanes)[threads].astype(np.int64)
        data = np.zeros((len(threads), size), np.uint8)
        for length in np.unique(count[count > 0]):
            some = np.flatnonzero(count == length)
            memory, offsets = run.locate("global", source(run), threads[some])
            good, granules = memory.allowed(run, threads[some], offsets, int(length), where, "read")
            if good is not None:
                some, offsets = some[good], offsets[good]
            memory.note_read(run, threads[some], granules, where)
            data[some, :length] = memory.data[offsets[:, None] + np.arange(length)]
        memory, offsets = run.locate("shared", to(run), threads)
        good, granules = memory.allowed(run, threads, offsets, size, where, "write")
        if good is not None:
            threads, offsets, data = threads[good], offsets[good], data[good]
        run.copies.begin(run, threads, offsets, data, granules, where)

    return copy


def _nothing(instruction: Instruction) -> Any:
    """Caches and fences: every access here is seen at once by everybody, or reported."""
    return lambda run, active: None


OPCODES: dict[str, tuple[Builder, str]] = {
    "ld": (_load, f"global shared shared_cta param local v2 v4 v8 {_HINTS}"),
    "st": (_store, f"global shared shared_cta local v2 v4 v8 wb {_HINTS}"),
    "cp": (_asynchronous, "async ca cg shared shared_cta global commit_group wait_group wait_all"),
    "fence": (_nothing, "proxy async shared_cta acq_rel sc cta gpu"),
    "membar": (_nothing, "cta gl"),
    "prefetch": (_nothing, "global L1 L2"),
}
