"""Compile kernels for GPUs that are not there, exactly as their launchers would, and read what came out.

A launcher is called with tensors that have shapes and no memory (device "meta"), while Triton is told that it drives
another GPU and every launch is turned into a compilation.  So signatures, specialization, constants and the launch
table are those of a real call; nothing is written down twice.

Triton decides on its interpreter for a whole process, so tests call ``compile_cases``, which does it in another one
(``compiler_process.py``).  ``KERNELS`` is the table of what can be compiled: a launcher to call for a ``Case``.
"""

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kernels.compiler_process import call


class Target(NamedTuple):
    """A GPU: Triton's name for it, threads of a warp, and bytes of shared memory that one program may have."""

    backend: str
    arch: int | str
    warp: int
    shared: int


TARGETS: dict[str, Target] = {
    "sm_70": Target("cuda", 70, 32, 96 << 10),
    "sm_75": Target("cuda", 75, 32, 64 << 10),
    "sm_80": Target("cuda", 80, 32, 163 << 10),
    "sm_86": Target("cuda", 86, 32, 99 << 10),
    "sm_89": Target("cuda", 89, 32, 99 << 10),
    "sm_90": Target("cuda", 90, 32, 227 << 10),
    "sm_100": Target("cuda", 100, 32, 227 << 10),
    "sm_120": Target("cuda", 120, 32, 99 << 10),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10),
}


@dataclass(frozen=True)
class Case:
    """One call of a launcher.

    Args:
        target: name in ``TARGETS``; ``kernel``: name in ``KERNELS``.
        keys, values: names of codecs.
        dtype: the model's, without "torch.".
        group: query heads per key/value head; ``queries`` new tokens of each sequence.
        mask: dtype of an attention mask, or "" for none.
        first: tokens of each sequence that are read as they came.
        config: fields of ``LaunchConfig`` that replace the table's, as pairs.
    """

    target: str
    keys: str
    values: str
    kernel: str = "attention"
    dtype: str = "bfloat16"
    head_dim: int = 128
    group: int = 4
    queries: int = 1
    page_size: int = 64
    mask: str = ""
    softcap: float | None = None
    window: int = 0
    first: int = 0
    config: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        parts = [self.target, self.kernel, f"{self.keys}/{self.values}", self.dtype, f"D{self.head_dim}"]
        parts += [f"G{self.group}", f"Q{self.queries}", f"P{self.page_size}"]
        parts += [f"F{self.first}"] * bool(self.first)
        return "-".join(parts + [f"mask:{self.mask}"] * bool(self.mask) + [f"{k}={v}" for k, v in self.config])


@dataclass(frozen=True)
class Built:
    """A compiled kernel.  ``registers`` and ``spilled`` (bytes of stack of a thread) are None where no tool reads
    them; ``buffers`` is how many tiles each pipelined load has room for in shared memory, ``waits`` how many copies may
    still be under way where a loop waits for some."""

    name: str
    warps: int
    stages: int
    shared: int
    registers: int | None
    spilled: int | None
    sass: str = ""
    buffers: tuple[int, ...] = ()
    waits: tuple[int, ...] = ()


@dataclass(frozen=True)
class Loop:
    """The loop over pages of a disassembled kernel."""

    opcodes: dict[str, int]

    @property
    def instructions(self) -> int:
        """Instructions of one pass, over all opcodes."""
        return sum(self.opcodes.values())

    def count(self, pattern: str) -> int:
        """Instructions whose opcode matches the regular expression from its start."""
        return sum(n for opcode, n in self.opcodes.items() if re.match(pattern, opcode))


