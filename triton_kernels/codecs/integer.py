"""Asymmetric integer codes with their range stored as fp16 (offset, step): int8 and int4, per channel or per token.

A vector ``x`` (one channel over the page, or one token over the channels) is stored as

    x_hat = offset + step * code,   code in 0 .. 2^b - 1

``offset`` is the largest fp16 number not above min(x) and ``step`` the smallest fp16 number with
``offset + step * (2^b - 1) >= max(x)``; codes are computed from these two rounded numbers.  Within the range of fp16
nothing is ever clipped, so |x_hat - x| <= step / 2 for every element, constant vectors come back within one fp16 step,
and no division by zero exists.  fp16 is used whatever the model's dtype: bf16 would lose three bits of both numbers.
Beyond +-65504 (bf16 and fp32 models, and rotated vectors: a channel there can be sqrt(D) times the largest element)
offset and step saturate; what is clipped then is part of ``error_bound``.

Per channel (keys), page of P tokens, D channels:

    codes   uint8 [P, D]            step, offset  fp16 [D]        int8: 8 + 32/P bits per element
            uint8 [P, D/2]                                        int4: 4 + 32/P

Per token (values):

    codes   as above                step, offset  fp16 [P, 1]     int8: 8 + 32/D bits per element,  int4: 4 + 32/D

A byte of int4 codes holds two channels, half a head apart, so that each half of the query meets whole bytes:

    bit    7 6 5 4          3 2 1 0
    code   channel j + D/2  channel j          j = 0 .. D/2 - 1

References: KIVI (arXiv:2402.02750) for keys per channel; QuaRot (arXiv:2404.00456) for rotated values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..pack import byte_columns, store_codes
from ..target import tl, triton
from ..tile_math import fp16_at_least as tile_at_least
from ..tile_math import fp16_at_most as tile_at_most
from ..tile_math import round_half_even
from ..unpack import load_channels, load_words, unpack_codes
from .base import Codec, Plane, Tile
from .cpu import CpuCodec
from .jit import KernelCodec, no_channels
from .packing import INTEGERS, expand_levels, fp16_at_least, fp16_at_most, pack_fields


@triton.jit
def _channel_tile(
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
    return unpack_codes(words, FIELDS, DTYPE, PTX), offs_n, offs_n


@triton.jit
def _channel_range(planes, page_head, HEAD_DIM: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr):
    step = load_channels(planes[1], page_head, HEAD_DIM, FIELDS, WORDS)
    return step, load_channels(planes[2], page_head, HEAD_DIM, FIELDS, WORDS)


@triton.jit
def _token_tile(
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
    step = tl.load(planes[1] + page_head * PAGE + offs_n)  # [N]
    offset = tl.load(planes[2] + page_head * PAGE + offs_n)  # [N]
    return unpack_codes(words, FIELDS, DTYPE, PTX), step.to(tl.float32), offset.to(tl.float32)


@triton.jit
def _step_and_offset(low, high, FIELDS: tl.constexpr):
    """``IntegerCodec._range`` from minima and maxima (float32); two of their shape, fp16."""
    LAST: tl.constexpr = (1 << (8 // FIELDS)) - 1
    offset = tile_at_most(low)
    width = tl.maximum(high - offset.to(tl.float32), 0.0)
    return tile_at_least(tl.div_rn(width, LAST * 1.0)), offset


@triton.jit
def _codes(x, step, offset, FIELDS: tl.constexpr):
    """Codes of ``x`` (float32); ``step`` and ``offset`` (float32) broadcast to it."""
    LAST: tl.constexpr = (1 << (8 // FIELDS)) - 1
    scaled = tl.div_rn(x - offset, tl.where(step > 0.0, step, 1.0))
    return round_half_even(tl.minimum(tl.maximum(scaled, 0.0), LAST * 1.0)).to(tl.int32)


@triton.jit
def _channel_encode(
    planes,
    page_head,
    x,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    BYTES: tl.constexpr,
):
    x = x.to(tl.float32)
    channel, exists = byte_columns(HEAD_DIM, FIELDS, BYTES)
    step, offset = _step_and_offset(tl.min(x, 0), tl.max(x, 0), FIELDS)  # [COLUMNS]
    codes = _codes(x, step.to(tl.float32)[None, :], offset.to(tl.float32)[None, :], FIELDS)
    store_codes(planes[0], page_head, offs_n, codes, HEAD_DIM, PAGE, FIELDS, BYTES)
    tl.store(planes[1] + page_head * HEAD_DIM + channel, step, mask=exists)
    tl.store(planes[2] + page_head * HEAD_DIM + channel, offset, mask=exists)


@triton.jit
def _token_encode(
    planes,
    page_head,
    x,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    BYTES: tl.constexpr,
):
    x = x.to(tl.float32)
    exists = byte_columns(HEAD_DIM, FIELDS, BYTES)[1][None, :]
    low = tl.min(tl.where(exists, x, float("inf")), 1)
    high = tl.max(tl.where(exists, x, float("-inf")), 1)
    step, offset = _step_and_offset(low, high, FIELDS)  # [N]
    codes = _codes(x, step.to(tl.float32)[:, None], offset.to(tl.float32)[:, None], FIELDS)
    store_codes(planes[0], page_head, offs_n, codes, HEAD_DIM, PAGE, FIELDS, BYTES)
    tl.store(planes[1] + page_head * PAGE + offs_n, step)
    tl.store(planes[2] + page_head * PAGE + offs_n, offset)


@dataclass(frozen=True)
class IntegerCodec(Codec):
    """int8 or int4 codes; ``axis`` says what shares one range: a ``"channel"`` of the page, or a ``"token"``."""

    axis: Literal["channel", "token"] = "token"

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        codes = Plane("codes", torch.uint8, "token", head_dim * self.bits // 8)
        if self.axis == "channel":
            return (
                codes,
                Plane("step", torch.float16, "page", head_dim),
                Plane("offset", torch.float16, "page", head_dim),
            )
        return codes, Plane("step", torch.float16, "token", 1), Plane("offset", torch.float16, "token", 1)

    def _range(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """fp16 ``(step, offset)`` with the reduced dimension kept."""
        dim = -2 if self.axis == "channel" else -1
        offset = fp16_at_most(x.amin(dim, keepdim=True))
        # Where everything is below -65504 the offset saturates above the maximum; a step must not be negative.
        width = (x.amax(dim, keepdim=True) - offset.float()).clamp_min(0)
        step = fp16_at_least(width / (2**self.bits - 1))
        return step, offset

    def _encode(self, x: torch.Tensor, model_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        step, offset = self._range(x)
        # A step of zero means that every element equals the offset; dividing by one gives code 0.
        divisor = torch.where(step > 0, step.float(), 1.0)
        codes = ((x - offset.float()) / divisor).round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)
        if self.axis == "channel":
            step, offset = step.squeeze(-2), offset.squeeze(-2)
        return pack_fields(codes, self.bits), step, offset

    def tile(self, planes: Sequence[torch.Tensor]) -> Tile:
        codes, step, offset = planes
        levels = codes.float() if self.bits == 8 else expand_levels(codes, INTEGERS)
        if self.axis == "channel":
            return Tile(levels, channel_scale=step.float(), channel_offset=offset.float())
        return Tile(levels, token_scale=step.squeeze(-1).float(), token_offset=offset.squeeze(-1).float())

    @property
    def kernel(self) -> KernelCodec:
        fields = 8 // self.bits
        if self.axis == "channel":
            return KernelCodec(
                _channel_tile,
                _channel_range,
                _channel_encode,
                fields,
                channel_scale=True,
                channel_offset=True,
                integer_codes=True,
            )
        return KernelCodec(
            _token_tile, no_channels, _token_encode, fields, token_scale=True, token_offset=True, integer_codes=True
        )

    def cpu(self, head_dim: int) -> CpuCodec:
        levels = None if self.bits == 8 else INTEGERS
        if self.axis == "channel":
            return CpuCodec(levels, channel_scale=1, channel_offset=2, affine=True)
        return CpuCodec(levels, token_scale=1, token_offset=2, affine=True)

    def error_bound(self, x: torch.Tensor) -> torch.Tensor:
        y = self.to_domain(x.float())
        step, offset = self._range(y)
        low, width = offset.float(), step.float()
        clipped = (low - y).clamp_min(0) + (y - low - width * (2**self.bits - 1)).clamp_min(0)
        # Half a step per element, plus the rounding of offset + step * code in float32.
        rounding = 4 * torch.finfo(torch.float32).eps * (low.abs() + width * 2**self.bits)
        return (width / 2 + clipped + rounding).norm(dim=-1) + 1e-6 * y.norm(dim=-1)


INT8_CHANNEL = IntegerCodec(
    "int8-channel", 8, "8 bit per channel over a page", "KIVI, arXiv:2402.02750", axis="channel"
)
INT4_CHANNEL = IntegerCodec(
    "int4-channel", 4, "4 bit per channel over a page", "KIVI, arXiv:2402.02750", head_dim_multiple=2, axis="channel"
)
INT8_AFFINE = IntegerCodec("int8-affine", 8, "8 bit per token", "LMDeploy kv_quant, range rounded outwards")
INT4_HADAMARD = IntegerCodec(
    "int4-hadamard", 4, "4 bit per token, rotated", "QuaRot, arXiv:2404.00456", rotated=True, head_dim_multiple=2
)
