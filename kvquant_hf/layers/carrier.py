"""The tensor that an attention module gets instead of dense keys or values.

It has the right shape, dtype and device, and no storage: it points at the pages.  Our attention function reads the
pages; any other operation on it multiplies the pages out first, so that every model and every attention implementation
stays correct, and the detour is counted (``cache.report()``) and said once.  ``readonly.py`` has what it shares with
the views that are taken of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from ..errors import CacheMismatchError, StaleCarrierError
from ..pages.store import PagedStore
from ..pages.views import StoreView
from ..reports.calls import CallLog
from .attention import is_packed, scaled_dot_product_attention
from .readonly import ReadOnly

Side = Literal["keys", "values"]


class KVTensor(ReadOnly):
    """Keys or values of one layer, ``[batch, heads, tokens, head_dim]``, still packed.

    Made by ``update`` for one forward pass; reading it after the cache has changed raises ``StaleCarrierError``.

    Args:
        store: what holds them.
        side: which of the two.
        log: where a detour is counted.
        dtype: what readers get; by default as stored.
    """

    store: PagedStore
    side: Side
    window = 0  # what a window hides is given back or masked
    expansion: Any = None  # where a layer would make keys and values of what is held: see ``latent.py``
    _about: tuple[torch.Size, torch.dtype, torch.device]
    _stamp: int
    _log: CallLog
    _dense: torch.Tensor | None

    @staticmethod
    def __new__(cls, store: PagedStore, side: Side, log: CallLog, dtype: torch.dtype | None = None) -> KVTensor:
        which = side == "values"
        heads, head_dim = store.vectors[which]
        dtype, device = dtype or store.dtypes[which], store.device
        shape = torch.Size((store.batch_size, heads, store.length, head_dim))
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        torch._C._set_throw_on_mutable_data_ptr(self)  # C code that asks for its memory gets an error, not address 0
        self._about = shape, dtype, device
        self.store, self.side, self._log = store, side, log
        self._stamp, self._dense = store.version, None
        return self

    # Asked for in every layer of every step, and slow to ask torch for where a class has a __torch_function__.
    @property
    def shape(self) -> torch.Size:  # type: ignore[override]  # of C in torch
        """As of a tensor."""
        return self._about[0]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """As of a tensor."""
        return self._about[1]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """As of a tensor."""
        return self._about[2]

    @classmethod
    def __torch_function__(  # type: ignore[override]  # of C in ``ReadOnly``
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """torch's own attention reads the pages; what any other function does is seen by its operations."""
        if func is torch.nn.functional.scaled_dot_product_attention:
            with torch._C.DisableTorchFunctionSubclass():
                result = scaled_dot_product_attention(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    def view_pages(self) -> StoreView:
        """The pages, if they are still those that this tensor stood for."""
        if self.store.version != self._stamp:
            raise StaleCarrierError(
                "these keys and values were returned before the cache changed; use those of the latest update()."
            )
        return self.store.view()

    def dense(self, reason: Any) -> torch.Tensor:
        """Multiply the pages out, contiguous, in this tensor's dtype; counted as a fallback with its ``reason``."""
        if self._dense is None:
            self._dense = self.view_pages().dense(self.side).to(self.dtype)
            if self.side == "keys":  # keys and values of one call go together; count the call once
                self._log.fallback(reason if isinstance(reason, str) else f"read by {reason}")
        return self._dense

    def __repr__(self) -> str:  # type: ignore[override]  # torch's own argument is for tensors with contents
        return f"KVTensor({self.side}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def check_assigned(store: object, side: Side, value: Any) -> None:
    """Refuse to set the keys or values of the layer that has ``store`` to anything but what it holds.

    Args:
        store: the layer's store, or None.
        side: which of the two is set.
        value: what to.

    Raises:
        CacheMismatchError: it is something else.
        StaleCarrierError: it is what was held before the cache changed.
    """
    if value is None and store is None:
        return
    if is_packed(value) and (value.store, value.side) == (store, side):
        value.view_pages()
        return
    raise CacheMismatchError(
        f"a layer's {side} are packed pages and cannot be set; to drop the last tokens call cache.crop(), to choose "
        "sequences cache.batch_select_indices(), to keep pages in the CPU's memory make the cache with offload=True, "
        "and for other contents fill a new cache through its update()."
    )
