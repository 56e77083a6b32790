"""What every launch says to the compiler, and that every launch goes one way."""

from collections import Counter
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from kernels.test_decode import PAGE, Case, side

from kvquant_hf.triton_kernels import launching
from kvquant_hf.triton_kernels.triton_attention import append_triton, paged_attention_triton

KERNELS = {
    "_append_kernel",
    "_rotate_kernel",
    "_decode_kernel",
    "_combine_kernel",
    "_combine_rows_kernel",
    "_dense_pages_kernel",
    "_chunk_kernel",
}


def test_every_launch_says_whether_products_and_sums_are_fused(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's default changes between versions.  Appending rounds as the codecs in torch do, so there they are not."""
    fused: Counter[tuple[str, bool]] = Counter()
    launch = launching.launch

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> Any:
        fused[kernel.fn.__name__, constants["enable_fp_fusion"]] += 1
        return launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(launching, "launch", note)
    case = Case((PAGE + 1, PAGE + 1), heads=1)
    keys, values = (side(name, case, 64, 4, device) for name in ("lloyd4-centred", "lloyd2"))
    table = torch.arange(4, dtype=torch.int32, device=device).view(2, 2)
    lengths = torch.tensor([[1, 1]] * 2, dtype=torch.int32, device=device)
    new = torch.zeros(2, 1, 1, 64, dtype=case.dtype, device=device)
    append_triton(new, new, keys, values, table, lengths, torch.empty_like(lengths))
    for queries in (1, 16, 64):
        query = torch.zeros(2, 4, queries, 64, dtype=case.dtype, device=device)
        paged_attention_triton(query, keys, values, table[:, :1], lengths, scale=0.1, causal=False)
    assert {name for name, _ in fused} == KERNELS
    assert {fusion for name, fusion in fused if "append" not in name} == {True}
    assert not fused["_append_kernel", True]
