"""TurboQuant's scalar codec, without QJL: rotate, scale to unit variance, one Lloyd-Max code per coordinate.

For a page of vectors x [P, D], with H the orthonormal Hadamard rotation:

    y      = H x
    centre = mean of y over the page's tokens, rounded to fp16          (keys only; otherwise 0)
    r      = y - centre
    code   = Lloyd-Max code of r / |r| * sqrt(D);   L = the levels of a token's codes
    y_hat  = centre + scale * L

Keys are centred because a key bias survives the rotation as a large vector common to all tokens, and would eat the
codebook.  What ``scale`` should be is a choice, ``scale_rule``; t is the angle between r and L:

    "norm"           |r| / |L|          y_hat - centre has the length of r       |error| = 2 |r| sin(t / 2)
    "least-squares"  <r, L> / <L, L>    least squared error                      |error| = |r| sin t
    "unbiased"       |r|^2 / <r, L>     <y_hat - centre, r> = |r|^2 (EDEN)       |error| = |r| tan t

The scale is stored in fp16, values outside its range saturate, and a zero vector has scale 0.

Keys, 4 bit, centred:

    codes   uint8 [P, D/2]     scale  fp16 [P, 1]     centre  fp16 [D]     4 + 16/D + 16/P bits per element

    bit    7 6 5 4          3 2 1 0
    code   channel j + D/2  channel j                               j = 0 .. D/2 - 1

Values, 2 bit:

    codes   uint8 [P, D/4]     scale  fp16 [P, 1]                         2 + 16/D bits per element

    bit    7 6               5 4              3 2              1 0
    code   channel j + 3D/4  channel j + D/2  channel j + D/4  channel j        j = 0 .. D/4 - 1

References: TurboQuant (arXiv:2504.19874); DRIVE (arXiv:2105.08339) and EDEN (arXiv:2108.08842) for the scale.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from ..pack import byte_columns, store_codes
from ..ptx import nibble_lookup, pair_lookup
from ..target import tl, triton
from ..tile_math import bucket_levels
from ..tile_math import round_saturating as tile_saturating
from ..unpack import load_channels, load_words, unpack_levels
from .base import Codec, Plane, Tile
from .cpu import CpuCodec
from .jit import KernelCodec, no_channels
from .lloyd_max import BOUNDARIES, LEVELS, bucket, cell_radius, levels
from .packing import expand_levels, pack_fields, round_saturating

ScaleRule = Literal["norm", "least-squares", "unbiased"]
Bucket = Callable[[torch.Tensor, tuple[float, ...]], torch.Tensor]  # ``lloyd_max.bucket`` or the same by other means


class _Fit(NamedTuple):
    """A page as the codec sees it; float32 but for the codes and the centre."""

    codes: torch.Tensor  # uint8 [..., page_size, head_dim]
    levels: torch.Tensor  # [..., page_size, head_dim]
    scale: torch.Tensor  # not yet rounded, [..., page_size, 1]
    centre: torch.Tensor | None  # fp16 [..., head_dim]
    residual: torch.Tensor  # [..., page_size, head_dim]
    unit: torch.Tensor  # the residual at length sqrt(head_dim), [..., page_size, head_dim]


_LEVELS_2 = tl.constexpr(LEVELS[2])
_LEVELS_4 = tl.constexpr(LEVELS[4])
_LOOKUP_2 = tl.constexpr(pair_lookup(LEVELS[2]))
_LOOKUP_4 = tl.constexpr(nibble_lookup(LEVELS[4]))
_BOUNDARIES_2 = tl.constexpr(BOUNDARIES[2])
_BOUNDARIES_4 = tl.constexpr(BOUNDARIES[4])


@triton.jit
def _lloyd_max_tile(
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
    if FIELDS == 2:
        levels = unpack_levels(words, _LEVELS_4, _LOOKUP_4, FIELDS, DTYPE, PTX)
    else:
        levels = unpack_levels(words, _LEVELS_2, _LOOKUP_2, FIELDS, DTYPE, PTX)
    scale = tl.load(planes[1] + page_head * PAGE + offs_n)  # [N]
    return levels, scale.to(tl.float32), offs_n


@triton.jit
def _centre(planes, page_head, HEAD_DIM: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr):
    centre = load_channels(planes[2], page_head, HEAD_DIM, FIELDS, WORDS)
    return centre, centre


@triton.jit
def unit_rows(x, HEAD_DIM: tl.constexpr):
    """Squared lengths and lengths ``[N]`` of the rows of ``x`` ``[N, C]``, and the rows at length sqrt(HEAD_DIM)."""
    squares = tl.sum(x * x, 1)
    norm = tl.sqrt(squares)
    return squares, norm, x * (HEAD_DIM**0.5 / tl.where(norm > 0.0, norm, 1.0))[:, None]


@triton.jit
def unbiased_scale(squares, product):
    """The scale of each row ``[N]``, from its squared length and its product with its levels."""
    return squares / tl.where(product > 0.0, product, 1.0)


@triton.jit
def _lloyd_max_encode(
    planes,
    page_head,
    x,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    BYTES: tl.constexpr,
    RULE: tl.constexpr,
):
    CENTRED: tl.constexpr = len(planes) == 3
    channel, exists = byte_columns(HEAD_DIM, FIELDS, BYTES)
    if CENTRED:
        centre = tile_saturating(tl.sum(x, 0) * (1.0 / PAGE), tl.float16)  # [COLUMNS]
        tl.store(planes[2] + page_head * HEAD_DIM + channel, centre, mask=exists)
        x = x - centre.to(tl.float32)[None, :]
    squares, norm, unit = unit_rows(x, HEAD_DIM)
    if FIELDS == 2:
        codes, levels = bucket_levels(unit, _BOUNDARIES_4, _LEVELS_4, 16, 1.0)
    else:
        codes, levels = bucket_levels(unit, _BOUNDARIES_2, _LEVELS_2, 4, 1.0)
    levels = tl.where(exists[None, :], levels, 0.0)
    if RULE == "norm":
        scale = norm / tl.sqrt(tl.sum(levels * levels, 1))
    elif RULE == "least-squares":
        scale = tl.sum(x * levels, 1) / tl.sum(levels * levels, 1)
    else:
        scale = unbiased_scale(squares, tl.sum(x * levels, 1))  # columns past the head are zero in x
    store_codes(planes[0], page_head, offs_n, codes, HEAD_DIM, PAGE, FIELDS, BYTES)
    tl.store(planes[1] + page_head * PAGE + offs_n, tile_saturating(scale, tl.float16))


@triton.jit
def _norm_encode(
    planes,
    page_head,
    x,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    BYTES: tl.constexpr,
):
    _lloyd_max_encode(planes, page_head, x, offs_n, HEAD_DIM, PAGE, FIELDS, BYTES, "norm")


@triton.jit
def _least_squares_encode(
    planes,
    page_head,
    x,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    BYTES: tl.constexpr,
):
    _lloyd_max_encode(planes, page_head, x, offs_n, HEAD_DIM, PAGE, FIELDS, BYTES, "least-squares")


@triton.jit
def _unbiased_encode(
    planes,
    page_head,
    x,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    BYTES: tl.constexpr,
):
    _lloyd_max_encode(planes, page_head, x, offs_n, HEAD_DIM, PAGE, FIELDS, BYTES, "unbiased")


_ENCODE = {"norm": _norm_encode, "least-squares": _least_squares_encode, "unbiased": _unbiased_encode}


@dataclass(frozen=True)
class LloydMaxCodec(Codec):
    """Lloyd-Max codes of rotated vectors, 1, 2 or 4 bits.

    Args:
        centred: subtract the page's mean of each (rotated) channel first.
        scale_rule: how a token's scale is chosen, see the module's docstring.
    """

    centred: bool = False
    scale_rule: ScaleRule = "norm"

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        codes = Plane("codes", torch.uint8, "token", head_dim * self.bits // 8)
        scale = Plane("scale", torch.float16, "token", 1)
        return (codes, scale, Plane("centre", torch.float16, "page", head_dim)) if self.centred else (codes, scale)

    def _scale(self, residual: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """The scale of each token by ``scale_rule``, float32 ``[..., page_size, 1]``."""
        if self.scale_rule == "norm":
            return residual.norm(dim=-1, keepdim=True) / level.norm(dim=-1, keepdim=True)
        # Level and residual have the same sign everywhere, so their product is zero for zero vectors only.
        product = (residual * level).sum(-1, keepdim=True)
        if self.scale_rule == "least-squares":
            return product / level.square().sum(-1, keepdim=True)
        return residual.square().sum(-1, keepdim=True) / torch.where(product > 0, product, 1.0)

    def _nearest(self, unit: torch.Tensor, bucket: Bucket) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of unit-variance numbers, and the levels that they stand for."""
        codes = bucket(unit, BOUNDARIES[self.bits])
        return codes, levels(codes, self.bits)

    def _fit(self, y: torch.Tensor, bucket: Bucket = bucket) -> _Fit:
        centre = round_saturating(y.mean(-2), torch.float16) if self.centred else None
        # Codes describe the distance to the centre as stored, so rounding the centre costs nothing.
        residual = y if centre is None else y - centre.float().unsqueeze(-2)
        norm = residual.norm(dim=-1, keepdim=True)
        unit = residual * (y.shape[-1] ** 0.5 / torch.where(norm > 0, norm, 1.0))
        codes, level = self._nearest(unit, bucket)
        return _Fit(codes, level, self._scale(residual, level), centre, residual, unit)

    def _encode(self, x: torch.Tensor, model_dtype: torch.dtype, bucket: Bucket = bucket) -> tuple[torch.Tensor, ...]:
        fit = self._fit(x, bucket)
        planes = pack_fields(fit.codes, self.bits), round_saturating(fit.scale, torch.float16)
        return planes if fit.centre is None else (*planes, fit.centre)

    def tile(self, planes: Sequence[torch.Tensor]) -> Tile:
        codes, scale = planes[:2]
        centre = planes[2].float() if self.centred else None
        return Tile(
            expand_levels(codes, LEVELS[self.bits]), token_scale=scale.squeeze(-1).float(), channel_offset=centre
        )

    @property
    def kernel(self) -> KernelCodec:
        channels = _centre if self.centred else no_channels
        encode = _ENCODE[self.scale_rule]
        fields = 8 // self.bits
        return KernelCodec(_lloyd_max_tile, channels, encode, fields, token_scale=True, channel_offset=self.centred)

    def cpu(self, head_dim: int) -> CpuCodec | None:
        return CpuCodec(LEVELS[self.bits], token_scale=1, channel_offset=2 if self.centred else None, bucketed=True)

    def error_bound(self, x: torch.Tensor) -> torch.Tensor:
        """Bound from the widths of the cells, plus what the stored scale differs from the ideal one.

        Scaling the levels by |r| / sqrt(D) gives an error of at most |r| s, with s = |cell_radius| / sqrt(D).  The
        least-squares scale is not worse, so sin t <= s; and 2 sin(t / 2) <= 2 s because moving from that scale to
        |r| / |L| changes the length by no more than the error was.  Signs agree, so t is at most a right angle.
        """
        y = self.to_domain(x.float())
        fit = self._fit(y)
        table, root_dim = LEVELS[self.bits], x.shape[-1] ** 0.5
        norm = fit.residual.norm(dim=-1)
        sine = cell_radius(fit.unit, table).norm(dim=-1) / root_dim
        if self.scale_rule == "norm":
            relative = (2 * sine).clamp_max(2**0.5)
        elif self.scale_rule == "least-squares":
            relative = sine.clamp_max(1.0)
        else:
            # |u|_1 >= |u|_2 gives <u, L> >= min|L| sqrt(D), hence cos t >= min|L| / (max|L| sqrt(D)).
            least_cosine = table[len(table) // 2] / (table[-1] * root_dim)
            sine = sine.clamp_max((1 - least_cosine**2) ** 0.5)
            relative = sine / (1 - sine.square()).sqrt()
        stored = round_saturating(fit.scale, torch.float16).float()
        rounding = ((stored - fit.scale).abs() * fit.levels).norm(dim=-1)
        # float32 arithmetic; and squares of numbers below 1e-19 vanish in it, so that such a vector has norm 0.
        arithmetic = 2e-6 * (y.norm(dim=-1) + norm) + 1e-18 * root_dim
        return norm * relative + rounding + arithmetic


LLOYD4_CENTRED = LloydMaxCodec(
    "lloyd4-centred",
    4,
    "4 bit Lloyd-Max, rotated, centred per page",
    "TurboQuant without QJL, arXiv:2504.19874",
    rotated=True,
    head_dim_multiple=2,
    centred=True,
)
LLOYD2 = LloydMaxCodec(
    "lloyd2",
    2,
    "2 bit Lloyd-Max, rotated",
    "TurboQuant without QJL, arXiv:2504.19874",
    rotated=True,
    head_dim_multiple=4,
    # Errors of many values average out in attention, a common shrinkage does not.  KLD with exact keys (WikiText-2,
    # 512 tokens) is .018 on SmolLM2-135M and .017 on Qwen2.5-Coder-0.5B; "norm" gives .022 and .021, "least-squares"
    # .036 and .029.
    scale_rule="unbiased",
)
