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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from .base import Codec, Plane, Tile
from .lloyd_max import LEVELS, cell_radius, levels, quantize
from .packing import pack_fields, round_saturating, unpack_levels

ScaleRule = Literal["norm", "least-squares", "unbiased"]


class _Fit(NamedTuple):
    """A page as the codec sees it; float32 but for the codes and the centre."""

    codes: torch.Tensor  # uint8 [..., page_size, head_dim]
    levels: torch.Tensor  # [..., page_size, head_dim]
    scale: torch.Tensor  # not yet rounded, [..., page_size, 1]
    centre: torch.Tensor | None  # fp16 [..., head_dim]
    residual: torch.Tensor  # [..., page_size, head_dim]
    unit: torch.Tensor  # the residual at length sqrt(head_dim), [..., page_size, head_dim]


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

    def _fit(self, y: torch.Tensor) -> _Fit:
        centre = round_saturating(y.mean(-2), torch.float16) if self.centred else None
        # Codes describe the distance to the centre as stored, so rounding the centre costs nothing.
        residual = y if centre is None else y - centre.float().unsqueeze(-2)
        norm = residual.norm(dim=-1, keepdim=True)
        unit = residual * (y.shape[-1] ** 0.5 / torch.where(norm > 0, norm, 1.0))
        codes = quantize(unit, self.bits)
        level = levels(codes, self.bits)
        return _Fit(codes, level, self._scale(residual, level), centre, residual, unit)

    def _encode(self, x: torch.Tensor, model_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        fit = self._fit(x)
        planes = pack_fields(fit.codes, self.bits), round_saturating(fit.scale, torch.float16)
        return planes if fit.centre is None else (*planes, fit.centre)

    def tile(self, planes: Sequence[torch.Tensor]) -> Tile:
        codes, scale = planes[:2]
        centre = planes[2].float() if self.centred else None
        return Tile(
            unpack_levels(codes, LEVELS[self.bits]), token_scale=scale.squeeze(-1).float(), channel_offset=centre
        )

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
