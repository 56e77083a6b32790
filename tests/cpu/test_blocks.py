"""Weights in the blocks of GGUF files: the layouts against gguf's own reader, the compiled kernels against both."""

import numpy as np
import pytest
import torch

from kvquant_hf.triton_kernels.blocks import FORMATS, BlockFormat, multiply_reference, parts, unpack_reference
from kvquant_hf.triton_kernels.cpu import blocks as compiled

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

ROWS, COLUMNS = 37, 768
EPS = 2.0**-24  # half a unit in the last place of float32, relative


def random_blocks(known: BlockFormat, rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    """Any bytes, but finite scales."""
    raw = np.random.default_rng(known.code).integers(0, 256, (rows, known.row_bytes(columns)), dtype=np.uint8)
    blocks = raw.reshape(-1, known.size)
    starts = (208,) if known.name == "Q6_K" else (0,) if known.name in ("Q4_0", "Q5_0", "Q8_0") else (0, 2)
    for start in starts:
        scales = np.random.default_rng(start).standard_normal((len(blocks), 1)).astype(np.float16)
        scales[0] = 2.0**-20  # a subnormal one
        blocks[:, start : start + 2] = scales.view(np.uint8)
    return torch.from_numpy(raw)


def of_gguf(blocks: torch.Tensor, known: BlockFormat) -> torch.Tensor:
    """What gguf reads."""
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(known.code)))


def rounding(blocks: torch.Tensor, known: BlockFormat) -> torch.Tensor:
    """How far two evaluations of an element in float32 may lie apart, ``[rows, columns]``.

    One of them may fuse the product with the sum: the other rounds the product, of the size of the element and its
    offset at most.
    """
    shifted = of_gguf(blocks, known)
    if known.name in ("Q4_1", "Q5_1"):
        offset = blocks.reshape(-1, known.size)[:, 2:4].contiguous().view(torch.float16).float()
    elif known.name in ("Q4_K", "Q5_K"):
        offset = blocks.reshape(-1, known.size)[:, 2:4].contiguous().view(torch.float16).float() * 63
    else:
        return torch.zeros_like(shifted)
    per_element = offset.abs().repeat_interleave(known.elements, dim=1).reshape(shifted.shape)
    return 2 * EPS * (shifted.abs() + per_element)


@pytest.mark.parametrize("known", FORMATS.values(), ids=FORMATS)
def test_a_format(known: BlockFormat) -> None:
    """Its size is gguf's, and plain torch reads what gguf reads, to the bit."""
    kind = gguf.GGMLQuantizationType(known.code)
    assert kind.name == known.name and gguf.GGML_QUANT_SIZES[kind] == (known.elements, known.size)
    blocks = random_blocks(known)
    assert torch.equal(unpack_reference(blocks, known), of_gguf(blocks, known))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("known", FORMATS.values(), ids=FORMATS)
def test_compiled_unpacking(known: BlockFormat, dtype: torch.dtype) -> None:
    """Also of rows that lie apart."""
    blocks = random_blocks(known)
    apart = torch.full((ROWS, blocks.shape[1] + 5), 255, dtype=torch.uint8)[:, : blocks.shape[1]]
    apart.copy_(blocks)
    found, exact = compiled.unpack_cpu(apart, known, COLUMNS, dtype), of_gguf(blocks, known)
    assert found.dtype == dtype and found.shape == (ROWS, COLUMNS)
    unit = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
    smallest = torch.finfo(dtype).smallest_normal * unit  # half a step below the normal numbers
    bound = rounding(blocks, known) * (1 + unit) + unit * exact.abs() + smallest
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("n", [1, 3, 4, 5, compiled.FUSED_ROWS, compiled.FUSED_ROWS + 1])
@pytest.mark.parametrize("known", FORMATS.values(), ids=FORMATS)
def test_compiled_multiplying(known: BlockFormat, n: int) -> None:
    """Against float64, within the bound of a sum of as many products in any order."""
    blocks, x = random_blocks(known), torch.randn(n, COLUMNS)
    weights = of_gguf(blocks, known).double()
    sizes = x.double().abs() @ weights.abs().T
    bound = (COLUMNS + 1) * EPS * 1.01 * sizes + x.double().abs() @ rounding(blocks, known).double().T
    for found in (compiled.multiply_cpu(x, blocks, known), multiply_reference(x, blocks, known)):
        assert found.shape == (n, ROWS)
        assert ((found.double() - x.double() @ weights.T).abs() <= bound).all()


@pytest.mark.parametrize("n", [2, 40])
def test_half_precision_in_and_out(n: int) -> None:
    known = FORMATS["Q4_1"]
    blocks, x = random_blocks(known), torch.randn(n, COLUMNS).bfloat16()
    weights = of_gguf(blocks, known).double()
    found = compiled.multiply_cpu(x, blocks, known)
    # The weights may be rounded to bfloat16 first, the result is.
    unit = torch.finfo(torch.bfloat16).eps / 2
    exact = x.double() @ weights.T
    bound = (unit + 2 * COLUMNS * EPS) * (x.double().abs() @ weights.abs().T) + unit * (exact.abs() + 1e-3)
    assert found.dtype == torch.bfloat16 and ((found.double() - exact).abs() <= bound * (1 + unit)).all()


def test_a_matrix_is_unpacked_in_parts() -> None:
    """Each of at most a million elements, or one row; together all of them."""
    for rows, columns, count in ((2048, 1024, 2), (3, 1 << 21, 3), (1, 32, 1)):
        blocks = torch.arange(rows)[:, None]
        found = parts(blocks, columns)
        assert len(found) == count and torch.equal(torch.cat([part for _, part in found]), blocks)
        assert [start for start, _ in found] == [int(part[0]) for _, part in found]
