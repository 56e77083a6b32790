"""Keys or values as the model made them: the baseline that runs through the same pages and the same attention.

    vectors   model dtype [P, D]        16 bits per element in fp16 and bf16, 32 in fp32

Nothing is computed, so a stored page is bit-identical to the page that was handed in; tiles
are float32 as everywhere, which is exact for models up to fp32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..target import tl, triton
from .base import Codec, Plane, Tile
from .cpu import CpuCodec
from .jit import KernelCodec, no_channels


@triton.jit
def _exact_tile(
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
    channel = tl.arange(0, WORDS)
    base = planes[0] + page_head * (PAGE * HEAD_DIM)
    if TRANSPOSED:
        pointers = base + offs_n[None, :] * HEAD_DIM + channel[:, None]
        mask = (channel < HEAD_DIM)[:, None]
    else:
        pointers = base + offs_n[:, None] * HEAD_DIM + channel[None, :]
        mask = (channel < HEAD_DIM)[None, :]
    vectors = tl.load(pointers, mask=mask, other=0.0)  # [N, WORDS] or [WORDS, N]
    return (vectors.to(DTYPE),), offs_n, offs_n


@triton.jit
def _exact_encode(
    planes,
    page_head,
    x,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    BYTES: tl.constexpr,
):
    channel = tl.arange(0, BYTES)
    pointers = planes[0] + page_head * (PAGE * HEAD_DIM) + offs_n[:, None] * HEAD_DIM + channel[None, :]
    tl.store(pointers, x, mask=(channel < HEAD_DIM)[None, :])


@dataclass(frozen=True)
class ExactCodec(Codec):
    """No quantization.  The plane is the page itself, not a copy: whoever encodes also copies into the pool."""

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        return (Plane("vectors", None, "token", head_dim),)

    def encode(self, x: torch.Tensor, metric: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """The page itself; the base class would take it through float32 and back."""
        return self._encode(x, x.dtype)

    def _encode(self, x: torch.Tensor, model_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return (x,)

    def tile(self, planes: Sequence[torch.Tensor]) -> Tile:
        vectors = planes[0]
        return Tile(vectors if vectors.dtype == torch.float64 else vectors.float())

    @property
    def kernel(self) -> KernelCodec:
        return KernelCodec(_exact_tile, no_channels, _exact_encode, byte_codes=False)

    def cpu(self, head_dim: int) -> CpuCodec:
        return CpuCodec()

    def error_bound(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device)


EXACT = ExactCodec("exact", 16, "the model's own dtype", "none: the page as it is")
