"""fp8 and nvfp4 against their definitions: every code, every number of fp16, every product, in every implementation."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvquant_hf.triton_kernels.codecs import CODECS
from kvquant_hf.triton_kernels.codecs.packing import pack_fields
from kvquant_hf.triton_kernels.codecs.small_float import E2M1, from_e4m3, to_e2m1, to_e4m3
from kvquant_hf.triton_kernels.cpu.attention import paged_attention_cpu
from kvquant_hf.triton_kernels.pages import PagedSide
from kvquant_hf.triton_kernels.reference import paged_attention_reference

FP8, NVFP4 = CODECS["fp8"], CODECS["nvfp4"]
PAGE = 16


def e4m3(code: int) -> float:
    """What a code stands for, by the definition."""
    exponent, mantissa = code >> 3 & 15, code & 7
    value = math.ldexp(8 + mantissa, exponent - 10) if exponent else math.ldexp(mantissa, -9)
    return -value if code & 0x80 else value


MAGNITUDES = {"e4m3": [e4m3(code) for code in range(0x7F)], "e2m1": list(E2M1)}
ENCODE = {"e4m3": to_e4m3, "e2m1": to_e2m1}


def nearest(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Codes by looking at all of them, in float64; of two that are as near the even one."""
    table = torch.tensor(MAGNITUDES[kind], dtype=torch.float64)
    distance = (x.double().abs().clamp_max(table[-1].item()).unsqueeze(-1) - table).abs()
    near = distance == distance.amin(-1, keepdim=True)
    first = near.int().argmax(-1)
    codes = torch.where((near.sum(-1) == 2) & (first % 2 == 1), first + 1, first)
    return (codes + (0x80 if kind == "e4m3" else 8) * torch.signbit(x)).to(torch.uint8)


def test_codes_stand_for_numbers() -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    expected = torch.tensor([e4m3(int(code)) for code in codes])
    assert torch.equal(from_e4m3(codes), expected) and torch.equal(to_e4m3(expected), codes)
    assert torch.equal(torch.signbit(expected), codes >= 0x80), "zeros have signs"
    assert MAGNITUDES["e4m3"][-1] == 448 and MAGNITUDES["e4m3"][1] == 2.0**-9


