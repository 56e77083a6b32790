"""A GPU for tensors of the CPU: launches kernels, and keeps what was found and counted."""

import ctypes
import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from . import access, arithmetic, matrices, moves, warps, wgmma
from .formats import UNSIGNED, bits_of
from .instruction import GLOBAL_BASE, Instruction, PtxError
from .memory import MEMBER_BITS, NEVER, Memory
from .parser import Kernel, Step
from .run import Run

OPCODES = arithmetic.OPCODES | moves.OPCODES | access.OPCODES | warps.OPCODES | matrices.OPCODES | wgmma.OPCODES
GAP = 4096  # bytes around every tensor that belong to nobody


def compile_step(instruction: Instruction) -> Step:
    """What the instruction does.

    Raises:
        PtxError: the machine does not implement it.
    """
    if instruction.name not in OPCODES:
        raise instruction.refusal()
    build, understood = OPCODES[instruction.name]
    instruction.require(understood)
    step: Step = build(instruction)
    return step


@functools.lru_cache(maxsize=64)
def parsed(text: str) -> Kernel:
    """The kernel of ``text``, PTX."""
    return Kernel(text, compile_step)


@dataclass(frozen=True)
class Launch:
    """What one launch did.  ``opcodes``: instructions of all threads; bytes as kernels asked for them, per access."""

    name: str
    grid: tuple[int, int, int]
    threads: int
    opcodes: Counter[str] = field(default_factory=Counter)
    global_read: int = 0
    global_written: int = 0
    shared_read: int = 0
    shared_written: int = 0


class FoundError(AssertionError):
    """Kernels did what no GPU promises to get right."""


class Machine:
    """Launches kernels on tensors of the CPU.

    ``lanes``: about how many threads run together.  ``found``: counts by (kind, memory, instruction), with an example
    of each in ``examples``.  ``launches``: what ran.
    """

    def __init__(self, lanes: int = 4096) -> None:
        self.lanes = lanes
        self.found: Counter[tuple[str, str, str]] = Counter()
        self.examples: dict[tuple[str, str, str], str] = {}
        self.launches: list[Launch] = []
        self._written: dict[int, np.ndarray] = {}  # of storages, whether each byte may be read
        self._storages: list[Any] = []  # kept, so that no other one gets their address

    def forbid(self, tensor: torch.Tensor) -> None:
        """Nobody may read these elements before a kernel has written them."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if tensor.numel() == 0:
            return
        if key not in self._written:
            self._written[key] = np.ones(storage.nbytes(), bool)
            self._storages.append(storage)
        _elements(self._written[key], tensor)[...] = False

    def check(self) -> None:
        """Raise what was found.

        Raises:
            FoundError: with a line for each kind and instruction.
        """
        if self.found:
            lines = [
                f"{count} x {kind}, {memory}: {where}; {self.examples[kind, memory, where]}"
                for (kind, memory, where), count in self.found.most_common(20)
            ]
            raise FoundError("\n".join(lines))

    @property
    def kinds(self) -> set[str]:
        """What was found, without where."""
        return {kind for kind, _, _ in self.found}

    def launch(self, text: str, shared_bytes: int, grid: Sequence[int], arguments: Sequence[Any]) -> None:
        """Run the kernel of ``text`` (PTX) on tensors, ints and floats in the order of its parameters."""
        kernel = parsed(text)
        x, y, z = (*grid, 1, 1)[:3]
        layout = _Layout(kernel, arguments, self._written, self._report)
        parameters = dict(_parameters(kernel, layout, arguments))
        places = [(i, j, k) for k, j, i in itertools.product(range(z), range(y), range(x))]
        together = max(1, self.lanes // kernel.threads)
        counts: Counter[str] = Counter()
        opcodes: Counter[str] = Counter()
        for first in range(0, len(places), together):
            part = places[first : first + together]
            run = Run(kernel, parameters, (x, y, z), first, part, layout.memory, shared_bytes, layout.report)
            run.execute()
            opcodes.update(run.executed)
            counts.update(shared_read=run.shared.bytes_read, shared_written=run.shared.bytes_written)
        layout.copy_back(self._written)
        counts.update(global_read=layout.memory.bytes_read, global_written=layout.memory.bytes_written)
        self.launches.append(Launch(kernel.name, (x, y, z), kernel.threads, opcodes, **counts))

    def _report(self, kind: str, memory: str, where: str, count: int, example: str) -> None:
        key = (kind, memory, where)
        self.found[key] += count
        self.examples.setdefault(key, example)


def _parameters(kernel: Kernel, layout: "_Layout", arguments: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Bits of each parameter.  Triton adds up to two for scratch memory, which none of our kernels has."""
    scratch = len(kernel.parameters) - len(arguments)
    if scratch not in (0, 1, 2):
        raise PtxError(f"{kernel.name} has {len(kernel.parameters)} parameters and got {len(arguments)} arguments.")
    for (kind, name), value in zip(kernel.parameters, (*arguments, *[0] * scratch), strict=True):
        if isinstance(value, torch.Tensor):
            value = layout.address(value)
        if kind == "f32":
            yield name, np.float32(value).view(np.uint32)
        else:
            yield name, UNSIGNED[bits_of(kind)](int(value) & ((1 << bits_of(kind)) - 1))


