"""LMDeploy's online integer format (its quant_policy 8 and 4): one (scale, zero) per token, in the model's dtype.

For a token's vector x and b bits, in float32:

    scale = (max(x) - min(x)) / (2^b - 1)
    zero  = -min(x) / scale                        not rounded to an integer
    code  = trunc(x / scale + zero + 0.5)
    x_hat = (code - zero) * scale

``scale`` and ``zero`` are rounded to the model's dtype *after* the codes were computed, as LMDeploy does it.  So the
error of an element is at most scale / 2 plus what that rounding adds: for each of the two up to 2^-11 of |x| or |min|
in fp16 and 2^-8 in bf16, where the 8-bit code is finer than its zero.

    codes   uint8 [P, D]            scale, zero  model dtype [P, 1]     int8: 8 + 32/D bits per element
            uint8 [P, D/2]                                              int4: 4 + 32/D

    bit    7 6 5 4          3 2 1 0
    code   channel j + D/2  channel j          j = 0 .. D/2 - 1

Differences from LMDeploy, only where its formula gives NaN, infinity or a code that leaves its field:

* Constant vectors have scale 0, and in fp16 nearly constant ones lose zero to infinity (range below |min| / 257 at 8
  bits, |min| / 4368 at 4 bits) or scale to 0 (range below 8e-6, 5e-7).  They are stored by their middle m: code 0,
  scale = |m|, zero = -sign(m).  A constant vector comes back bit-exact, zeros as zeros, a nearly constant one within
  half its range and the rounding of m.
* Codes are clamped to their field: where |zero| is large, float32 rounding can reach one past it.

Reference: LMDeploy, PyTorch engine, docs/en/quantization/kv_quant.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..pack import byte_columns, store_codes
from ..target import tl, triton
from ..tile_math import round_to
from ..unpack import load_words, unpack_codes
from .base import Codec, Plane, Tile
from .cpu import CpuCodec
from .jit import KernelCodec, no_channels
from .packing import INTEGERS, expand_levels, pack_fields

_FLOAT32 = torch.finfo(torch.float32)


@triton.jit
def _zero_point_tile(
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
    scale = tl.load(planes[1] + page_head * PAGE + offs_n).to(tl.float32)  # [N]
    zero = tl.load(planes[2] + page_head * PAGE + offs_n).to(tl.float32)  # [N]
    return unpack_codes(words, FIELDS, DTYPE, PTX), scale, -zero * scale


@triton.jit
def _zero_point_encode(
    planes,
    page_head,
    x,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    BYTES: tl.constexpr,
):
    LAST: tl.constexpr = (1 << (8 // FIELDS)) - 1
    SMALLEST: tl.constexpr = 1.1754943508222875e-38  # normal float32
    x = x.to(tl.float32)
    exists = byte_columns(HEAD_DIM, FIELDS, BYTES)[1][None, :]
    low = tl.min(tl.where(exists, x, float("inf")), 1)  # [N]
    high = tl.max(tl.where(exists, x, float("-inf")), 1)  # [N]
    scale = tl.div_rn(high - low, LAST * 1.0)
    # * -1.0 and not a minus, which Triton computes as 0 - x: that has another sign of zero than torch.
    zero = tl.div_rn(low * -1.0, tl.where(scale >= SMALLEST, scale, 1.0))
    dtype: tl.constexpr = planes[1].dtype.element_ty
    stored = round_to(scale, dtype).to(tl.float32)
    regular = (scale >= SMALLEST) & (stored > 0.0) & (stored < float("inf"))
    regular = regular & (tl.abs(round_to(zero, dtype).to(tl.float32)) < float("inf"))
    middle = low * 0.5 + high * 0.5
    sign = tl.where(middle > 0.0, 1.0, tl.where(middle < 0.0, -1.0, 0.0))

    divisor = tl.where(regular, scale, 1.0)
    codes = tl.div_rn(x, divisor[:, None]) + zero[:, None] + 0.5
    codes = tl.minimum(tl.maximum(codes, 0.0), LAST * 1.0).to(tl.int32)
    codes = tl.where(regular[:, None], codes, 0)
    store_codes(planes[0], page_head, offs_n, codes, HEAD_DIM, PAGE, FIELDS, BYTES)
    scale = tl.where(regular, scale, tl.abs(middle))
    zero = tl.where(regular, zero, sign * -1.0)
    tl.store(planes[1] + page_head * PAGE + offs_n, round_to(scale, dtype))
    tl.store(planes[2] + page_head * PAGE + offs_n, round_to(zero, dtype))


@dataclass(frozen=True)
class TokenZeroPointCodec(Codec):
    """int8 or int4 codes with a real-valued zero point per token."""

    reproduces: bool = True

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        codes = Plane("codes", torch.uint8, "token", head_dim * self.bits // 8)
        return codes, Plane("scale", None, "token", 1), Plane("zero", None, "token", 1)

    def _parameters(self, x: torch.Tensor, model_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unrounded ``(scale, zero, regular)``, each ``[..., page_size, 1]``; not regular: stored by its middle."""
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = (high - low) / (2**self.bits - 1)
        zero = -low / scale
        stored = scale.to(model_dtype)
        # A subnormal float32 scale has too few digits left to divide by.
        regular = (scale >= _FLOAT32.tiny) & (stored > 0) & stored.isfinite() & zero.to(model_dtype).isfinite()
        middle = low / 2 + high / 2
        return torch.where(regular, scale, middle.abs()), torch.where(regular, zero, -middle.sign()), regular

    def _encode(self, x: torch.Tensor, model_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        scale, zero, regular = self._parameters(x, model_dtype)
        divisor = torch.where(regular, scale, 1.0)
        codes = (x / divisor + zero + 0.5).trunc_().clamp_(0, 2**self.bits - 1)
        codes = torch.where(regular, codes, 0.0).to(torch.uint8)
        return pack_fields(codes, self.bits), scale.to(model_dtype), zero.to(model_dtype)

    def tile(self, planes: Sequence[torch.Tensor]) -> Tile:
        codes, scale, zero = planes
        token_scale = scale.squeeze(-1).float()
        levels = codes.float() if self.bits == 8 else expand_levels(codes, INTEGERS)
        return Tile(levels, token_scale=token_scale, token_offset=-zero.squeeze(-1).float() * token_scale)

    @property
    def kernel(self) -> KernelCodec:
        return KernelCodec(
            _zero_point_tile,
            no_channels,
            _zero_point_encode,
            8 // self.bits,
            token_scale=True,
            token_offset=True,
            integer_codes=True,
        )

    def cpu(self, head_dim: int) -> CpuCodec:
        return CpuCodec(None if self.bits == 8 else INTEGERS, token_scale=1, token_offset=2, zero_point=True)

    def error_bound(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        scale, zero, regular = self._parameters(y, x.dtype)
        stored_scale, stored_zero = scale.to(x.dtype).float(), zero.to(x.dtype).float()
        scale_error = (stored_scale - scale).abs()
        # The largest |code - zero| multiplies whatever is wrong with the scale.
        reach = torch.maximum(stored_zero.abs(), (2**self.bits - 1 - stored_zero).abs())
        rounding = 8 * _FLOAT32.eps * (reach + 1) * torch.maximum(scale, stored_scale)
        by_formula = scale / 2 + reach * scale_error + (stored_zero - zero).abs() * scale + rounding
        by_middle = (y + zero * scale).abs().amax(-1, keepdim=True) + scale_error
        # The second term is the rounding of this very computation.
        return torch.where(regular, by_formula, by_middle).squeeze(-1) * (x.shape[-1] ** 0.5 * (1 + 4 * _FLOAT32.eps))


INT8_TOKEN = TokenZeroPointCodec("int8-token", 8, "8 bit per token, LMDeploy's formula", "LMDeploy quant_policy 8")
INT4_TOKEN = TokenZeroPointCodec(
    "int4-token", 4, "4 bit per token, LMDeploy's formula", "LMDeploy quant_policy 4", head_dim_multiple=2
)
