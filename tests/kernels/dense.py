"""A dense product of matrices as Triton compiles it: no kernel of ours, but instructions that ours may get."""

import torch
from kernels.ptx_machine import Machine, running_on

from kvquant_hf.triton_kernels.target import tl, triton

SIZE = 64


@triton.jit
def _product_kernel(a_ptr, b_ptr, out_ptr, rounds, TRANSPOSED: tl.constexpr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for i in range(rounds):
        a = tl.load(a_ptr + (i * SIZE + offs[:, None]) * SIZE + offs[None, :])  # [SIZE, SIZE]
        b = tl.load(b_ptr + (i * SIZE + offs[:, None]) * SIZE + offs[None, :])  # [SIZE, SIZE]
        total = tl.dot(a, b.T if TRANSPOSED else b, total)
    tl.store(out_ptr + offs[:, None] * SIZE + offs[None, :], total)


def check_product(arch: int, dtype: str) -> set[str]:
    """A sum of products is right, with and without a transposed side, and nothing is found; the opcodes."""
    opcodes: set[str] = set()
    for transposed in (False, True):
        a, b = (torch.randint(-8, 9, (4, SIZE, SIZE)).to(getattr(torch, dtype)) for _ in range(2))
        out, machine = torch.zeros(SIZE, SIZE), Machine()
        with running_on(machine, arch):
            _product_kernel[(1,)](a, b, out, 4, TRANSPOSED=transposed, SIZE=SIZE, num_warps=4, num_stages=3)
        machine.check()
        assert torch.equal(out, (a.float() @ (b.mT if transposed else b).float()).sum(0))
        opcodes |= set(machine.launches[0].opcodes)
    return opcodes
