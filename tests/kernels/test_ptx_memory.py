"""What the PTX machine does with tiles of matrices, and what it says of faults planted in memory and in its order."""

from collections.abc import Callable

import pytest
import torch
from kernels import dense
from kernels.compiler_process import call
from kernels.ptx_machine import FoundError, Machine
from kernels.ptx_text import kernel, pointer

# PTX ISA, "Matrix Fragments for mma": row and column of element i of a thread, by its group g (lane / 4) and place t in
# the group (lane % 4).
Place = Callable[[int, int, int], tuple[int, int]]
FRAGMENTS: dict[str, tuple[int, Place, Place]] = {
    "m16n8k16.row.col.f32.f16.f16.f32": (
        16,
        lambda g, t, i: (g if i in (0, 1, 4, 5) else g + 8, t * 2 + (i & 1) + (8 if i >= 4 else 0)),
        lambda g, t, i: (t * 2 + (i & 1) + (8 if i >= 2 else 0), g),
    ),
    "m16n8k8.row.col.f32.bf16.bf16.f32": (
        8,
        lambda g, t, i: (g if i < 2 else g + 8, t * 2 + (i & 1)),
        lambda g, t, i: (t * 2 + (i & 1), g),
    ),
    "m16n8k8.row.col.f32.tf32.tf32.f32": (
        8,
        lambda g, t, i: (g if i in (0, 2) else g + 8, t if i < 2 else t + 4),
        lambda g, t, i: (t if i == 0 else t + 4, g),
    ),
}
FRAGMENTS["m16n8k16.row.col.f32.bf16.bf16.f32"] = FRAGMENTS["m16n8k16.row.col.f32.f16.f16.f32"]


def place_c(g: int, t: int, i: int) -> tuple[int, int]:
    return g if i < 2 else g + 8, t * 2 + (i & 1)