def main_loop(sass: str) -> Loop:
    """The loop over pages in ``nvdisasm``'s text, what lies between a label and the last jump back to it: the one that
    copies most into shared memory, or the longest."""

    def weight(body: list[str]) -> tuple[int, int]:
        return sum(opcode.startswith("LDGSTS") for opcode in body), len(body)

    labels: dict[str, int] = {}
    instructions: list[str] = []
    main: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            text = re.sub(r"^@!?\w+\s+", "", instruction[1])
            instructions.append(text.split()[0])
            jump = re.search(r"^BRA.*`\((\.L_x_\d+)\)", text)
            if jump and jump[1] in labels:
                main = max(main, instructions[labels[jump[1]] :], key=weight)
    return Loop(dict(Counter(main)))


class _Driver:
    """What Triton asks of a driver to compile and not to launch."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(target.backend, target.arch, target.warp)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)

    def get_current_stream(self, device: object = None) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[list[Any]]:
    """Launches inside the ``with`` block compile for ``target`` and append Triton's compiled kernel to the list."""
    import triton

    from kvquant_hf.triton_kernels import launching

    original, compiled = launching.launch, []

    def compile_only(kernel: Any, grid: Any, *args: Any, **constants: Any) -> Any:
        compiled.append(kernel.run(*args, grid=grid, warmup=True, **constants))
        return compiled[-1]

    launching.launch = compile_only
    triton.runtime.driver.set_active(_Driver(target))
    try:
        yield compiled
    finally:
        launching.launch = original


class _Call:
    """Tensors of a call, of 2 sequences with 8 key/value heads and 32 pages; they have no memory."""

    batch, heads, pages = 2, 8, 32

    def __init__(self, case: Case) -> None:
        from kvquant_hf.triton_kernels.codecs import CODECS

        self.case, self.dtype = case, getattr(torch, case.dtype)
        self.codecs = (CODECS[case.keys], CODECS[case.values])
        self.table = self.empty(self.batch, self.pages, dtype=torch.int32)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def lengths(self) -> torch.Tensor:
        return self.empty(self.batch, 2, dtype=torch.int32)

    def vectors(self, tokens: int) -> torch.Tensor:
        """Keys or values of ``tokens`` tokens; an open page, for as many tokens as a page has."""
        return self.empty(self.batch, self.heads, tokens, self.case.head_dim)

    def planes(self, codec: Any) -> list[torch.Tensor]:
        planes, size = codec.planes(self.case.head_dim), self.case.page_size
        return [self.empty(self.pages, self.heads, *plane.shape(size), dtype=plane.dtype) for plane in planes]


def attention(case: Case) -> None:
    """Launch ``decode`` and ``combine``."""
    from kvquant_hf.triton_kernels.pages import PagedSide
    from kvquant_hf.triton_kernels.triton_attention import paged_attention_triton

    call, page = _Call(case), case.page_size
    at = call.empty(call.batch, dtype=torch.int32) if case.first else None
    first = call.vectors(case.first) if case.first else None
    shape = (call.batch, 1, case.queries, call.pages * page)
    paged_attention_triton(
        call.empty(call.batch, call.heads * case.group, case.queries, case.head_dim),
        *(PagedSide(codec, call.planes(codec), call.vectors(page), page, first, at) for codec in call.codecs),
        call.table,
        call.lengths(),
        scale=0.1,
        mask=call.empty(*shape, dtype=getattr(torch, case.mask)) if case.mask else None,
        softcap=case.softcap,
        window=case.window,
    )


def latent(case: Case) -> None:
    """Launch ``latent_decode`` and ``combine``: latents of ``head_dim``, rotary keys of 64, ``group`` query heads."""
    from kvquant_hf.triton_kernels.latent_triton import latent_attention_triton
    from kvquant_hf.triton_kernels.pages import PagedSide

    call, page = _Call(case), case.page_size
    call.heads = 1
    at = call.empty(call.batch, dtype=torch.int32) if case.first else None
    sides = []
    for codec, dim in zip(call.codecs, (case.head_dim, 64), strict=True):
        planes = [call.empty(call.pages, 1, *p.shape(page), dtype=p.dtype) for p in codec.planes(dim)]
        first = call.empty(call.batch, 1, case.first, dim) if case.first else None
        sides.append(PagedSide(codec, planes, call.empty(call.batch, 1, page, dim), page, first, at))
    shape = (call.batch, 1, case.queries, call.pages * page)
    latent_attention_triton(
        call.empty(call.batch, case.group, case.queries, case.head_dim + 64),
        *sides,
        call.table,
        call.lengths(),
        scale=0.1,
        mask=call.empty(*shape, dtype=getattr(torch, case.mask)) if case.mask else None,
        softcap=case.softcap,
        window=case.window,
    )


