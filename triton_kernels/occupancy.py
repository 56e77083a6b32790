"""How many programs a multiprocessor holds at once, which is what the choice of splits fills.

The limits are NVIDIA's (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the rounding is
that of ``cuda_occupancy.h``): a multiprocessor has four parts with a quarter of its registers each, a warp lives in one
of them, and a program's shared memory is rounded up and has one KiB more for the system.
"""

from typing import NamedTuple

import torch

_PARTS = 4
_WARP = 32
_REGISTER_UNIT = 8  # registers of a thread are given out in these
_SHARED_UNIT = 128


class Multiprocessor(NamedTuple):
    """Limits of one multiprocessor.

    Args:
        shared: bytes of shared memory; ``reserved`` of them are taken by each program beside its own.
        registers: 32-bit registers.
        threads: threads at once.
        programs: programs at once.
    """

    shared: int
    registers: int = 65536
    threads: int = 2048
    programs: int = 32
    reserved: int = 1 << 10


MULTIPROCESSORS: dict[str, Multiprocessor] = {
    "sm_70": Multiprocessor(96 << 10, reserved=0),
    "sm_75": Multiprocessor(64 << 10, threads=1024, programs=16, reserved=0),
    "sm_80": Multiprocessor(164 << 10),
    "sm_86": Multiprocessor(100 << 10, threads=1536, programs=16),
    "sm_87": Multiprocessor(164 << 10, threads=1536, programs=16),
    "sm_89": Multiprocessor(100 << 10, threads=1536, programs=24),
    "sm_90": Multiprocessor(228 << 10),
    "sm_100": Multiprocessor(228 << 10),
    "sm_103": Multiprocessor(228 << 10),
    "sm_120": Multiprocessor(100 << 10, threads=1536, programs=24),
}


def multiprocessor(architecture: str, device: torch.device) -> Multiprocessor | None:
    """Limits of ``device``, which is an ``architecture`` such as ``"sm_90"``: as its driver says, or by the table where
    it is not there; None where neither knows (AMD GPUs, the interpreter)."""
    known = MULTIPROCESSORS.get(architecture)
    if device.type != "cuda" or not architecture.startswith("sm_"):
        return known
    found = torch.cuda.get_device_properties(device)
    like = known or Multiprocessor(found.shared_memory_per_multiprocessor)
    return like._replace(
        shared=found.shared_memory_per_multiprocessor,
        registers=getattr(found, "regs_per_multiprocessor", like.registers),
        threads=found.max_threads_per_multi_processor,
    )


def residents(limits: Multiprocessor, shared: int, warps: int, registers: int) -> int:
    """Programs that a multiprocessor holds at once, at least 1.

    Args:
        limits: of the multiprocessor.
        shared: bytes of shared memory of a program.
        warps: warps of a program.
        registers: registers of a thread.
    """
    by_shared = limits.shared // max(1, -(-shared // _SHARED_UNIT) * _SHARED_UNIT + limits.reserved)
    a_thread = -(-max(registers, 1) // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _PARTS * (limits.registers // _PARTS // (a_thread * _WARP)) // warps
    by_threads = limits.threads // (warps * _WARP)
    return max(1, min(by_shared, by_registers, by_threads, limits.programs))