@pytest.mark.parametrize("kind", MAGNITUDES)
def test_the_nearest_number_is_stored(kind: str) -> None:
    """Of all numbers of fp16, of what lies halfway between two codes, and of its neighbours in float32."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    table = torch.tensor(MAGNITUDES[kind])
    middles = (table[1:] + table[:-1]) / 2
    edges = torch.cat([middles, middles.nextafter(middles + 1), middles.nextafter(middles - 1)])
    x = torch.cat([every[every.isfinite()], edges, -edges, torch.tensor([3e38, -3e38, 1e-45])])
    assert torch.equal(ENCODE[kind](x), nearest(x, kind))


@pytest.mark.parametrize("dim", [16, 24, 40, 64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nvfp4_is_its_formula(dim: int, dtype: torch.dtype) -> None:
    """Block by block; some too large for a scale, some too small for one, one of zeros."""
    x = torch.randn(6, dim) * torch.tensor([1.0, 100.0, 1e4, 0.1, 0.003, 0.0]).unsqueeze(-1)
    x = x.to(dtype).float()
    codes, scales = NVFP4.encode(x.to(dtype))
    expected = torch.zeros(6, dim, dtype=torch.uint8)
    for t in range(6):
        for first in range(0, dim, 16):
            block = x[t, first : first + 16]
            scale = nearest((block.abs().max() * torch.tensor(1 / 6)).reshape(1), "e4m3")
            assert scales[t, first // 16] == scale
            number = e4m3(int(scale))
            inverse = 1 / torch.tensor(number) if number else torch.tensor(0.0)
            expected[t, first : first + 16] = nearest(block * inverse, "e2m1")
    assert torch.equal(codes, pack_fields(expected, 4)) and scales.shape == (6, -(-dim // 16))
    signed = torch.tensor(E2M1 + tuple(-level for level in E2M1))[expected.long()]
    assert torch.equal(NVFP4.decode((codes, scales)), signed * from_e4m3(scales).repeat_interleave(16, -1)[:, :dim])


def test_what_has_codes_comes_back() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 0x7F, (PAGE, 64), generator=generator).to(torch.uint8)
    codes |= torch.randint(0, 2, codes.shape, generator=generator).to(torch.uint8) << 7
    assert torch.equal(FP8.encode(from_e4m3(codes))[0], codes)
    levels = torch.tensor(E2M1)[torch.randint(0, 8, (PAGE, 64), generator=generator)]
    levels[:, ::16] = 6
    x = levels * 2.0 ** torch.randint(-9, 9, (PAGE, 1), generator=generator)
    assert torch.equal(NVFP4.decode(NVFP4.encode(x)), x)


def test_products_are_exact_in_fp16() -> None:
    """In the units of the kernels, subnormal numbers among them."""
    scales, levels = torch.tensor(MAGNITUDES["e4m3"]), torch.tensor(E2M1)
    product = (scales * 2.0**7).half().unsqueeze(-1) * (levels * 2.0**-14).half()
    assert torch.equal(product.double() * NVFP4.kernel.unit, scales.double().unsqueeze(-1) * levels.double())


def implementations() -> list[Any]:
    found = [pytest.param(paged_attention_reference, id="reference"), pytest.param(paged_attention_cpu, id="cpu")]
    try:
        from kvquant_hf.triton_kernels.triton_attention import paged_attention_triton
    except ImportError:
        return found
    return [*found, pytest.param(paged_attention_triton, id="triton")]


attentions = pytest.mark.parametrize("attention", implementations())


def constant_channels(attention: Callable[..., torch.Tensor], planes: list[torch.Tensor], codec: str) -> torch.Tensor:
    """What attention makes of one page of values whose tokens are all alike: these values, ``[dim]``."""
    pages = [plane.expand(1, 1, PAGE, -1).contiguous() for plane in planes]
    dim = pages[0].shape[-1] * (8 // CODECS[codec].bits)
    open_page = torch.zeros(1, 1, PAGE, dim)
    keys = PagedSide(FP8, [torch.zeros(1, 1, PAGE, dim, dtype=torch.uint8)], open_page, PAGE)
    values = PagedSide(CODECS[codec], pages, open_page, PAGE)
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([[1, 0]], dtype=torch.int32)
    query = torch.ones(1, 1, 1, dim)
    return attention(query, keys, values, table, lengths, scale=1.0).flatten()


@attentions
def test_every_code_is_read(attention: Callable[..., torch.Tensor]) -> None:
    codes = torch.arange(256, dtype=torch.int32)
    codes[codes & 0x7F == 0x7F] = 0
    expected = torch.tensor([e4m3(int(code)) for code in codes])
    result = constant_channels(attention, [codes.to(torch.uint8)], "fp8")
    # Sixteen equal weights and their sum, rounded.
    assert ((result - expected).abs() <= 1e-6 * expected.abs()).all()


@attentions
def test_every_scale_is_read(attention: Callable[..., torch.Tensor]) -> None:
    """With every code; blocks of 24 and 40 channels lie in both halves of a byte."""
    for dim in (256, 24, 40):
        codes = torch.arange(dim) * 7 % 16
        for first in range(0, 0x7F, 16 if dim == 256 else 50):
            scales = torch.arange(first, first - (-dim // 16)) % 0x7F
            levels = torch.tensor(E2M1 + tuple(-level for level in E2M1))[codes]
            expected = levels * torch.tensor(MAGNITUDES["e4m3"])[scales].repeat_interleave(16)[:dim]
            packed = pack_fields(codes.to(torch.uint8), 4)
            result = constant_channels(attention, [packed, scales.to(torch.uint8)], "nvfp4")
            assert ((result - expected).abs() <= 1e-6 * expected.abs()).all(), (dim, first)