def append(case: Case) -> None:
    """Launch ``append`` with as many new tokens as the case has queries."""
    from kvquant_hf.triton_kernels.append import append

    call = _Call(case)
    new, tails = ([call.vectors(tokens) for _ in "kv"] for tokens in (case.queries, case.page_size))
    planes = map(call.planes, call.codecs)
    append(*new, *call.codecs, *planes, *tails, call.table, call.lengths(), call.lengths())


def rounding(case: Case) -> None:
    """Launch what rounds a page of each head with feedback."""
    from kvquant_hf.triton_kernels.codecs.ranked import Grid
    from kvquant_hf.triton_kernels.round import rounded_by_kernel

    call, dim = _Call(case), case.head_dim
    numbers = [call.empty(call.heads, dim, dtype=dtype) for dtype in (torch.uint8, torch.float16)]
    factor = call.empty(call.heads, dim, dim)
    rounded_by_kernel(call.empty(call.heads, case.page_size, dim), Grid(call.empty(dim), *numbers), factor)


KERNELS: dict[str, Callable[[Case], None]] = {
    "attention": attention,
    "latent": latent,
    "append": append,
    "round": rounding,
}


def _tool(name: str, *args: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def inspect(kernel: Any, sass: bool = False) -> Built:
    """Read registers, stack and, if wanted, the disassembly of one of Triton's compiled kernels."""
    metadata = kernel.metadata
    registers = spilled = None
    text = ""
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = _tool("cuobjdump", "-res-usage", file.name)
            text = _tool("nvdisasm", "-c", file.name) if sass else ""
        registers, spilled = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    elif "amdgcn" in kernel.asm:
        # Vector registers; what does not fit goes to scratch memory.
        registers, spilled = (
            int(re.search(rf"\.{word}:\s+(\d+)", kernel.asm["amdgcn"])[1])
            for word in ("vgpr_count", "private_segment_fixed_size")
        )
    buffers = tuple(map(int, re.findall(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x\d+x", kernel.asm.get("ttgir", ""))))
    figures = (metadata.num_warps, metadata.num_stages, metadata.shared, registers, spilled)
    loops = "".join(re.findall(r"scf\.for .*?scf\.yield", kernel.asm.get("ttgir", ""), re.DOTALL))
    waits = tuple(map(int, re.findall(r"async_wait.*num = (\d+)", loops)))
    return Built(metadata.name, *figures, text, buffers, waits)


def compile_case(case: Case, sass: bool = False) -> list[Built]:
    """The kernels of one call, compiled in this process, which must not be interpreting."""
    from kvquant_hf.triton_kernels.launch import override_launch

    with compiling_for(TARGETS[case.target]) as compiled, override_launch(**dict(case.config)):
        KERNELS[case.kernel](case)
    return [inspect(kernel, sass) for kernel in compiled]


def _compile_or_say_why(case: Case, sass: bool) -> list[Built] | str:
    try:
        return compile_case(case, sass)
    except Exception as error:  # whatever stops a compiler is the answer
        return f"{type(error).__name__}: {error}"


def compile_cases(cases: Sequence[Case], sass: bool = False) -> dict[Case, list[Built] | str]:
    """The kernels of each case, or the error that it ended with; compiled one after the other in another process."""
    return {case: call(_compile_or_say_why, case, sass) for case in cases}
