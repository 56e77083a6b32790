"""Products of four warps (``wgmma``, sm_90), whose operands come from shared memory, described by 64 bits.

Swizzled layouts alone; PTX ISA, "Matrix-Descriptor Format" and "Canonical Layouts".  The product is made when it is
issued, and what it read must be the same when it is waited for.  Fences are not checked.
"""

import re
from typing import Any

import numpy as np

from .arithmetic import Builder
from .formats import numbers
from .instruction import Instruction, PtxError
from .matrices import elements, fragment_order, stacked

GROUP = 128  # threads of four warps


def of_four_warps(columns: int) -> np.ndarray:
    """As ``fragment_order``, of 64 rows: sixteen for each warp in turn; flat."""
    order = fragment_order(16, columns, 2)
    return np.concatenate([order + warp * 16 * columns for warp in range(4)]).reshape(-1)


def operand_places(descriptor: int, rows: int, transposed: bool, where: str) -> np.ndarray:
    """Addresses in shared memory of an operand of 16-bit numbers ``[rows, 16]``, rows those of A or columns of B."""
    mode = descriptor >> 62
    if not mode or descriptor >> 49 & 7:
        raise PtxError(f"the PTX machine does not implement the matrix descriptor {descriptor:#x}: {where}")
    width = 256 >> mode  # bytes of a row of a swizzle atom
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    row, k = np.arange(rows)[:, None], np.arange(16)[None]
    if transposed:
        at = start + row * 2 % width + row * 2 // width * leading + k % 8 * width + k // 8 * stride
    else:
        at = start + row % 8 * width + row // 8 * stride + k * 2
    return at ^ (at >> 7 & (8 >> (mode - 1)) - 1) << 4


def _operand(instruction: Instruction, operand: str, rows: int, transposed: bool) -> Any:
    """What reads an operand from shared memory: float64 ``[groups, rows, 16]``."""
    descriptor, where, kind = instruction.raw(operand, 64), instruction.where, instruction.kind
    instruction.narrows("shared", 2)

    def read(run: Any, groups: np.ndarray) -> np.ndarray:
        described = np.broadcast_to(descriptor(run), run.lanes).reshape(-1, GROUP)[groups]
        if (described != described[:, :1]).any():
            raise PtxError(f"threads disagree on a matrix: {where}")
        places = [operand_places(int(one), rows, transposed, where).reshape(-1) for one in described[:, 0]]
        at = np.concatenate(places)
        for warp in range(4):  # each counts as a reader of everything
            threads = np.repeat(groups * GROUP + warp * 32, rows * 16)
            memory, offsets = run.shared_at(at, threads)
            good, granules = memory.allowed(run, threads, offsets, 2, where, "read")
            if good is not None:
                raise PtxError(f"a matrix reaches beyond shared memory: {where}")
            memory.note_read(run, threads, granules, where)
        values = memory.load(offsets, 16, 1)[0]
        run.products.issue(np.repeat(groups * GROUP, rows * 16), where, offsets, values)
        return numbers(values, kind).astype(np.float64).reshape(-1, rows, 16)

    return read


def _multiply(instruction: Instruction) -> Any:
    """D (64 x n) = A (64 x 16, from registers or shared memory) B (16 x n, from shared memory) + D."""
    if instruction.modifiers[0] == "fence":
        return lambda run, active: None
    if instruction.modifiers[0] == "commit_group":
        return lambda run, active: run.products.commit(active)
    if instruction.modifiers[0] == "wait_group":
        left = int(instruction.operands[0])
        return lambda run, active: run.products.wait(run, active, left)
    n, kind, where = int(re.findall(r"n(\d+)k16", instruction.opcode)[0]), instruction.kind, instruction.where
    in_registers = instruction.operands[1].startswith("{")
    flags = instruction.operands[4:]  # signs of both, and which of those in shared memory is transposed
    if instruction.kinds != ["f32", kind, kind] or flags[:2] != ["1", "1"] or len(flags) != 4 - in_registers:
        raise instruction.refusal(f"flags {flags}")
    targets = [instruction.target(name, "f32") for name in instruction.parts(0)]
    c = [instruction.raw(name, 32) for name in instruction.parts(0)]
    keeps = instruction.raw(instruction.operands[3], 1)
    read_b = _operand(instruction, instruction.operands[2], n, flags[-1] == "1")
    if in_registers:
        a = [instruction.raw(name, 32) for name in instruction.parts(1)]
    else:
        read_a = _operand(instruction, instruction.operands[1], 64, flags[2] == "1")
    back_a, order = np.argsort(of_four_warps(16)), of_four_warps(n)
    back = np.argsort(order)

    def multiply(run: Any, active: Any) -> None:
        warps = run.whole_warps(active, where)
        groups = np.unique(warps // 4)
        if len(warps) != 4 * len(groups):
            raise PtxError(f"a part of four warps is somewhere else: {where}")
        if in_registers:
            x = elements(stacked(run, a), kind).reshape(-1, 64 * 16)[groups][:, back_a].reshape(-1, 64, 16)
        else:
            x = read_a(run, groups)
        y = read_b(run, groups).swapaxes(1, 2)
        z = stacked(run, c).view(np.float32).reshape(-1, 64 * n)[groups][:, back].reshape(-1, 64, n)
        kept = np.broadcast_to(keeps(run), run.lanes).reshape(-1, GROUP)[groups, :1, None]
        d = (x @ y + np.where(kept, z, 0).astype(np.float64)).astype(np.float32).reshape(-1, 64 * n)[:, order]
        result = np.zeros((run.lanes // GROUP, GROUP, n // 2), np.float32)
        result[groups] = d.reshape(-1, GROUP, n // 2)
        result = result.reshape(run.lanes, -1)
        for i, target in enumerate(targets):
            target(run, active, np.ascontiguousarray(result[:, i]))

    return multiply


_SHAPES = " ".join(f"m64n{n}k16" for n in range(8, 257, 8))

OPCODES: dict[str, tuple[Builder, str]] = {
    "wgmma": (_multiply, f"fence mma_async commit_group wait_group sync aligned {_SHAPES}"),
}
