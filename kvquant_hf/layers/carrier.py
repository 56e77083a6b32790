"""The tensor that an attention module gets instead of dense keys or values.

It has the right shape, dtype and device, and no storage: it points at the pages.  Our attention function reads the
pages; any other operation on it multiplies the pages out first, so that every model and every attention implementation
stays correct, and the detour is counted (``cache.report()``) and said once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeGuard

import torch
from torch.utils._pytree import tree_map

from ..errors import CacheMismatchError, StaleCarrierError
from ..pages.store import PagedStore
from ..pages.views import StoreView
from ..reports.calls import CallLog

Side = Literal["keys", "values"]


class KVTensor(torch.Tensor):
    """Keys or values of one layer, ``[batch, heads, tokens, head_dim]``, still packed.

    Made by ``update`` for one forward pass; reading it after the cache has changed raises ``StaleCarrierError``.
    """

    store: PagedStore
    side: Side
    window = 0  # what a window hides is given back or masked
    _stamp: int
    _log: CallLog
    _dense: torch.Tensor | None

    @staticmethod
    def __new__(cls, store: PagedStore, side: Side, log: CallLog) -> KVTensor:
        heads, head_dim = store.vectors[side == "values"]
        shape = (store.batch_size, heads, store.length, head_dim)
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=store.dtype, device=store.device)
        self.store, self.side, self._log = store, side, log
        self._stamp, self._dense = store.version, None
        return self

    def view_pages(self) -> StoreView:
        """The pages, if they are still those that this tensor stood for."""
        if self.store.version != self._stamp:
            raise StaleCarrierError(
                "these keys and values were returned before the cache changed; use those of the latest update()."
            )
        return self.store.view()

    def dense(self, reason: str) -> torch.Tensor:
        """Multiply the pages out, contiguous, in the model's dtype; counted as a fallback with its ``reason``."""
        if self._dense is None:
            self._dense = self.view_pages().dense(self.side)
            if self.side == "keys":  # keys and values of one call go together; count the call once
                self._log.fallback(reason)
        return self._dense

    def __repr__(self) -> str:  # type: ignore[override]  # torch's own argument is for tensors with contents
        return f"KVTensor({self.side}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has the arguments of the disabled version
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Any operation that nobody handles: on the dense tensor.

        Raises:
            CacheMismatchError: it would write, and the pages would not know.
        """
        if func._schema.is_mutable:
            raise CacheMismatchError(f"{func} would write into packed keys or values; write into a clone() of them.")

        def unwrap(value: Any) -> Any:
            return value.dense(f"read by {func}") if isinstance(value, KVTensor) else value

        return func(*tree_map(unwrap, args), **tree_map(unwrap, dict(kwargs or {})))


def is_packed(tensor: torch.Tensor) -> TypeGuard[KVTensor]:
    """Whether ``tensor`` is a ``KVTensor``; by what it can do, so that one made before a module was reloaded counts."""
    return hasattr(tensor, "view_pages")


def dense(tensor: torch.Tensor, reason: str) -> torch.Tensor:
    """``tensor`` itself, or its pages multiplied out."""
    return tensor.dense(reason) if is_packed(tensor) else tensor