def _elements(flags: np.ndarray, tensor: torch.Tensor) -> np.ndarray:
    """Of ``flags``, one for each byte of a storage, those of the elements of ``tensor``."""
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()] + [1]
    return np.lib.stride_tricks.as_strided(flags[tensor.storage_offset() * size :], (*tensor.shape, size), strides)


def _bytes_of(storage: Any) -> np.ndarray:
    """The memory of a storage itself."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()))


class _Layout:
    """Where the tensors of a launch lie in its global memory, as far from multiples of 256 as they do in theirs."""

    def __init__(self, kernel: Kernel, arguments: Sequence[Any], written: dict[int, np.ndarray], report: Any) -> None:
        self._report = report
        self.storages: dict[int, tuple[int, Any]] = {}
        self.tensors = [(i, a) for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.numel()]
        size = GAP
        for _, tensor in self.tensors:
            storage = tensor.untyped_storage()
            key = storage.data_ptr()
            if key not in self.storages:
                at = -(-size // 256) * 256 + key % 256
                self.storages[key] = (at, storage)
                size = at + storage.nbytes() + GAP
        grain = kernel.grain["global"]
        self.memory = Memory("global", size, grain, self.report, tuple(MEMBER_BITS))
        valid, known = (np.zeros(len(self.memory.data), bool) for _ in range(2))
        for key, (at, storage) in self.storages.items():
            here = slice(at, at + storage.nbytes())
            self.memory.data[here] = _bytes_of(storage)
            known[here] = written.get(key, True)
        for _, tensor in self.tensors:
            _elements(valid[self.storages[tensor.untyped_storage().data_ptr()][0] :], tensor)[...] = True
        self.memory.valid[:] = valid.reshape(-1, grain).all(1)
        self.memory.written[:] = known.reshape(-1, grain).all(1)

    def address(self, tensor: torch.Tensor) -> int:
        """Of the first element; 0 for an empty tensor."""
        at = self.storages.get(tensor.untyped_storage().data_ptr())
        return GLOBAL_BASE + at[0] + tensor.storage_offset() * tensor.element_size() if at else 0

    def copy_back(self, written: dict[int, np.ndarray]) -> None:
        """What kernels wrote, to the tensors; it may be read from now on."""
        new = np.repeat(self.memory.order.written[0] != NEVER, self.memory.grain)
        for key, (at, storage) in self.storages.items():
            here = slice(at, at + storage.nbytes())
            _bytes_of(storage)[:] = self.memory.data[here]
            if key in written:
                written[key] |= new[here]

    def report(self, memory: Memory, kind: str, run: Run, where: str, threads: np.ndarray, offsets: np.ndarray) -> None:
        """``threads[i]`` did it at ``offsets[i]``."""
        thread, offset = int(threads[0]), int(offsets[0])
        cta, thread = divmod(thread, run.threads)
        at = self._describe(offset) if memory is self.memory else f"byte {offset % run.stride}"
        self._report(kind, memory.name, where, len(threads), f"CTA {run.places[cta]}, thread {thread}: {at}")

    def _describe(self, offset: int) -> str:
        for i, tensor in self.tensors:
            start = self.storages[tensor.untyped_storage().data_ptr()][0]
            nbytes = tensor.untyped_storage().nbytes()
            if start - GAP // 2 <= offset < start + nbytes + GAP // 2:
                first = start + tensor.storage_offset() * tensor.element_size()
                return f"byte {offset - first} of argument {i} {tuple(tensor.shape)} {tensor.dtype}"
        return f"address {offset + GLOBAL_BASE:#x}, far from any tensor"
