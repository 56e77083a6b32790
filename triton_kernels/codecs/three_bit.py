"""Three bits per code, stored as two planes: two bits of magnitude and one of sign.

The levels are Lloyd-Max's, which are symmetric around zero, so a code is one of four magnitudes and a sign.  Magnitudes
are packed like every code of 2 bits; the eight signs of a 16-bit word of magnitudes are one byte, so that both unpack
side by side:

    codes   uint8 [P, D/4]     bit    7 6               5 4              3 2              1 0
                               code   channel j + 3D/4  channel j + D/2  channel j + D/4  channel j     j = 0 .. D/4 - 1

    signs   uint8 [P, D/8]     bit 4 p + f, 1 for minus: channel 2 w + p + f D/4           w = 0 .. D/8 - 1 (the byte)
                                                                                           p = 0, 1     f = 0 .. 3

Keys, the levels L stretched over the range of each channel of the page:

    x_hat = centre + scale * L(code)     scale, centre  fp16 [D]                         3 + 32/P bits per element

``centre`` is the fp16 number next to the middle of the range and ``scale`` the smallest fp16 number with which the last
levels reach both ends: clipping a channel costs far more accuracy than finer steps bring back, and Lloyd-Max's spacing
inside the range less than even steps (``docs/accuracy.md`` has the numbers).  Within the range of fp16
|x_hat - x| <= scale * (widest gap of L) / 2.

Values, rotated, Lloyd-Max levels and the unbiased scale of ``turboquant.py``:

    x_hat = scale * L(code)              scale  fp16 [P, 1]                          3 + 16/D bits per element

References: KIVI (arXiv:2402.02750) for ranges per channel; TurboQuant (arXiv:2504.19874) for the values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..pack import byte_columns, store_codes
from ..ptx import signed_pair_lookup
from ..target import tl, triton
from ..tile_math import bucket_levels
from ..tile_math import fp16_at_least as tile_at_least
from ..tile_math import round_saturating as tile_saturating
from ..unpack import load_channels, load_word_bytes, load_words, unpack_magnitudes
from .base import Codec, Plane, Tile
from .cpu import CpuCodec
from .jit import KernelCodec, no_channels
from .lloyd_max import BOUNDARIES, LEVELS, bucket, cell_radius
from .packing import expand_levels, fp16_at_least, pack_fields, round_saturating
from .turboquant import Bucket, LloydMaxCodec, unbiased_scale, unit_rows

_LEVELS = tl.constexpr(LEVELS[3])
_BOUNDARIES = tl.constexpr(BOUNDARIES[3])
_MAGNITUDE_TABLE = LEVELS[3][4:]
_MAGNITUDES = tl.constexpr(_MAGNITUDE_TABLE)
_LOOKUP = tl.constexpr(signed_pair_lookup(_MAGNITUDE_TABLE))


# -- planes ------------------------------------------------------------------------------------------------------------


def _code_planes(head_dim: int) -> tuple[Plane, Plane]:
    return Plane("codes", torch.uint8, "token", head_dim // 4), Plane("signs", torch.uint8, "token", head_dim // 8)


def pack_signed(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both planes, uint8 ``[..., D / 4]`` and ``[..., D / 8]``, from codes 0 to 7 ``[..., D]``, lowest level first."""
    negative = codes < 4
    magnitudes = torch.where(negative, 3 - codes, codes - 4)
    bits = negative.unflatten(-1, (4, -1, 2)).movedim(-3, -1).flatten(-2)  # [..., D / 8, 8]
    signs = (bits.int() << torch.arange(8, device=codes.device)).sum(-1)
    return pack_fields(magnitudes, 2), signs.to(torch.uint8)