def held(matrix: torch.Tensor, elements: int, place: Place) -> torch.Tensor:
    """What each thread has of ``matrix``, ``[32, elements]``."""
    return torch.stack(
        [torch.stack([matrix[place(lane // 4, lane % 4, i)] for i in range(elements)]) for lane in range(32)]
    )


def registers(name: str, count: int) -> str:
    return "{" + ", ".join(f"%{name}{i}" for i in range(count)) + "}"


def moved(opcode: str, name: str, count: int, address: str) -> str:
    """A load or store of ``count`` registers, one word each."""
    words = range(count)
    if opcode == "ld":
        return "".join(f"ld.global.b32 %{name}{i}, [{address} + {4 * i}];\n" for i in words)
    return "".join(f"st.global.b32 [{address} + {4 * i}], %{name}{i};\n" for i in words)


@pytest.mark.parametrize("shape", FRAGMENTS)
def test_products_of_a_warp(shape: str) -> None:
    """Exact numbers, subnormals of fp16 among them: their product is right to the last bit."""
    k, place_a, place_b = FRAGMENTS[shape]
    kind = shape.split(".")[4]
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}[kind]
    small = 2.0**-24 if kind == "f16" else 1.0
    a, b = (torch.randint(-8, 9, (16, k)) * small).to(dtype), torch.randint(-8, 9, (k, 8)).to(dtype)
    c = torch.randint(-8, 9, (16, 8)) * small
    parts = [held(a, 16 * k // 32, place_a), held(b, k * 8 // 32, place_b), held(c, 4, place_c)]
    counts = [part[0].numel() * part.element_size() // 4 for part in parts]
    body = "mov.u32 %r0, %tid.x;\n"
    for i, (name, count) in enumerate(zip("abc", counts, strict=True)):
        body += pointer(f"%d{i}", i, 4 * count) + moved("ld", name, count, f"%d{i}")
    sides = [registers(name, count) for name, count in zip("cabc", [4, *counts], strict=True)]
    body += f"mma.sync.aligned.{shape} {', '.join(sides)};\n" + moved("st", "c", 4, "%d2")
    machine = Machine()
    machine.launch(kernel(body, 3, registers=".reg .b32 %a<8>, %b<8>, %c<8>;"), 0, (1,), parts)
    machine.check()
    assert torch.equal(parts[2].double(), held(a.double() @ b.double() + c.double(), 4, place_c))


THROUGH_SHARED = """
mov.u32 %r0, %tid.x;
{load}
mov.b32 %r5, global_smem;
xor.b32 %r6, %r0, 5;
shl.b32 %r6, %r6, 4;
add.s32 %r5, %r5, %r6;
{write}
bar.sync 0;
{read}
{store}
"""
TILES = "{%a0, %a1, %a2, %a3}"
BY_ROWS = {
    "write": f"st.shared.v4.b32 [%r5], {TILES};",
    "read": f"ld.shared.v4.b32 {TILES}, [%r5];",
}


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("way", ["ldmatrix", "stmatrix"])
def test_tiles(way: str, trans: str) -> None:
    """Four tiles of 8 x 8; each row is where its thread says, here in another order than that of threads."""
    data, out = torch.arange(256, dtype=torch.int16).view(32, 8), torch.zeros(32, 8, dtype=torch.int16)
    moves = dict(BY_ROWS)
    if way == "ldmatrix":
        moves["read"] = f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {TILES}, [%r5];"
    else:
        moves["write"] = f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r5], {TILES};"
    moves["load"] = pointer("%d0", 0, 16) + moved("ld", "a", 4, "%d0")
    moves["store"] = pointer("%d1", 1, 16) + moved("st", "a", 4, "%d1")
    machine = Machine()
    machine.launch(kernel(THROUGH_SHARED.format(**moves), 2, registers=".reg .b32 %a<4>;"), 512, (1,), [data, out])
    machine.check()
    rows, threads = (data, out) if way == "ldmatrix" else (out, data)
    for thread in range(32):
        for tile in range(4):
            for half in range(2):
                row, column = thread // 4, 2 * (thread % 4) + half
                if trans:
                    row, column = column, row
                assert threads[thread, 2 * tile + half] == rows[8 * tile + row, column]


@pytest.mark.parametrize(
    ("arch", "dtype", "opcode"), [(80, "bfloat16", "mma"), (90, "float16", "wgmma"), (90, "bfloat16", "wgmma")]
)
def test_a_dense_product_as_triton_compiles_it(arch: int, dtype: str, opcode: str) -> None:
    """With copies that overlap, and on sm_90 with products of four warps."""
    pytest.importorskip("triton", reason="Triton is not installed")
    assert any(found.startswith(f"{opcode}.") for found in call(dense.check_product, arch, dtype))


BASE = """
mov.u32 %r0, %tid.x;
{load}
mov.b32 %r1, global_smem;
shl.b32 %r2, %r0, 2;
add.s32 %r3, %r1, %r2;
xor.b32 %r4, %r2, {other};
add.s32 %r4, %r1, %r4;
{put}
{order}
ld.shared.b32 %r5, [%r4];
{then}
{store}
st.global.b32 [%d1 + {to}], %r5;
"""
STORE = "ld.global.b32 %r6, [%d0];\nst.shared.b32 [%r3], %r6;"
COPY = "cp.async.ca.shared.global [%r3], [%d0], 4;\ncp.async.commit_group;\n"
WAIT, BARRIER, WARP_BARRIER = "cp.async.wait_group 0;", "bar.sync 0;", "bar.warp.sync -1;"
# What is changed of: a word of each thread to shared memory, a barrier, and the word of the thread ``other`` / 4 away.
FAULTS: dict[str, tuple[dict[str, object], str]] = {
    "none": ({}, ""),
    "none: a copy": ({"put": COPY + WAIT}, ""),
    "none: a barrier of the warp for a neighbour": ({"order": WARP_BARRIER, "other": 4}, ""),
    "none: the own word": ({"order": "", "other": 0}, ""),
    "no barrier": ({"order": ""}, "race in a CTA: read after write"),
    "a barrier of the warp for another one": ({"order": WARP_BARRIER}, "race in a CTA: read after write"),
    "no barrier for a neighbour": ({"order": "", "other": 4}, "race in a warp: read after write"),
    "no barrier before the next write": ({"then": "st.shared.b32 [%r3], %r5;"}, "race in a CTA: write after read"),
    "no barrier after several have read": (
        {"then": "ld.shared.b32 %r7, [%r1];\nst.shared.b32 [%r1], %r5;", "other": 0},
        "race in a CTA: write after read",
    ),
    "all to one place": (
        {"put": f"{STORE}\nst.shared.b32 [%r1], %r0;"},
        "several threads write different values at once",
    ),
    "no wait": ({"put": COPY}, "read before the wait of its asynchronous copy"),
    "a wait for the group before": (
        {"put": COPY + WAIT.replace("0", "1")},
        "read before the wait of its asynchronous copy",
    ),
    "a copy without a barrier": ({"put": COPY + WAIT, "order": ""}, "race in a CTA: read after write"),
    "a barrier before the wait": ({"put": COPY + BARRIER + WAIT, "order": ""}, "race in a CTA: read after write"),
    "a write over a copy": ({"put": f"{COPY}{STORE}"}, "write before the wait of an asynchronous copy"),
    "nothing written": ({"put": ""}, "read of what nobody wrote"),
    "past the end of a tensor": ({"to": 4}, "write out of bounds"),
    "misaligned": ({"to": 2}, "misaligned write"),
    "past the end of shared memory": ({"put": STORE.replace("[%r3]", "[%r3 + 4]")}, "write out of bounds"),
}


def run(
    changes: dict[str, object], grid: int = 1, source: torch.Tensor | None = None, machine: Machine | None = None
) -> Machine:
    parts = {"other": 128, "to": 0, "put": STORE, "order": BARRIER, "then": ""} | changes
    parts |= {"load": pointer("%d0", 0, 4), "store": pointer("%d1", 1, 4)}
    machine = machine or Machine()
    source = torch.arange(64, dtype=torch.int32) if source is None else source
    tensors = [source, torch.zeros(64, dtype=torch.int32)]
    machine.launch(kernel(BASE.format(**parts), 2, threads=64), 256, (grid,), tensors)
    return machine


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults(name: str) -> None:
    changes, kind = FAULTS[name]
    machine = run(changes)
    if not kind:
        machine.check()
        return
    assert kind in machine.kinds
    with pytest.raises(FoundError, match=f"{kind}.*CTA .*, thread .*"):
        machine.check()


def test_ctas_that_write_to_one_place() -> None:
    """The first finds zeros and the others their own values, which only the first write changes."""
    store = "mov.u32 %r7, %ctaid.x;\nadd.s32 %r5, %r5, %r7;"
    assert "several threads write different values at once" in run({"then": store}, grid=3).kinds
    apart = run({"then": store}, grid=3, machine=Machine(lanes=64))
    assert "race in a launch: write after write" in apart.kinds


def test_what_the_caller_forbids() -> None:
    """Elements of a view, ten of them in the part that is read."""
    machine, numbers = Machine(), torch.arange(128, dtype=torch.int32)
    machine.forbid(numbers[40:50])
    run({}, source=numbers[:64], machine=machine)
    assert machine.kinds == {"read of what nobody wrote"} and sum(machine.found.values()) == 10


def test_what_a_kernel_has_written_may_be_read() -> None:
    machine, numbers = Machine(), torch.full((64,), -1, dtype=torch.int32)
    machine.forbid(numbers)
    body = "mov.u32 %r0, %tid.x;\n" + pointer("%d0", 0, 4) + "st.global.b32 [%d0], %r0;"
    machine.launch(kernel(body, 1, threads=64), 0, (1,), [numbers])
    run({}, source=numbers, machine=machine)
    machine.check()
