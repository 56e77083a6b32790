"""Small floating-point codes, as serving engines store keys and values: fp8 (e4m3), and nvfp4 (e2m1 in blocks of 16).

fp8     code = the number of e4m3 next to x, ties to even, |x| above 448 stored as 448        8 bits per element

    codes   uint8 [P, D]    bit    7       6 5 4 3    2 1 0
                            code   sign    e          m          2^(e - 7) (1 + m / 8);  e = 0: 2^-6 m / 8

    An element is off by at most max(|x| / 16, 2^-10), and by |x| - 448 where it is cut off.

There is no scale, that is, it is 1: what engines store where nobody has calibrated them.  Nor would one for each page
and head do much: it moves a grid of floating-point numbers and makes it no finer.  Between 2^-6 and 448 the error is a
share of the number itself, wherever it lies.  Only what is beyond one of the ends gains by it: on SmolLM2 (WikiText-2,
2 windows) the KLD is .00151, and .00148 with all numbers times 16.

nvfp4   16 neighbouring channels of a token share a scale s in e4m3                           4 + 8/16 = 4.5 bits

    s    = e4m3(max |x| * (1/6))           all in float32, the reciprocals rounded to it
    code = e2m1(x * (1/s))                 0 0.5 1 1.5 2 3 4 6 and their negatives, ties to even, cut off at 6;
                                           zeros where s is 0
    x^   = code * s

    codes   uint8 [P, D/2]  bit    7 6 5 4          3 2 1 0
                            code   channel j + D/2  channel j          j = 0 .. D/2 - 1
            a code of 4 bits       sign e e m                          2^(e - 1) (1 + m / 2);  e = 0: m / 2
    scale   uint8 [P, D/16]        e4m3, of channels 16 i .. 16 i + 15  (the last block may be shorter)

    An element is off by at most max(|x|, s) / 4, and by |x| - 6 s where it is cut off: s may be rounded down.

NVIDIA's recipe has a second scale, one float32 for a whole tensor, that brings the largest s to 448.  It is 1 here, as
in an engine that nobody has calibrated: a cache has no whole tensor when it stores a page, and e4m3 reaches from 2^-9
to 448 by itself.  Blocks whose largest number is between 0.1 and 2688 have an s of full precision, smaller ones a
coarser one, below 0.006 none.  With all numbers times 16 the KLD is .0168 instead of .0169.

A product of code and scale has six significant bits: it is exact in fp16, so that kernels multiply by ``s`` before the
product with a query, which no scale per token or channel could stand for.

References: OCP 8-bit floating point specification; vLLM, docs/features/quantization/quantized_kvcache.md and its
``ref_nvfp4_quant``; NVIDIA, "Optimizing inference for long context and large batch sizes with NVFP4 KV cache" (2025).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..pack import store_bytes, store_codes
from ..ptx import FLOAT4, FLOAT8
from ..target import tl, triton
from ..unpack import load_words, unpack_floats
from .base import Codec, Plane, Tile
from .cpu import CpuCodec
from .jit import KernelCodec, no_channels
from .packing import expand_levels, pack_fields

BLOCK = 16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SIGNED = E2M1 + tuple(-level for level in E2M1)
# What lies halfway between two levels goes to the code that is even.
_MIDDLES = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
_LARGEST, _SMALLEST = 448.0, 2.0**-9  # of e4m3
_LARGEST_CODE = 0x7E
_SIXTH = 1 / 6


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """uint8 codes of finite float32 ``x``, of its shape; saturating."""
    return x.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)


def from_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """float32 numbers of uint8 ``codes``."""
    return codes.view(torch.float8_e4m3fn).float()


def to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """uint8 codes below 16 of finite float32 ``x``, of its shape; saturating."""
    magnitude = x.abs()
    codes = torch.signbit(x).to(torch.uint8) << 3
    for middle, even_above in _MIDDLES:
        codes += magnitude >= middle if even_above else magnitude > middle
    return codes


# -- kernels -----------------------------------------------------------------------------------------------------------

_FLOAT8, _FLOAT4 = tl.constexpr(FLOAT8), tl.constexpr(FLOAT4)
_ONE_SIXTH = tl.constexpr(_SIXTH)


@triton.jit
def _e4m3_codes(x):
    """Codes of finite ``x`` (float32), int32."""
    magnitude = tl.minimum(tl.abs(x), 448.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    # Twenty bits of the mantissa go, ties to even; the exponent is counted from 7 and not from 127.
    codes = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 numbers are multiples of 2^-9, the unit in the last place of 2^14.
    small = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return sign | tl.where(magnitude < 0.015625, small, codes)


@triton.jit
def _e4m3_scales(codes, UNIT: tl.constexpr, DTYPE: tl.constexpr):
    """Numbers without a sign times ``UNIT``, in ``DTYPE``, of integer codes."""
    halves = (codes.to(tl.int16) << 7).to(tl.float16, bitcast=True)  # times 2^-8
    return halves.to(DTYPE) * (UNIT * 256.0)


@triton.jit
def _e2m1_codes(x):
    """Codes of ``x`` (float32), int32."""
    magnitude = tl.abs(x)
    codes = (magnitude > 0.25).to(tl.int32) + (magnitude >= 0.75).to(tl.int32) + (magnitude > 1.25).to(tl.int32)
    codes += (magnitude >= 1.75).to(tl.int32) + (magnitude > 2.5).to(tl.int32) + (magnitude >= 3.5).to(tl.int32)
    codes += (magnitude > 5.0).to(tl.int32)
    return codes | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def _fp8_tile(
    planes,
    page_head,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    WORDS: tl.constexpr,
    DTYPE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PTX: tl.constexpr,
):
    words = load_words(planes[0], page_head, offs_n, HEAD_DIM, PAGE, FIELDS, WORDS, TRANSPOSED)
    return unpack_floats(words, FIELDS, _FLOAT8, DTYPE, PTX), offs_n, offs_n


@triton.jit
def _fp8_encode(
    planes,
    page_head,
    x,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    BYTES: tl.constexpr,
):
    store_codes(planes[0], page_head, offs_n, _e4m3_codes(x.to(tl.float32)), HEAD_DIM, PAGE, FIELDS, BYTES)


@triton.jit
def _run_of(HEAD_DIM: tl.constexpr):
    """Channels of a field that are in one block whatever the field: both begin at multiples of it."""
    FIELD: tl.constexpr = HEAD_DIM // 2
    RUN: tl.constexpr = FIELD & -FIELD
    return 16 if RUN > 16 else RUN


@triton.jit
def _word_scales(
    scale_ptr,
    page_head,
    offs_n,
    FIELD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WORDS: tl.constexpr,
    DTYPE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """The scale times 2^7 of each word in field ``FIELD``, ``[N, WORDS]`` or ``[WORDS, N]``; zero past the head."""
    RUN: tl.constexpr = _run_of(HEAD_DIM)
    COUNT: tl.constexpr = WORDS * 2 // RUN
    BLOCKS: tl.constexpr = (HEAD_DIM + 15) // 16
    runs = tl.arange(0, COUNT)
    block = (FIELD * (HEAD_DIM // 2) + runs * RUN) // 16
    pointers = scale_ptr + page_head * (PAGE * BLOCKS) + offs_n[:, None] * BLOCKS + block[None, :]
    codes = tl.load(pointers, mask=(runs * RUN < HEAD_DIM // 2)[None, :], other=0)  # [N, COUNT]
    scales = _e4m3_scales(codes, 128.0, DTYPE)
    if TRANSPOSED:
        scales = tl.trans(scales)[:, None, :]
        return tl.broadcast_to(scales, (COUNT, RUN // 2, offs_n.shape[0])).reshape(WORDS, offs_n.shape[0])
    else:
        return tl.broadcast_to(scales[:, :, None], (offs_n.shape[0], COUNT, RUN // 2)).reshape(offs_n.shape[0], WORDS)


@triton.jit
def _nvfp4_tile(
    planes,
    page_head,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    WORDS: tl.constexpr,
    DTYPE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PTX: tl.constexpr,
):
    words = load_words(planes[0], page_head, offs_n, HEAD_DIM, PAGE, FIELDS, WORDS, TRANSPOSED)
    levels = unpack_floats(words, FIELDS, _FLOAT4, DTYPE, PTX)
    first = _word_scales(planes[1], page_head, offs_n, 0, HEAD_DIM, PAGE, WORDS, DTYPE, TRANSPOSED)
    second = _word_scales(planes[1], page_head, offs_n, 1, HEAD_DIM, PAGE, WORDS, DTYPE, TRANSPOSED)
    return (levels[0] * first, levels[1] * first, levels[2] * second, levels[3] * second), offs_n, offs_n


@triton.jit
def _block_maxima(low, high, HEAD_DIM: tl.constexpr, RUN: tl.constexpr):
    """Largest magnitude of each run's block, of fields ``[N, BYTES]``: two ``[N, BYTES / RUN]``."""
    N: tl.constexpr = low.shape[0]
    COUNT: tl.constexpr = low.shape[1] // RUN
    low = tl.max(tl.abs(low).reshape(N, COUNT, RUN), 2)
    high = tl.max(tl.abs(high).reshape(N, COUNT, RUN), 2)
    if RUN == 16:
        return low, high
    else:
        # Blocks of several runs, one of which may lie in both fields.  Runs past the head are zero.
        runs = tl.arange(0, COUNT) * RUN
        first, second = runs // 16, (HEAD_DIM // 2 + runs) // 16
        low_of_first = tl.where((first[:, None] == first[None, :])[None, :, :], low[:, None, :], 0.0)
        high_of_first = tl.where((first[:, None] == second[None, :])[None, :, :], high[:, None, :], 0.0)
        low_of_second = tl.where((second[:, None] == first[None, :])[None, :, :], low[:, None, :], 0.0)
        high_of_second = tl.where((second[:, None] == second[None, :])[None, :, :], high[:, None, :], 0.0)
        low = tl.max(tl.maximum(low_of_first, high_of_first), 2)
        return low, tl.max(tl.maximum(low_of_second, high_of_second), 2)


