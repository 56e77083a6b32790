"""Keys or values as the model made them: the baseline that runs through the same pages and the same attention.

    vectors   model dtype [P, D]        16 bits per element in fp16 and bf16, 32 in fp32

Nothing is computed, so a stored page is bit-identical to the page that was handed in; tiles
are float32 as everywhere, which is exact for models up to fp32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .base import Codec, Plane, Tile


@dataclass(frozen=True)
class ExactCodec(Codec):
    """No quantization.  The plane is the page itself, not a copy: whoever encodes also copies into the pool."""

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        return (Plane("vectors", None, "token", head_dim),)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The page itself; the base class would take it through float32 and back."""
        return self._encode(x, x.dtype)

    def _encode(self, x: torch.Tensor, model_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return (x,)

    def tile(self, planes: Sequence[torch.Tensor]) -> Tile:
        vectors = planes[0]
        return Tile(vectors if vectors.dtype == torch.float64 else vectors.float())

    def error_bound(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device)


EXACT = ExactCodec("exact", 16, "the model's own dtype", "none: the page as it is")
