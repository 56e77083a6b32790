"""What an MLA layer gets for its keys and values: nothing is made of the latents until somebody else reads them.

Such a layer caches a latent of each token, of which all heads make their keys and values, and one rotary key
(``triton_kernels/latent_reference.py``).  Asked to expand what ``update`` returned, it gets two carriers of the
expanded shape.  Our attention function finds the pages in them and the layer's weight (``Expansion``); whatever else
reads them gets the keys and values, made by the layer itself of what the pages hold, once and counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .carrier import KVTensor, Side
from .static_carrier import StaticKV


class Expansion:
    """Keys and values that a layer would make of latents and rotary keys.

    Args:
        latents, rotary: what ``update`` returned, both ``KVTensor`` or both ``StaticKV``.
        weight: ``[query_heads, nope + value, rank]``, as ``latent_attention`` takes it.
        nope: elements of a key that are made of a latent.
        expand: the layer's own arithmetic, on plain latents and rotary keys.
    """

    def __init__(
        self,
        latents: Any,
        rotary: Any,
        weight: torch.Tensor,
        nope: int,
        expand: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        self.latents, self.rotary, self.weight, self._expand = latents, rotary, weight, expand
        self.dims = {"keys": nope + rotary.shape[3], "values": weight.shape[1] - nope}
        self._dense: tuple[torch.Tensor, torch.Tensor] | None = None

    def shape(self, side: Side) -> torch.Size:
        """Of keys or values, ``[batch, query_heads, tokens, dim]``."""
        batch, _, tokens, _ = self.latents.shape
        return torch.Size((batch, self.weight.shape[0], tokens, self.dims[side]))

    def dense(self, side: Side, reason: Any) -> torch.Tensor:
        """Keys or values; the first to be asked for makes both, and is counted with its ``reason``."""
        if self._dense is None:
            self._dense = self._expand(self.latents.dense(reason), self.rotary.dense(reason))
        return self._dense[side == "values"]

    def carriers(self) -> tuple[Any, Any]:
        """What stands for keys and values."""
        if not isinstance(self.latents, StaticKV):
            return ExpandedKV(self, "keys"), ExpandedKV(self, "values")
        exact: Any = (None, None)
        if self.latents.exact is not None:  # a first prompt, which attends to what it has
            exact = self._expand(self.latents.exact, self.rotary.exact)
        return ExpandedStaticKV(self, "keys", exact[0]), ExpandedStaticKV(self, "values", exact[1])


class ExpandedKV(KVTensor):
    """Keys or values of all heads of a layer that has latents in pages."""

    @staticmethod
    def __new__(cls, expansion: Expansion, side: Side) -> ExpandedKV:
        latents = expansion.latents
        about = expansion.shape(side), latents.dtype, latents.device
        self = torch.Tensor._make_wrapper_subclass(cls, about[0], dtype=about[1], device=about[2])
        torch._C._set_throw_on_mutable_data_ptr(self)
        self._about = about
        self.store, self.side, self._log = latents.store, side, latents._log
        self.expansion = expansion
        return self

    def view_pages(self) -> Any:
        """The pages of the latents and rotary keys, if they are still those that this tensor stood for."""
        return self.expansion.latents.view_pages()

    def dense(self, reason: Any) -> torch.Tensor:
        """Have the layer make them of what the pages hold; counted as a fallback with its ``reason``."""
        return self.expansion.dense(self.side, reason).to(self.dtype)


class ExpandedStaticKV(StaticKV):
    """The same of a static cache, for ``torch.compile`` too."""

    def __init__(self, expansion: Expansion, side: Side, exact: torch.Tensor | None) -> None:
        latents = expansion.latents
        self.store, self.side, self.window, self._log = latents.store, side, latents.window, latents._log
        self.shape, self.dtype, self.device = expansion.shape(side), latents.dtype, latents.device
        self.exact, self.expansion = exact, expansion

    def dense(self, reason: str) -> torch.Tensor:
        """All ``max_length`` tokens; as of ``ExpandedKV``."""
        if self.exact is not None:
            return super().dense(reason)
        return self.expansion.dense(self.side, reason).to(self.dtype)
