"""8-bit codes with a scale and a zero point that were measured beforehand: LMDeploy's offline format.

Keys and values of each layer have a scale s and a zero point z, float32, one pair per channel of each head (all alike
where the calibration was per tensor).  For an element x, in float32:

    code  = clip(round((x - z) / s), -128, 127)        round half to even
    x_hat = code * s + z

    codes    uint8 [P, D]          code + 128: 8 bits per element
    scale    float32 [D]           per layer: one row for each head, stored once and not in a page
    zero     float32 [D]           per layer

Nothing is measured on the page: an element outside of what the codes reach, z - 128 s to z + 127 s, is clipped to the
nearer end.  The error of an element is at most

    s / 2 + how far it lies outside + the rounding of code * s + z in float32

A scale of 0 (the channel had one value in all of the calibration) stands for that value: x_hat = z whatever the code.

Reference: LMDeploy before 0.4.0, ``lmdeploy lite calibrate`` and ``kv_qparams``, its quant_policy 4 of then.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..pack import byte_columns, store_codes
from ..target import tl, triton
from ..tile_math import round_half_even
from ..unpack import load_words, part_channels, unpack_codes
from .base import Codec, Plane, Tile
from .cpu import CpuCodec
from .jit import KernelCodec

_MIDDLE = 128  # what is added to a code to store it unsigned


@triton.jit
def _static_tile(
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
def _static_channels(planes, page_head, HEAD_DIM: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr):
    first = page_head % planes[3] * HEAD_DIM
    scales = ()
    offsets = ()
    for part in tl.static_range(2 * FIELDS):
        channel, exists = part_channels(part, HEAD_DIM, FIELDS, WORDS)
        scale = tl.load(planes[1] + first + channel, mask=exists, other=0.0)  # [WORDS]
        zero = tl.load(planes[2] + first + channel, mask=exists, other=0.0)  # [WORDS]
        scales = scales + (scale,)
        offsets = offsets + (zero - 128.0 * scale,)  # levels are the stored bytes
    return scales, offsets


@triton.jit
def _static_encode(
    planes,
    page_head,
    x,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    BYTES: tl.constexpr,
):
    channel, exists = byte_columns(HEAD_DIM, FIELDS, BYTES)
    row = page_head % planes[3] * HEAD_DIM + channel
    scale = tl.load(planes[1] + row, mask=exists, other=1.0)  # [BYTES]
    zero = tl.load(planes[2] + row, mask=exists, other=0.0)  # [BYTES]
    scaled = tl.div_rn(x.to(tl.float32) - zero[None, :], tl.where(scale > 0.0, scale, 1.0)[None, :])
    codes = round_half_even(tl.minimum(tl.maximum(scaled, -128.0), 127.0)) + 128.0
    store_codes(planes[0], page_head, offs_n, codes.to(tl.int32), HEAD_DIM, PAGE, FIELDS, BYTES)


@dataclass(frozen=True)
class StaticCodec(Codec):
    """int8 codes in a calibrated range; ``given`` the scale and the zero point, each ``[heads, head_dim]`` float32."""

    reproduces: bool = True
    calibrated: bool = True
    scale_and_zero: tuple[torch.Tensor, ...] = field(default=(), compare=False, repr=False)

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        return self.scale_and_zero

    def given(self, *parameters: torch.Tensor) -> "StaticCodec":
        return dataclasses.replace(self, scale_and_zero=parameters)

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        return (
            Plane("codes", torch.uint8, "token", head_dim),
            Plane("scale", torch.float32, "layer", head_dim),
            Plane("zero", torch.float32, "layer", head_dim),
        )

    def _rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point ``[heads, 1, head_dim]``, to be broadcast over the tokens of a page.

        Raises:
            ValueError: there are none yet.
        """
        if len(self.scale_and_zero) != 2:
            raise ValueError(f"codec {self.name!r} has no calibrated range yet; call given(scale, zero) first")
        scale, zero = (parameter.unsqueeze(-2) for parameter in self.scale_and_zero)
        return scale, zero

    def _encode(self, x: torch.Tensor, model_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        scale, zero = self._rows()
        codes = ((x - zero) / torch.where(scale > 0, scale, 1.0)).round_().clamp_(-_MIDDLE, _MIDDLE - 1)
        shape = (*x.shape[:-2], x.shape[-1])
        return (codes + _MIDDLE).to(torch.uint8), *(parameter.expand(shape) for parameter in self.scale_and_zero)

    def tile(self, planes: Sequence[torch.Tensor]) -> Tile:
        codes, scale, zero = planes
        return Tile(codes.float() - _MIDDLE, channel_scale=scale, channel_offset=zero)

    @property
    def kernel(self) -> KernelCodec:
        return KernelCodec(
            _static_tile,
            _static_channels,
            _static_encode,
            channel_scale=True,
            channel_offset=True,
            integer_codes=True,
            layer_planes=True,
        )

    def cpu(self, head_dim: int) -> CpuCodec:
        return CpuCodec(middle=_MIDDLE, channel_scale=1, channel_offset=2, given=True)

    def error_bound(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        scale, zero = self._rows()
        outside = (zero - _MIDDLE * scale - y).clamp_min(0) + (y - zero - (_MIDDLE - 1) * scale).clamp_min(0)
        rounding = 4 * torch.finfo(torch.float32).eps * (zero.abs() + scale * 2 * _MIDDLE)
        return (scale / 2 + outside + rounding).norm(dim=-1) + 1e-6 * y.norm(dim=-1)


INT8_STATIC = StaticCodec("int8-static", 8, "8 bit, range from a calibration", "LMDeploy kv_qparams, before 0.4.0")
