"""Compile the kernels ahead of time and write the tables of docs/kernels.md, between its markers.

    make docs        or: python benchmarks/kernel_docs.py

No GPU is needed: registers and shared memory are read off the compiled kernels, instructions off the disassembly, and
bytes off the codecs' planes.  The counts belong to one version of Triton and its assembler, named in the document.
"""

import dataclasses
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Tests show how to compile for a GPU that is not there; they are no package.
sys.path.insert(0, str(ROOT / "tests"))

import torch
import triton
from kernels.aot import TARGETS, Built, Case, Loop, compile_cases, main_loop

from kvquant_hf.triton_kernels.codecs import CODECS
from kvquant_hf.triton_kernels.launch import OPEN_COST, launch_config, split_count
from kvquant_hf.triton_kernels.occupancy import MULTIPROCESSORS, residents

DOCUMENT = ROOT / "docs" / "kernels.md"
PAIRS = {
    "exact": ("exact", "exact"),
    "int8": ("int8-channel", "int8-affine"),
    "int4": ("int4-ranked", "int4-hadamard"),
    "kv3": ("int3-ranked", "octet3"),
    "kv2.9": ("int3-ranked", "octet2"),
    "kv2.4": ("int2-ranked", "octet2"),
    "turboquant": ("int4-ranked", "octet2"),
    "channel4": ("int4-channel", "int4-hadamard"),
    "channel2": ("int4-channel", "lloyd2"),
    "lloyd4": ("lloyd4-centred", "lloyd2"),
    "lloyd3": ("lloyd3-channel", "lloyd3"),
    "fp8": ("fp8", "fp8"),
    "nvfp4": ("nvfp4", "nvfp4"),
    "int8-token": ("int8-token", "int8-token"),
    "int4-token": ("int4-token", "int4-token"),
    "turboquant-qjl": ("lloyd3-sign", "lloyd2-plain"),
}

# The workload of the count: Llama-3-8B's attention.
BATCH, TOKENS, HEADS, GROUP, DIM, PAGE = 8, 32768, 8, 4, 128, 64
# Data-sheet bandwidth, and what the counts assume of an H100's issue and tensor cores.
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}
PROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.7e9
# What the estimate adds: bandwidth that a copy reaches on an H100; seconds that a load from memory takes, and from one
# kernel to the next in a graph; share of the slots that a full scheduler uses, and a warp alone.
COPY, LATENCY, NEXT_KERNEL, FULL, ALONE = 3.0e12, 0.7e-6, 1.0e-6, 0.7, 0.5
# fp16 multiply-adds per clock of a multiprocessor through `mma.sync`: half of what warp-group products reach.
MMA_RATE = 1024

KINDS = {
    "copies of pages (16 bytes a thread)": r"LDGSTS\.E.*\.128",
    "other copies and loads from memory": r"LDGSTS|LDG",
    "tensor-core products": r"HMMA|HGMMA|IMMA",
    "shared memory": r"LDSM|LDS|STS",
    "bit operations and byte permutations": r"LOP3|SHF\.|PRMT",
    "exchange between threads": r"SHFL",
    "float32 arithmetic": r"F(FMA|MUL|ADD|MNMX|SEL|SETP|CHK)|MUFU",
    "fp16 arithmetic and conversions": r"H(FMA2|MUL2|ADD2|MNMX2|SET2)|F2FP|F2F|I2F",
}


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table, numbers to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def decode_kernel(built: list[Built] | str) -> Built:
    """The decode kernel among those of a call."""
    if isinstance(built, str):
        raise RuntimeError(built)
    return next(kernel for kernel in built if "decode" in kernel.name)


def half(target: str) -> str:
    """The 16-bit dtype that models use on a GPU."""
    return "float16" if target in ("sm_70", "sm_75") else "bfloat16"


def resources() -> str:
    """Registers, stack and shared memory of every pair on every GPU."""
    cases = {(t, n): Case(t, *PAIRS[n], dtype=half(t)) for t in TARGETS for n in PAIRS}
    built = compile_cases(list(cases.values()))

    def cell(case: Case) -> str:
        kernel = decode_kernel(built[case])
        stack = f" + {kernel.spilled} B" if kernel.spilled else ""
        return f"{kernel.warps} × {kernel.registers}{stack}, {kernel.shared / 1024:.0f} K"

    return table(["", *PAIRS], [[f"`{t}`", *(cell(cases[t, n]) for n in PAIRS)] for t in TARGETS])