@triton.jit
def _encode_field(
    scale_ptr,
    page_head,
    x,
    largest,
    offs_n,
    FIELD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    RUN: tl.constexpr,
):
    """Write the scales of the blocks that begin in field ``FIELD``; codes of its ``x`` ``[PAGE, BYTES]``, int32."""
    BYTES: tl.constexpr = x.shape[1]
    COUNT: tl.constexpr = BYTES // RUN
    BLOCKS: tl.constexpr = (HEAD_DIM + 15) // 16
    scale = _e4m3_codes(largest * _ONE_SIXTH)  # [PAGE, COUNT]
    runs = tl.arange(0, COUNT) * RUN
    channel = FIELD * (HEAD_DIM // 2) + runs
    pointers = scale_ptr + page_head * (PAGE * BLOCKS) + offs_n[:, None] * BLOCKS + (channel // 16)[None, :]
    tl.store(pointers, scale.to(tl.uint8), mask=((runs < HEAD_DIM // 2) & (channel % 16 == 0))[None, :])
    scale = _e4m3_scales(scale, 1.0, tl.float32)
    inverse = tl.where(scale > 0.0, tl.div_rn(1.0, tl.where(scale > 0.0, scale, 1.0)), 0.0)
    inverse = tl.broadcast_to(inverse[:, :, None], (PAGE, COUNT, RUN)).reshape(PAGE, BYTES)
    return _e2m1_codes(x * inverse)


@triton.jit
def _nvfp4_encode(
    planes,
    page_head,
    x,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    BYTES: tl.constexpr,
):
    RUN: tl.constexpr = _run_of(HEAD_DIM)
    low, high = tl.split(x.to(tl.float32).reshape(PAGE, BYTES, 2))
    first, second = _block_maxima(low, high, HEAD_DIM, RUN)
    low = _encode_field(planes[1], page_head, low, first, offs_n, 0, HEAD_DIM, PAGE, RUN)
    high = _encode_field(planes[1], page_head, high, second, offs_n, 1, HEAD_DIM, PAGE, RUN)
    store_bytes(planes[0], page_head, offs_n, (low | (high << 4)).to(tl.uint8), PAGE, HEAD_DIM // 2)


# -- codecs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fp8Codec(Codec):
    """e4m3 numbers without a scale."""

    reproduces: bool = True

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        return (Plane("codes", torch.uint8, "token", head_dim, _LARGEST_CODE),)

    def _encode(self, x: torch.Tensor, model_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return (to_e4m3(x),)

    def tile(self, planes: Sequence[torch.Tensor]) -> Tile:
        return Tile(from_e4m3(planes[0]))

    @property
    def kernel(self) -> KernelCodec:
        return KernelCodec(_fp8_tile, no_channels, _fp8_encode, unit=2.0**8)

    def cpu(self, head_dim: int) -> CpuCodec:
        return CpuCodec(floats=True)

    def error_bound(self, x: torch.Tensor) -> torch.Tensor:
        magnitude = x.float().abs()
        rounding = (magnitude / 16).clamp_min(_SMALLEST / 2)
        # The last factor is for the rounding of this very computation.
        return (rounding + (magnitude - _LARGEST).clamp_min(0)).norm(dim=-1) * (1 + 1e-6)


@dataclass(frozen=True)
class BlockFloatCodec(Codec):
    """e2m1 numbers in blocks of 16 channels with an e4m3 scale each."""

    reproduces: bool = True

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        codes = Plane("codes", torch.uint8, "token", head_dim // 2)
        return codes, Plane("scale", torch.uint8, "token", -(-head_dim // BLOCK), _LARGEST_CODE)

    @staticmethod
    def _scales(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``x`` in blocks ``[..., blocks, 16]``, zeros after the head, and their scales uint8 ``[..., blocks]``."""
        blocks = torch.nn.functional.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
        return blocks, to_e4m3(blocks.abs().amax(-1) * _SIXTH)

    def _encode(self, x: torch.Tensor, model_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        blocks, stored = self._scales(x)
        scale = from_e4m3(stored)
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        codes = to_e2m1(blocks * inverse.unsqueeze(-1)).flatten(-2)
        return pack_fields(codes[..., : x.shape[-1]], 4), stored

    def tile(self, planes: Sequence[torch.Tensor]) -> Tile:
        codes, scale = planes
        levels = expand_levels(codes, _SIGNED)
        return Tile(levels * from_e4m3(scale).repeat_interleave(BLOCK, -1)[..., : levels.shape[-1]])

    @property
    def kernel(self) -> KernelCodec:
        # Codes leave times 2^-14, scales times 2^7.
        return KernelCodec(_nvfp4_tile, no_channels, _nvfp4_encode, 2, unit=2.0**7)

    def cpu(self, head_dim: int) -> CpuCodec:
        return CpuCodec(_SIGNED, floats=True, block_scale=1)

    def error_bound(self, x: torch.Tensor) -> torch.Tensor:
        blocks, stored = self._scales(x.float())
        scale, magnitude = from_e4m3(stored).unsqueeze(-1), blocks.abs()
        rounding = torch.maximum(magnitude, scale) / 4
        clipped = (magnitude - 6 * scale).clamp_min(0)
        # Quotients and this very computation are rounded.
        return (rounding + clipped).flatten(-2).norm(dim=-1) * (1 + 1e-6)


FP8 = Fp8Codec("fp8", 8, "8 bit floating point (e4m3), no scale", "vLLM, SGLang, LMDeploy: kv cache dtype fp8")
NVFP4 = BlockFloatCodec(
    "nvfp4",
    4,
    "4 bit floating point (e2m1), a scale (e4m3) for 16 channels",
    "NVIDIA NVFP4; vLLM kv cache dtype nvfp4",
    head_dim_multiple=2,
)
