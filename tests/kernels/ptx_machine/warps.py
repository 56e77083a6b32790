"""What the 32 threads of a warp do together without memory: shuffles, reductions, and their barrier."""

from typing import Any

import numpy as np

from .arithmetic import Builder
from .formats import is_real
from .instruction import Instruction

_LANE = np.arange(32, dtype=np.int64)


def _shuffle(instruction: Instruction) -> Any:
    """``shfl``: each thread gets another one's number, or its own where that one is beyond its segment."""
    mode, where = instruction.modifiers[1], instruction.where
    if "|" in instruction.operands[0]:
        raise instruction.refusal("with a predicate")
    target = instruction.target(instruction.operands[0], "b32")
    sources = [instruction.raw(operand, 32) for operand in instruction.operands[1:4]]

    def shuffle(run: Any, active: Any) -> None:
        run.whole_warps(active, where)
        own, other, clamp = (np.broadcast_to(source(run), run.lanes).reshape(-1, 32) for source in sources)
        distance, segment, limit = other.astype(np.int64) & 31, clamp.astype(np.int64) >> 8 & 31, clamp & 31
        most = (_LANE & segment) | (limit & ~segment)
        lane = {
            "bfly": _LANE ^ distance,
            "idx": (_LANE & segment) | (distance & ~segment),
            "up": _LANE - distance,
            "down": _LANE + distance,
        }[mode]
        lane = np.where(lane >= most if mode == "up" else lane <= most, lane, _LANE)
        target(run, active, np.take_along_axis(own, lane, 1).reshape(-1))

    return shuffle


def _reduce(instruction: Instruction) -> Any:
    """``redux``: every thread gets the sum, extreme or logical combination of all."""
    real, where = is_real(instruction.kind), instruction.where
    function = {
        "max": np.fmax if real else np.maximum,
        "min": np.fmin if real else np.minimum,
        "add": np.add,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[instruction.modifiers[1]]
    target = instruction.target(instruction.operands[0], instruction.kind)
    source = instruction.source(instruction.operands[1], instruction.kind)
    members = instruction.raw(instruction.operands[2], 32)

    def reduce(run: Any, active: Any) -> None:
        run.whole_warps(active, where)
        mask = np.broadcast_to(members(run), run.lanes)
        if (mask if active is None else mask[active]).min() != 0xFFFFFFFF:
            raise instruction.refusal("a part of a warp")
        rows = np.broadcast_to(source(run), run.lanes).reshape(-1, 32)
        target(run, active, np.repeat(function.reduce(rows, 1), 32).astype(rows.dtype))

    return reduce


def _warp_barrier(instruction: Instruction) -> Any:
    """``bar.warp.sync``; a barrier of the CTA ends a segment and does not come here."""
    if instruction.modifiers != ["warp", "sync"]:
        raise instruction.refusal()
    where = instruction.where

    def wait(run: Any, active: Any) -> None:
        run.whole_warps(active, where)
        run.pass_barrier(active, "warp")

    return wait


OPCODES: dict[str, tuple[Builder, str]] = {
    "shfl": (_shuffle, "sync bfly idx up down"),
    "redux": (_reduce, "sync add min max and or xor"),
    "bar": (_warp_barrier, "warp sync"),
}
