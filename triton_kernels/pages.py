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


class PagedSide(_PagedSide):
    """Keys or values of one layer.

    ``planes`` are the codec's planes for all physical pages, ``[pages, heads, *Plane.shape(page_size)]``, those per
    layer the same memory for every page; ``tail`` is the open page, ``[batch, heads, page_size, head_dim]`` in the
    model's dtype; ``page_size`` is in tokens.
    """

    packed: bytes  # what the CPU kernels take, once they have asked: see ``cpu.native``
    calls: dict[Any, Any]  # what stays from step to step, by kind of call: see ``triton_attention``
    chosen: tuple[Any, ...]  # what runs beside which values, once somebody has asked: see ``choice.choose``

    def __getstate__(self) -> None:
        """Nothing beside the fields: a copy has other tensors, and ``packed`` their addresses."""

    @property
    def head_dim(self) -> int:
        """Elements per vector."""
        return self.tail.shape[-1]
