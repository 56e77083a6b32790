"""Keys to be rounded in the metric of queries, and ``round_triton`` compiled and run by the PTX machine."""

import torch
from kernels.compiled import CPU, unchanged
from kernels.ptx_machine import Launch, Machine, running_on

from kvquant_hf.triton_kernels.append_reference import round_reference
from kvquant_hf.triton_kernels.codecs import CODECS
from kvquant_hf.triton_kernels.pages import PagedSide
from kvquant_hf.triton_kernels.round import round_triton

PAGE, HEADS = 64, 2


def problem(name: str, dim: int, batch: int = 1, count: int = 2) -> tuple[PagedSide, torch.Tensor, torch.Tensor]:
    """Pages that nobody has written, keys for all but one of them, and second moments of few directions."""
    torch.manual_seed(dim)
    x = torch.randn(batch, HEADS, count * PAGE, dim) * torch.rand(dim) * 3 + 8 * torch.randn(dim)
    sizes = torch.exp(-torch.arange(dim) / (dim / 8))
    queries = torch.randn(batch, HEADS, 4 * dim, dim) * sizes @ torch.randn(batch, HEADS, dim, dim)
    shapes = [(p.shape(PAGE), p.dtype) for p in CODECS[name].planes(dim)]
    planes = [torch.full((batch * count + 1, HEADS, *shape), 7, dtype=dtype) for shape, dtype in shapes]
    side = PagedSide(CODECS[name], planes, torch.empty(batch, HEADS, PAGE, dim), PAGE)
    return side, x, queries.transpose(-1, -2) @ queries


def on(side: PagedSide, device: torch.device) -> PagedSide:
    """A copy on ``device``."""
    return side._replace(planes=[plane.clone().to(device) for plane in side.planes], tail=side.tail.to(device))


def check_compiled(name: str, dim: int, arch: int) -> list[Launch]:
    """The bytes of torch, and nothing found; what was launched."""
    machine = Machine()
    side, x, metric = problem(name, dim, count=1)
    got, want, pages = on(side, CPU), on(side, CPU), torch.tensor([[1]])
    with unchanged(x, metric), running_on(machine, arch):
        round_triton(got, x, pages, metric)
    machine.check()
    round_reference(want, x, pages, metric)
    assert all(torch.equal(a, b) for a, b in zip(got.planes, want.planes, strict=True))
    return machine.launches
