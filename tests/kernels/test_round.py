"""Keys rounded in the metric of queries by the kernel, interpreted and compiled: the bytes of torch.

A code on the half to the last bit of a sum may fall on either side; the pages here have none.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from kernels.aot import TARGETS, Case, compile_cases
from kernels.compiler_process import call
from kernels.rounding import HEADS, check_compiled, on, problem

from kvquant_hf.triton_kernels import round as rounding
from kvquant_hf.triton_kernels.ops import round_keys


@pytest.mark.parametrize(("name", "dim"), [("int4-ranked", 80), ("int3-ranked", 64), ("int2-ranked", 16)])
def test_the_bytes_of_torch(name: str, dim: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some pages at a time, in places of any order; one that is not named stays as it is."""
    monkeypatch.setattr(rounding, "FACTOR_BYTES", 2 * HEADS * dim * dim * 8)
    side, x, metric = problem(name, dim, batch=2)
    pages = torch.tensor([[3, 0], [1, 4]])
    got, want = on(side, device), on(side, torch.device("cpu"))
    round_keys(got, x.to(device), pages.to(device), metric.to(device), impl="triton")
    round_keys(want, x, pages, metric, impl="reference")
    for a, b in zip(got.planes, want.planes, strict=True):
        assert torch.equal(a.cpu(), b)
        assert (b[2] == 7).all() and not (b[0] == 7).all()


def test_a_metric_that_overflowed_gives_the_nearest_codes(device: torch.device) -> None:
    side, x, metric = problem("int3-ranked", 64, count=1)
    got, want = on(side, device), on(side, torch.device("cpu"))
    broken = torch.full_like(metric, float("nan"))
    round_keys(got, x.to(device), torch.tensor([[0]], device=device), broken.to(device), impl="triton")
    round_keys(want, x, torch.tensor([[0]]), broken, impl="reference")
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got.planes, want.planes, strict=True))


def test_compiled_it_stores_the_same() -> None:
    (launch,) = call(check_compiled, "int4-ranked", 16, 80)
    assert launch.name == "_round_kernel"


@pytest.mark.slow
@pytest.mark.parametrize("target", [t if t == "sm_90" else pytest.param(t, marks=pytest.mark.full) for t in TARGETS])
def test_it_compiles_without_stack(target: str) -> None:
    for dim in (128, 256):
        case = Case(target, "int4-ranked", "exact", kernel="round", dtype="float32", head_dim=dim)
        (built,) = compile_cases([case])[case]
        assert built.name == "_round_kernel" and not built.spilled, built
