"""Products of matrices by a warp or four, and the moves of 8 x 8 tiles between shared memory and registers.

Which thread holds which element is from the PTX ISA, "Matrix Fragments".  Products are exact and summed in float64,
then rounded once to float32; subnormal operands count.
"""

import re
from typing import Any

import numpy as np

from .arithmetic import Builder
from .formats import numbers
from .instruction import Instruction, Source


def fragment_order(rows: int, columns: int, per_register: int, transposed: bool = False) -> np.ndarray:
    """Where the elements of an operand lie in its row-major matrix, ``[32 threads, elements]``.

    Registers hold ``per_register`` neighbours of a row (of a column if ``transposed``, as B has it); a thread's next
    register is eight rows further down, and then to the right.
    """
    if transposed:
        rows, columns = columns, rows
    thread, element = np.arange(32)[:, None], np.arange(rows * columns // 32)[None]
    register, inside = element // per_register, element % per_register
    below = rows // 8  # registers on top of each other
    row = thread // 4 + 8 * (register % below)
    column = thread % 4 * per_register + inside + 4 * per_register * (register // below)
    return column * rows + row if transposed else row * columns + column


def stacked(run: Any, sources: list[Source]) -> np.ndarray:
    """``[threads, registers]``"""
    return np.stack([np.broadcast_to(source(run), run.lanes) for source in sources], 1)


def elements(registers: np.ndarray, kind: str) -> np.ndarray:
    """float64 numbers ``[threads, elements]`` of registers with one tf32 or two halves each."""
    if kind == "tf32":
        return (registers & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return numbers(registers, f"{kind}x2").astype(np.float64).reshape(len(registers), -1)


def _multiply(instruction: Instruction) -> Any:
    """``mma.sync``: D (m x n) = A (m x k) B (k x n) + C, of one warp."""
    shape = next((m for m in instruction.modifiers if re.fullmatch(r"m\d+n\d+k\d+", m)), "")
    m, n, k = map(int, re.findall(r"\d+", shape))
    result, kind, other, sum_kind = instruction.modifiers[-4:]
    if (result, sum_kind) != ("f32", "f32") or kind != other or kind not in ("f16", "bf16", "tf32"):
        raise instruction.refusal()
    per_register = 1 if kind == "tf32" else 2
    orders = [fragment_order(m, k, per_register), fragment_order(k, n, per_register, True), fragment_order(m, n, 2)]
    back = [np.argsort(order.reshape(-1)) for order in orders]
    targets = [instruction.target(name, "f32") for name in instruction.parts(0)]
    a, b, c = ([instruction.raw(name, 32) for name in instruction.parts(operand)] for operand in (1, 2, 3))
    where = instruction.where

    def multiply(run: Any, active: Any) -> None:
        run.whole_warps(active, where)
        x = elements(stacked(run, a), kind).reshape(-1, m * k)[:, back[0]].reshape(-1, m, k)
        y = elements(stacked(run, b), kind).reshape(-1, k * n)[:, back[1]].reshape(-1, k, n)
        z = stacked(run, c).view(np.float32).reshape(-1, m * n)[:, back[2]].reshape(-1, m, n)
        d = (x @ y + z).astype(np.float32).reshape(-1, m * n)[:, orders[2].reshape(-1)].reshape(run.lanes, -1)
        for i, target in enumerate(targets):
            target(run, active, np.ascontiguousarray(d[:, i]))

    return multiply


def _load_matrix(instruction: Instruction) -> Any:
    """``ldmatrix``: threads 8 i to 8 i + 7 have the addresses of the rows of tile i."""
    instruction.narrows("shared", 16)
    address, where, transposed = (
        instruction.address(instruction.operands[1]),
        instruction.where,
        instruction.has("trans"),
    )
    targets = [instruction.target(name, "b32") for name in instruction.parts(0)]
    tiles = len(targets)

    def load(run: Any, active: Any) -> None:
        warps = run.whole_warps(active, where)
        threads = (warps[:, None] * 32 + np.arange(8 * tiles)).reshape(-1)
        memory, offsets = run.locate("shared", address(run), threads)
        good, granules = memory.allowed(run, threads, offsets, 16, where, "read")
        if good is not None:  # which are reported; zeros for them
            offsets = np.where(good, offsets, 0)
        memory.note_read(run, threads if good is None else threads[good], granules, where)
        rows = np.stack(memory.load(offsets, 16, 8), 1).reshape(len(warps), tiles, 8, 8)
        rows = np.ascontiguousarray(rows.swapaxes(2, 3) if transposed else rows)
        words = rows.reshape(len(warps), tiles, 64).view(np.uint32)  # [warps, tiles, 32]
        for i, target in enumerate(targets):
            value = np.zeros((run.lanes // 32, 32), np.uint32)
            value[warps] = words[:, i]
            target(run, active, value.reshape(-1))

    return load


def _store_matrix(instruction: Instruction) -> Any:
    """``stmatrix``, the inverse of ``ldmatrix``."""
    instruction.narrows("shared", 16)
    address, where, transposed = (
        instruction.address(instruction.operands[0]),
        instruction.where,
        instruction.has("trans"),
    )
    sources = [instruction.raw(name, 32) for name in instruction.parts(1)]
    tiles = len(sources)

    def store(run: Any, active: Any) -> None:
        warps = run.whole_warps(active, where)
        threads = (warps[:, None] * 32 + np.arange(8 * tiles)).reshape(-1)
        memory, offsets = run.locate("shared", address(run), threads)
        words = stacked(run, sources).reshape(-1, 32, tiles)[warps].swapaxes(1, 2)  # [warps, tiles, 32]
        rows = np.ascontiguousarray(words).view(np.uint16).reshape(len(warps), tiles, 8, 8)
        rows = (rows.swapaxes(2, 3) if transposed else rows).reshape(-1, 8)
        memory.store(run, threads, offsets, 16, [np.ascontiguousarray(rows[:, i]) for i in range(8)], where)

    return store


_OF_TILES = "sync aligned m8n8 x1 x2 x4 trans shared shared_cta"

OPCODES: dict[str, tuple[Builder, str]] = {
    "mma": (_multiply, "sync aligned row col m16n8k8 m16n8k16"),
    "ldmatrix": (_load_matrix, _OF_TILES),
    "stmatrix": (_store_matrix, _OF_TILES),
}