def expand_signed(codes: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """The levels that both planes stand for, float32 ``[..., D]``."""
    bits = (signs.unsqueeze(-1).int() >> torch.arange(8, device=signs.device)) & 1  # [..., D / 8, 8]
    negative = bits.unflatten(-1, (2, 4)).movedim(-1, -3).flatten(-3)
    return expand_levels(codes, _MAGNITUDE_TABLE) * (1 - 2 * negative)


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _signed_parts(
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
    """Levels of one page as a tuple of parts (``unpack.py``)."""
    words = load_words(planes[0], page_head, offs_n, HEAD_DIM, PAGE, FIELDS, WORDS, TRANSPOSED)
    signs = load_word_bytes(planes[1], page_head, offs_n, HEAD_DIM, PAGE, WORDS, TRANSPOSED)
    return unpack_magnitudes(words, signs, _MAGNITUDES, _LOOKUP, DTYPE, PTX)


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
    levels = _signed_parts(planes, page_head, offs_n, HEAD_DIM, PAGE, FIELDS, WORDS, DTYPE, TRANSPOSED, PTX)
    return levels, offs_n, offs_n


@triton.jit
def _channel_range(planes, page_head, HEAD_DIM: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr):
    scale = load_channels(planes[2], page_head, HEAD_DIM, FIELDS, WORDS)
    return scale, load_channels(planes[3], page_head, HEAD_DIM, FIELDS, WORDS)


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
    levels = _signed_parts(planes, page_head, offs_n, HEAD_DIM, PAGE, FIELDS, WORDS, DTYPE, TRANSPOSED, PTX)
    scale = tl.load(planes[2] + page_head * PAGE + offs_n)  # [N]
    return levels, scale.to(tl.float32), offs_n


@triton.jit
def _store_signed(
    planes,
    page_head,
    offs_n,
    codes,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Write codes 0 to 7 ``[PAGE, BYTES * FIELDS]``, in byte order, to both planes of one page of one head."""
    negative = codes < 4
    store_codes(planes[0], page_head, offs_n, tl.where(negative, 3 - codes, codes - 4), HEAD_DIM, PAGE, FIELDS, BYTES)
    # Eight columns in byte order are the two bytes of a word: column 4 p + f of them is bit 4 p + f.
    columns = tl.arange(0, BYTES * FIELDS)
    bits = negative.to(tl.int32) << (columns % 8)[None, :]
    signs = tl.sum(bits.reshape(codes.shape[0], BYTES * FIELDS // 8, 8), 2)
    WIDTH: tl.constexpr = HEAD_DIM // 8
    offs_w = tl.arange(0, BYTES * FIELDS // 8)
    pointers = planes[1] + page_head * (PAGE * WIDTH) + offs_n[:, None] * WIDTH + offs_w[None, :]
    tl.store(pointers, signs.to(tl.uint8), mask=(offs_w < WIDTH)[None, :])


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
    low, high = tl.min(x, 0), tl.max(x, 0)  # [COLUMNS]
    centre = tile_saturating((low + high) * 0.5, tl.float16)
    middle = centre.to(tl.float32)
    LAST: tl.constexpr = _LEVELS[7]
    scale = tile_at_least(tl.div_rn(tl.maximum(high - middle, middle - low), LAST))
    width = scale.to(tl.float32)
    unit = tl.div_rn(x - middle[None, :], tl.where(width > 0.0, width, 1.0)[None, :])
    codes, _ = bucket_levels(unit, _BOUNDARIES, _LEVELS, 8, 1.0)
    _store_signed(planes, page_head, offs_n, codes, HEAD_DIM, PAGE, FIELDS, BYTES)
    tl.store(planes[2] + page_head * HEAD_DIM + channel, scale, mask=exists)
    tl.store(planes[3] + page_head * HEAD_DIM + channel, centre, mask=exists)


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
    squares, _, unit = unit_rows(x, HEAD_DIM)
    codes, levels = bucket_levels(unit, _BOUNDARIES, _LEVELS, 8, 1.0)
    scale = unbiased_scale(squares, tl.sum(x * levels, 1))  # columns past the head are zero in x
    _store_signed(planes, page_head, offs_n, codes, HEAD_DIM, PAGE, FIELDS, BYTES)
    tl.store(planes[2] + page_head * PAGE + offs_n, tile_saturating(scale, tl.float16))


# -- codecs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChannelRangeCodec(Codec):
    """Keys: 3-bit codes with levels across the range of each channel of the page."""

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        vectors = (Plane(name, torch.float16, "page", head_dim) for name in ("scale", "centre"))
        return (*_code_planes(head_dim), *vectors)

    def _fit(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``scale`` and ``centre`` (fp16, ``[..., 1, head_dim]``), and ``x`` in units of them."""
        low, high = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
        centre = round_saturating((low + high) * 0.5, torch.float16)
        extent = torch.maximum(high - centre.float(), centre.float() - low)
        scale = fp16_at_least(extent / LEVELS[3][-1])
        # A scale of zero means that every element equals the centre; dividing by one gives a level times zero.
        unit = (x - centre.float()) / torch.where(scale > 0, scale.float(), 1.0)
        return scale, centre, unit

    def _encode(self, x: torch.Tensor, model_dtype: torch.dtype, bucket: Bucket = bucket) -> tuple[torch.Tensor, ...]:
        scale, centre, unit = self._fit(x)
        return *pack_signed(bucket(unit, BOUNDARIES[3])), scale.squeeze(-2), centre.squeeze(-2)

    def tile(self, planes: Sequence[torch.Tensor]) -> Tile:
        codes, signs, scale, centre = planes
        return Tile(expand_signed(codes, signs), channel_scale=scale.float(), channel_offset=centre.float())

    @property
    def kernel(self) -> KernelCodec:
        return KernelCodec(
            _channel_tile,
            _channel_range,
            _channel_encode,
            fields=4,
            code_planes=2,
            channel_scale=True,
            channel_offset=True,
        )

    def cpu(self, head_dim: int) -> CpuCodec:
        return CpuCodec(_MAGNITUDE_TABLE, signs=1, channel_scale=2, channel_offset=3, bucketed=True)

    def error_bound(self, x: torch.Tensor) -> torch.Tensor:
        """Half the widest gap of the levels, or what was clipped beyond fp16, and rounding in float32."""
        y = x.float()
        scale, centre, unit = self._fit(y)
        rounding = 8 * torch.finfo(torch.float32).eps * (centre.float().abs() + 3 * scale.float())
        return (cell_radius(unit, LEVELS[3]) * scale.float() + rounding).norm(dim=-1) + 1e-6 * y.norm(dim=-1)


@dataclass(frozen=True)
class SignedLloydMaxCodec(LloydMaxCodec):
    """Values: 3-bit Lloyd-Max codes of rotated vectors."""

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        return (*_code_planes(head_dim), Plane("scale", torch.float16, "token", 1))

    def _encode(self, x: torch.Tensor, model_dtype: torch.dtype, bucket: Bucket = bucket) -> tuple[torch.Tensor, ...]:
        fit = self._fit(x, bucket)
        return *pack_signed(fit.codes), round_saturating(fit.scale, torch.float16)

    def tile(self, planes: Sequence[torch.Tensor]) -> Tile:
        codes, signs, scale = planes
        return Tile(expand_signed(codes, signs), token_scale=scale.squeeze(-1).float())

    @property
    def kernel(self) -> KernelCodec:
        return KernelCodec(_token_tile, no_channels, _token_encode, fields=4, code_planes=2, token_scale=True)

    def cpu(self, head_dim: int) -> CpuCodec:
        return CpuCodec(_MAGNITUDE_TABLE, signs=1, token_scale=2, bucketed=True)


LLOYD3_CHANNEL = ChannelRangeCodec(
    "lloyd3-channel",
    3,
    "3 bit Lloyd-Max over the range of a channel of a page",
    "KIVI, arXiv:2402.02750, with other levels",
    head_dim_multiple=8,
)
LLOYD3 = SignedLloydMaxCodec(
    "lloyd3",
    3,
    "3 bit Lloyd-Max, rotated",
    "TurboQuant without QJL, arXiv:2504.19874",
    rotated=True,
    head_dim_multiple=8,
    scale_rule="unbiased",
)