def shapes() -> str:
    """The same on sm_90 for other head_dims and more rows."""
    columns = {
        "head_dim 64": {"head_dim": 64},
        "head_dim 256": {"head_dim": 256},
        "16 queries": {"queries": 16},
        "bool mask": {"mask": "bool"},
        "pages of 128": {"page_size": 128},
    }
    cases = {(n, c): Case("sm_90", *PAIRS[n], **fields) for n in PAIRS for c, fields in columns.items()}
    built = compile_cases(list(cases.values()))

    def cell(case: Case) -> str:
        kernel = decode_kernel(built[case])
        stack = f" + {kernel.spilled} B" if kernel.spilled else ""
        return f"{kernel.warps} × {kernel.registers}{stack}, {kernel.shared / 1024:.0f} K"

    return table(["sm_90", *columns], [[n, *(cell(cases[n, c]) for c in columns)] for n in PAIRS])


def chunks() -> str:
    """The kernel of many queries on every GPU, by head_dim; it reads dense tokens, whatever the pair."""
    dims = (64, 128, 256)
    cases = {(t, d): Case(t, *PAIRS["int4"], dtype=half(t), head_dim=d, queries=512) for t in TARGETS for d in dims}
    cases = {(t, d): case for (t, d), case in cases.items() if "gfx" not in t}
    built = compile_cases(list(cases.values()))

    def cell(case: Case) -> str:
        answer = built[case]
        if isinstance(answer, str):
            raise RuntimeError(answer)
        (kernel,) = (kernel for kernel in answer if "chunk" in kernel.name)
        stack = f" + {kernel.spilled} B" if kernel.spilled else ""
        return f"{kernel.warps} × {kernel.registers}{stack}, {kernel.shared / 1024:.0f} K"

    targets = [t for t in TARGETS if "gfx" not in t]
    header = ["", *(f"head_dim {d}" for d in dims)]
    return table(header, [[f"`{t}`", *(cell(cases[t, d]) for d in dims)] for t in targets])


def page_bytes(name: str) -> float:
    """Bytes of keys and values of one page of one head, scales included."""
    return sum(CODECS[codec].bytes_per_token(DIM, PAGE, torch.bfloat16) for codec in PAIRS[name]) * PAGE


