"""What every kernel is handed of keys and values."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .codecs.base import Codec


class _PagedSide(NamedTuple):
    codec: Codec
    planes: Sequence[torch.Tensor]
    tail: torch.Tensor
    page_size: int
    first: torch.Tensor | None = None
    first_at: torch.Tensor | None = None


class PagedSide(_PagedSide):
    """Keys or values of one layer.

    ``planes`` are the codec's planes for all physical pages, ``[pages, heads, *Plane.shape(page_size)]``, those per
    layer the same memory for every page; ``tail`` is the open page, ``[batch, heads, page_size, head_dim]`` in the
    model's dtype; ``page_size`` is in tokens.

    ``first``, ``[batch, heads, n, head_dim]`` contiguous in the model's dtype, are tokens that are read as they came:
    those of sequence b at the positions from ``first_at[b]`` (int32 ``[batch]``, among the tokens held; negative: none)
    on, as far as the page reaches in which the first of them lies.  What that page holds at their places, sealed or
    open, is not read.  Both are None where no token is held so; keys and values have the same positions.
    """

    packed: bytes  # what the CPU kernels take, once they have asked: see ``cpu.native``
    calls: dict[Any, Any]  # what stays from step to step, by kind of call: see ``triton_attention``
    chosen: tuple[Any, ...]  # what runs beside which values, once somebody has asked: see ``choice.choose``
    chosen_for_latents: tuple[Any, ...]  # the same of attention where these are latents

    def __getstate__(self) -> None:
        """Nothing beside the fields: a copy has other tensors, and ``packed`` their addresses."""

    def of(self, sequences: slice) -> "PagedSide":
        """The same for some of the sequences."""
        first = None if self.first is None else self.first[sequences]
        at = None if self.first_at is None else self.first_at[sequences]
        return self._replace(tail=self.tail[sequences], first=first, first_at=at)

    @property
    def head_dim(self) -> int:
        """Elements per vector."""
        return self.tail.shape[-1]
