"""LMDeploy's TurboQuant (its quant_policy 42, "K4V2") as its formula intends it, for comparison.

With y = H x the rotated vector, sigma = 1 / sqrt(D), c the 3-bit and 2-bit Lloyd-Max levels times sigma:

    keys     n = sqrt(sum y^2 + 1e-8)      u = y / n      i = 3-bit code of u (strictly above the boundary)
             r = u - c_i                   b = (r >= 0)   rho = sqrt(sum r^2 + 1e-8) / sqrt(D)
             y_hat = n * (c_i + rho * (2 b - 1))

    values   n, u as above                 i = 2-bit code of u
             y_hat = n * c_i

Despite the policy's description no QJL projection is involved: the keys have 16 deterministic levels c_i +- rho.  rho
is the root mean square of the residual (the mean |r| would have less error), and the values' norm is not corrected for
the shrinking of the levels; both are kept as they are.  LMDeploy's decode kernel takes sigma from twice the head_dim
and so shrinks the key levels by sqrt(2); its prefill does not, and neither does this file.

n and rho are stored in the model's dtype.  A norm above the range of fp16 saturates here (LMDeploy: infinity).  The
rotation works in blocks where head_dim is no power of two (LMDeploy: refused).

    keys     codes  uint8 [P, D/2]     norm, residual  model dtype [P, 1]        4 + 32/D bits per element

    bit    7   6 5 4      3   2 1 0
    code   b   i          b   i
           channel j+D/2  channel j            j = 0 .. D/2 - 1

    values   codes  uint8 [P, D/4]     norm  model dtype [P, 1]                  2 + 16/D bits per element

    bit    7 6               5 4              3 2              1 0
    code   channel j + 3D/4  channel j + D/2  channel j + D/4  channel j        j = 0 .. D/4 - 1

References: LMDeploy, PyTorch engine, docs/en/quantization/kv_quant.md; TurboQuant (arXiv:2504.19874).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..pack import byte_columns, store_codes
from ..ptx import pair_lookup, signed_octet_lookup
from ..target import tl, triton
from ..tile_math import bucket_levels, round_to
from ..tile_math import round_saturating as tile_saturating
from ..unpack import load_words, unpack_levels, unpack_signed_levels
from .base import Codec, Plane, Tile
from .cpu import CpuCodec
from .jit import KernelCodec, no_channels
from .lloyd_max import bucket, cell_radius, lookup
from .packing import expand_levels, pack_fields, round_saturating

# LMDeploy's own constants at sigma = 1: a few Lloyd iterations, equal to the optimal tables to about 1e-6.
LEVELS: dict[int, tuple[float, ...]] = {
    2: (-1.5104176, -0.4527808, 0.4527808, 1.5104176),
    3: (-2.1519456, -1.3439093, -0.7560052, -0.2450942, 0.2450942, 0.7560052, 1.3439093, 2.1519456),
}
BOUNDARIES: dict[int, tuple[float, ...]] = {
    2: (-0.9815992, 0.0, 0.9815992),
    3: (-1.7479274, -1.0499573, -0.5005497, 0.0, 0.5005497, 1.0499573, 1.7479274),
}
_SIGNS = (-1.0,) * 8 + (1.0,) * 8  # of the residual, by nibble
_EPS = 1e-8  # keeps both square roots away from zero


_LEVELS_2 = tl.constexpr(LEVELS[2])
_LEVELS_3 = tl.constexpr(LEVELS[3])
_LOOKUP_2 = tl.constexpr(pair_lookup(LEVELS[2]))
_LOOKUP_3 = tl.constexpr(tuple(signed_octet_lookup(LEVELS[3], byte) for byte in (0, 1)))
_BOUNDARIES_2 = tl.constexpr(BOUNDARIES[2])
_BOUNDARIES_3 = tl.constexpr(BOUNDARIES[3])


@functools.lru_cache(maxsize=32)
def _scaled(table: tuple[float, ...], head_dim: int) -> tuple[float, ...]:
    """``table`` times sigma = 1 / sqrt(head_dim), multiplied in float32."""
    return tuple((torch.tensor(table, dtype=torch.float32, device="cpu") * head_dim**-0.5).tolist())


class _Fit(NamedTuple):
    norm: torch.Tensor  # n, not yet rounded, [..., page_size, 1]
    unit: torch.Tensor  # u, [..., page_size, head_dim]
    codes: torch.Tensor  # i, uint8 [..., page_size, head_dim]
    levels: torch.Tensor  # c_i, [..., page_size, head_dim]


def _fit(y: torch.Tensor, table_bits: int) -> _Fit:
    """The part that keys and values share, for rotated float32 vectors ``y``."""
    head_dim = y.shape[-1]
    norm = (y.square().sum(-1, keepdim=True) + _EPS).sqrt()
    unit = y / norm
    codes = bucket(unit, _scaled(BOUNDARIES[table_bits], head_dim))
    return _Fit(norm, unit, codes, lookup(codes, _scaled(LEVELS[table_bits], head_dim)))


def _norm_rounding(fit: _Fit, model_dtype: torch.dtype) -> torch.Tensor:
    """|stored norm - norm|, ``[..., page_size]``."""
    return (round_saturating(fit.norm, model_dtype).float() - fit.norm).abs().squeeze(-1)


@triton.jit
def _sign_tile(
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
    # Levels at unit sigma, and rho to match: the factor sigma goes into the token's scale.
    sigma: tl.constexpr = HEAD_DIM**-0.5
    rho = (tl.load(planes[2] + page_head * PAGE + offs_n).to(tl.float32) / sigma).to(DTYPE)  # [N]
    rho = rho[None, :] if TRANSPOSED else rho[:, None]
    levels = unpack_signed_levels(words, rho, _LEVELS_3, _LOOKUP_3, DTYPE, PTX)
    norm = tl.load(planes[1] + page_head * PAGE + offs_n)  # [N]
    return levels, norm.to(tl.float32) * sigma, offs_n


@triton.jit
def _plain_tile(
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
    levels = unpack_levels(words, _LEVELS_2, _LOOKUP_2, FIELDS, DTYPE, PTX)
    sigma: tl.constexpr = HEAD_DIM**-0.5
    norm = tl.load(planes[1] + page_head * PAGE + offs_n)  # [N]
    return levels, norm.to(tl.float32) * sigma, offs_n


@triton.jit
def _sign_encode(
    planes,
    page_head,
    x,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    BYTES: tl.constexpr,
):
    exists = byte_columns(HEAD_DIM, FIELDS, BYTES)[1][None, :]
    norm = tl.sqrt(tl.sum(x * x, 1) + 1e-8)  # [N]
    unit = x * (1.0 / norm)[:, None]
    codes, levels = bucket_levels(unit, _BOUNDARIES_3, _LEVELS_3, 8, HEAD_DIM**-0.5)
    residual = tl.where(exists, unit - levels, 0.0)
    rho = tl.sqrt(tl.sum(residual * residual, 1) + 1e-8) * (HEAD_DIM**-0.5)  # [N]
    codes = codes | ((residual >= 0.0).to(tl.int32) << 3)
    store_codes(planes[0], page_head, offs_n, codes, HEAD_DIM, PAGE, FIELDS, BYTES)
    dtype: tl.constexpr = planes[1].dtype.element_ty
    tl.store(planes[1] + page_head * PAGE + offs_n, tile_saturating(norm, dtype))
    tl.store(planes[2] + page_head * PAGE + offs_n, round_to(rho, dtype))


@triton.jit
def _plain_encode(
    planes,
    page_head,
    x,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    BYTES: tl.constexpr,
):
    norm = tl.sqrt(tl.sum(x * x, 1) + 1e-8)  # [N]
    unit = x * (1.0 / norm)[:, None]
    codes, _ = bucket_levels(unit, _BOUNDARIES_2, _LEVELS_2, 4, HEAD_DIM**-0.5)
    store_codes(planes[0], page_head, offs_n, codes, HEAD_DIM, PAGE, FIELDS, BYTES)
    dtype: tl.constexpr = planes[1].dtype.element_ty
    tl.store(planes[1] + page_head * PAGE + offs_n, tile_saturating(norm, dtype))


@dataclass(frozen=True)
class SignCorrectedCodec(Codec):
    """Keys: a 3-bit code and the sign of its residual in one nibble, two numbers per token."""

    reproduces: bool = True

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        codes = Plane("codes", torch.uint8, "token", head_dim // 2)
        return codes, Plane("norm", None, "token", 1), Plane("residual", None, "token", 1)

    def _residual(self, fit: _Fit) -> tuple[torch.Tensor, torch.Tensor]:
        """``r`` and ``rho``, not yet rounded."""
        residual = fit.unit - fit.levels
        rho = (residual.square().sum(-1, keepdim=True) + _EPS).sqrt() / residual.shape[-1] ** 0.5
        return residual, rho

    def _encode(self, x: torch.Tensor, model_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        fit = _fit(x, 3)
        residual, rho = self._residual(fit)
        nibbles = fit.codes | ((residual >= 0).to(torch.uint8) << 3)
        return pack_fields(nibbles, 4), round_saturating(fit.norm, model_dtype), rho.to(model_dtype)

    def tile(self, planes: Sequence[torch.Tensor]) -> Tile:
        codes, norm, rho = planes
        table = _scaled(LEVELS[3], codes.shape[-1] * 2)
        levels = expand_levels(codes, table * 2) + rho.float() * expand_levels(codes, _SIGNS)
        return Tile(levels, token_scale=norm.squeeze(-1).float())

    @property
    def kernel(self) -> KernelCodec:
        return KernelCodec(_sign_tile, no_channels, _sign_encode, fields=2, token_scale=True)

    def cpu(self, head_dim: int) -> CpuCodec:
        return CpuCodec(_scaled(LEVELS[3], head_dim) * 2, _SIGNS, residual=2, token_scale=1)

    def error_bound(self, x: torch.Tensor) -> torch.Tensor:
        """|r - rho sign(r)|^2 <= |r|^2 + rho^2 D = 2 |r|^2 + 1e-8, and |r| is bounded by the widths of the cells."""
        head_dim = x.shape[-1]
        y = self.to_domain(x.float())
        fit = _fit(y, 3)
        rho = self._residual(fit)[1]
        stored_rho = rho.to(x.dtype).float()
        radius = cell_radius(fit.unit, _scaled(LEVELS[3], head_dim)).norm(dim=-1)
        norm = fit.norm.squeeze(-1)
        quantization = norm * (2 * radius.square() + _EPS).sqrt()
        rounding = norm * (stored_rho - rho).abs().squeeze(-1) * head_dim**0.5
        rounding += _norm_rounding(fit, x.dtype) * (fit.levels.norm(dim=-1) + stored_rho.squeeze(-1) * head_dim**0.5)
        # float32 arithmetic, and boundaries that are midpoints to seven digits only.
        return quantization + rounding + 2e-6 * norm


@dataclass(frozen=True)
class PlainLloydMaxCodec(Codec):
    """Values: a 2-bit code, one number per token."""

    reproduces: bool = True

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        return Plane("codes", torch.uint8, "token", head_dim // 4), Plane("norm", None, "token", 1)

    def _encode(self, x: torch.Tensor, model_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        fit = _fit(x, 2)
        return pack_fields(fit.codes, 2), round_saturating(fit.norm, model_dtype)

    def tile(self, planes: Sequence[torch.Tensor]) -> Tile:
        levels = expand_levels(planes[0], _scaled(LEVELS[2], planes[0].shape[-1] * 4))
        return Tile(levels, token_scale=planes[1].squeeze(-1).float())

    @property
    def kernel(self) -> KernelCodec:
        return KernelCodec(_plain_tile, no_channels, _plain_encode, fields=4, token_scale=True)

    def cpu(self, head_dim: int) -> CpuCodec:
        return CpuCodec(_scaled(LEVELS[2], head_dim), token_scale=1)

    def error_bound(self, x: torch.Tensor) -> torch.Tensor:
        y = self.to_domain(x.float())
        fit = _fit(y, 2)
        norm = fit.norm.squeeze(-1)
        quantization = norm * cell_radius(fit.unit, _scaled(LEVELS[2], x.shape[-1])).norm(dim=-1)
        # float32 arithmetic, and boundaries that are midpoints to seven digits only.
        return quantization + _norm_rounding(fit, x.dtype) * fit.levels.norm(dim=-1) + 2e-6 * norm


LLOYD3_SIGN = SignCorrectedCodec(
    "lloyd3-sign",
    4,
    "3 bit Lloyd-Max and a residual sign, rotated",
    "LMDeploy quant_policy 42, keys",
    rotated=True,
    head_dim_multiple=2,
)
LLOYD2_PLAIN = PlainLloydMaxCodec(
    "lloyd2-plain",
    2,
    "2 bit Lloyd-Max, rotated, norm not corrected",
    "LMDeploy quant_policy 42, values",
    rotated=True,
    head_dim_multiple=4,
)