class Counted(NamedTuple):
    """A pair's decode kernel and its loop over pages, and instructions of its combine kernel from end to end."""

    kernel: Built
    loop: Loop
    combine: int

    def splits(self, name: str) -> tuple[int, int]:
        """Splits of the workload, and places for programs on the whole device."""
        bits = sum(CODECS[codec].bits for codec in PAIRS[name])
        planes = sum(CODECS[codec].kernel.code_planes for codec in PAIRS[name])
        config = launch_config("sm_90", 2, PAGE * DIM, GROUP, bits, planes)
        kernel = self.kernel
        held = residents(MULTIPROCESSORS["sm_90"], kernel.shared, kernel.warps, kernel.registers or 255)
        config = dataclasses.replace(config, residents=min(config.residents, held))
        return split_count(config, BATCH * HEADS, TOKENS // PAGE, PROCESSORS), PROCESSORS * config.residents


def sm_90_loops(names: Iterable[str] = PAIRS) -> dict[str, Counted]:
    """The kernels for sm_90 at the workload's shape."""
    cases = {name: Case("sm_90", *PAIRS[name], head_dim=DIM, group=GROUP, page_size=PAGE) for name in names}
    built = compile_cases(list(cases.values()), sass=True)
    counted = {}
    for name, case in cases.items():
        kernel = decode_kernel(built[case])
        (combine,) = (other for other in built[case] if "combine" in other.name)
        counted[name] = Counted(
            kernel, main_loop(kernel.sass), len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+\S", combine.sass))
        )
    return counted


def loop_rows(name: str, kernel: Built, loop: Loop) -> list[str]:
    """A pair's column of the table of loops."""
    threads, elements = kernel.warps * 32, 2 * PAGE * DIM
    left, counts = dict(loop.opcodes), []
    for pattern in KINDS.values():
        hits = {opcode: n for opcode, n in left.items() if re.match(pattern, opcode)}
        counts.append(str(sum(hits.values())))
        left = {opcode: n for opcode, n in left.items() if opcode not in hits}
    per_element = loop.instructions * threads / elements
    per_byte = loop.instructions * threads / page_bytes(name)
    return [*counts, str(sum(left.values())), f"**{loop.instructions}**", f"{per_element:.2f}", f"{per_byte:.2f}"]


def loops_table(loops: dict[str, Counted]) -> str:
    """Instructions of a warp for one page of one head, by kind."""
    columns = [loop_rows(name, counted.kernel, counted.loop) for name, counted in loops.items()]
    titles = [*KINDS, "addresses, moves, control", "all", "per element (thread)", "per stored byte (thread)"]
    return table(
        ["", *loops], [[title, *cells] for title, cells in zip(titles, zip(*columns, strict=True), strict=True)]
    )


def floors_table(loops: dict[str, Counted]) -> str:
    """What a decode step of one layer cannot be faster than, in microseconds."""
    rows = []
    pages = BATCH * HEADS * TOKENS // PAGE
    for name, counted in loops.items():
        kernel, loop = counted.kernel, counted.loop
        splits, _ = counted.splits(name)
        # Every split writes its accumulator and two numbers per row, and combine reads them.
        merged = 2 * BATCH * HEADS * (splits + 1) * GROUP * (DIM + 2) * 4
        traffic = pages * page_bytes(name) + merged
        issue = pages * loop.instructions * kernel.warps / (PROCESSORS * SCHEDULERS * CLOCK)
        # A product instruction multiplies 16 x 8 by 8 x 16, or the like.
        products = pages * kernel.warps * loop.count("HMMA") * 16 * 8 * 16 / (PROCESSORS * MMA_RATE * CLOCK)
        times = [traffic / bandwidth for bandwidth in BANDWIDTH.values()]
        binds = ["memory" if time >= max(issue, products) else "issue" for time in times]
        rows.append(
            [
                name,
                f"{traffic / 1e6:.0f}",
                *(f"{time * 1e6:.0f}" for time in times),
                f"{issue * 1e6:.0f}",
                f"{products * 1e6:.0f}",
                " / ".join(binds) if binds[0] != binds[1] else binds[0],
                f"{issue / times[0]:.2f}",
            ]
        )
    header = ["", "MB", *(f"memory, {gpu}" for gpu in BANDWIDTH), "issue", "tensor cores", "binds", "share of slots"]
    return table(header, rows)


def estimates_table(loops: dict[str, Counted]) -> str:
    """Microseconds that a decode step's attention of one layer is to take, part by part."""
    rows = []
    pages, programs = BATCH * HEADS * TOKENS // PAGE, BATCH * HEADS
    for name, counted in loops.items():
        kernel, loop = counted.kernel, counted.loop
        splits, places = counted.splits(name)
        floor = pages * page_bytes(name) / COPY
        waves = -(-programs * splits // places)
        in_turn = waves * (-(-(TOKENS // PAGE + OPEN_COST) // splits))
        # A scheduler that is full gives each of its warps a share of its slots.
        warps = places // PROCESSORS * kernel.warps / SCHEDULERS
        work = loop.instructions / CLOCK * max(warps / FULL, 1 / ALONE)
        merged = 2 * programs * (splits + 1) * GROUP * (DIM + 2) * 4 / COPY
        begin = waves * 3 * LATENCY  # lengths, a page's number, the page: each load waits for the one before
        end = waves * LATENCY
        a_row = counted.combine * 4 / SCHEDULERS * -(-programs * GROUP // PROCESSORS) / (FULL * CLOCK)
        combine = NEXT_KERNEL + 3 * LATENCY + a_row
        total = max(floor, in_turn * work) + merged + begin + end + combine
        rows.append(
            [
                name,
                f"{programs * splits} in {places}",
                str(in_turn),
                f"{work * 1e6:.2f} of {floor / in_turn * 1e6:.2f}",
                *(f"{x * 1e6:.1f}" for x in (floor, in_turn * work, merged, begin + end, combine)),
                f"**{total * 1e6:.0f}**",
                f"**{total / floor:.2f}**",
            ]
        )
    header = ["", "programs in places", "pages in turn", "work of a page, of its time", "memory", "work"]
    return table([*header, "accumulators", "begin and end", "combine", "sum", "over memory"], rows)


def versions() -> str:
    """What the counts belong to."""
    ptxas = re.search(r"V([\d.]+)", triton.backends.nvidia.compiler.get_ptxas_version(90))
    return f"Triton {triton.__version__}, ptxas {ptxas[1] if ptxas else 'unknown'}."


def replace(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the markers ``name``."""
    pattern = rf"(<!-- begin:{name} -->\n).*?(<!-- end:{name} -->)"
    if not re.search(pattern, text, re.DOTALL):
        raise ValueError(f"{DOCUMENT.name} has no markers for {name}")
    return re.sub(pattern, lambda found: f"{found[1]}\n{content}\n\n{found[2]}", text, flags=re.DOTALL)


def main() -> None:
    loops = sm_90_loops()
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, content in {
        "versions": versions(),
        "resources": resources(),
        "shapes": shapes(),
        "chunks": chunks(),
        "loops": loops_table(loops),
        "floors": floors_table(loops),
        "estimates": estimates_table(loops),
    }.items():
        text = replace(text, name, content)
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
