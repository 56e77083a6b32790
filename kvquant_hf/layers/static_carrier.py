"""What an attention module gets from a static cache instead of dense keys or values.

A plain object and no tensor subclass, because ``torch.compile`` follows plain Python: our attention function finds the
pages in it, and whatever else is done to it is done to the pages multiplied out.  It stands for ``max_length`` tokens,
as the buffers of transformers' ``StaticCache`` do, so that every mask fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_map

from ..errors import CacheMismatchError
from ..pages.static_ops import multiply_out
from ..pages.static_store import StaticStore, StaticView
from ..reports.calls import CallLog


class StaticKV:
    """Keys or values of one layer, ``[batch, heads, max_length, head_dim]``, still packed.

    Args:
        store: what holds them.
        side: which of the two.
        log: where a detour is counted; detours inside of a compiled graph are not.
        window: tokens that the last query sees, itself included; 0 for all.
        exact: the same tokens as they came, ``[batch, heads, tokens, head_dim]``, if attention is to read these.
    """

    def __init__(
        self,
        store: StaticStore,
        side: Literal["keys", "values"],
        log: CallLog,
        window: int = 0,
        exact: torch.Tensor | None = None,
    ) -> None:
        self.store, self.side, self.window, self.exact = store, side, window, exact
        self._log = log
        view = store.view()
        self._pages = pages = view.keys if side == "keys" else view.values
        batch, heads, _, head_dim = pages.tail.shape
        self.shape = torch.Size((batch, heads, store.max_length, head_dim))
        self.dtype, self.device, self.ndim = pages.tail.dtype, pages.tail.device, 4

    def view_pages(self) -> StaticView:
        """The pages."""
        return self.store.view()

    def dense(self, reason: str) -> torch.Tensor:
        """All tokens multiplied out, contiguous, zeros behind the last; counted as a fallback with its ``reason``."""
        if not torch.compiler.is_compiling() and self.side == "keys":  # keys and values go together; count them once
            self._log.fallback(reason)
        if self.exact is not None:
            return torch.nn.functional.pad(self.exact, (0, 0, 0, self.shape[2] - self.exact.shape[2]))
        view, pages = self.store.view(), self._pages
        return multiply_out(
            pages.codec.name, list(pages.planes), pages.tail, view.page_table, view.lengths, self.shape[2]
        )

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Any function of torch: on the dense tensor.

        Raises:
            CacheMismatchError: it would write, and the pages would not know.
        """
        if torch.compiler.is_compiling():  # which cannot follow the name of a function, nor needs it
            return function(*tree_map(_unwrap, list(args)), **tree_map(_unwrap, dict(kwargs or {})))
        name = getattr(function, "__name__", str(function))
        if name.endswith("_") and not name.endswith("__"):
            raise CacheMismatchError(f"{name} would write into packed keys or values; write into a clone() of them.")

        def unwrap(value: Any) -> Any:
            return value.dense(f"read by {name}") if isinstance(value, StaticKV) else value

        return function(*tree_map(unwrap, list(args)), **tree_map(unwrap, dict(kwargs or {})))

    def __getattr__(self, name: str) -> Any:
        """Any method or attribute of a tensor: of the dense tensor."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.dense(f"read by {name}"), name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.dense("read by getitem")[index]

    def to(self, *args: Any, **options: Any) -> Any:
        """As of a tensor: itself where it is there already, which layers that share keys ask for."""
        if args == (self.device,) and not options:
            return self
        return self.dense("read by to").to(*args, **options)

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As of a tensor."""
        return 4

    def __repr__(self) -> str:
        return f"StaticKV({self.side}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def _unwrap(value: Any) -> Any:
    return value.dense("read in a graph") if isinstance(value, StaticKV) else value


def exact_prompt(
    keys: Any, values: Any, mask: torch.Tensor | None, bias: torch.Tensor | None
) -> tuple[Any, Any, torch.Tensor | None, torch.Tensor | None]:
    """Plain tensors for what a static cache holds exactly, with mask and position bias cut to their tokens.

    Args:
        keys, values: arguments of an attention call.
        mask: ``[batch or 1, heads or 1, queries, max_length]`` or None.
        bias: the same, added to the scores.

    Returns:
        The arguments to go on with; unchanged where nothing is held exactly.
    """
    if not isinstance(keys, StaticKV) or keys.exact is None or not isinstance(values, StaticKV):
        return keys, values, mask, bias
    count = keys.exact.shape[2]
    mask, bias = (x if x is None or x.dim() != 4 else x[..., :count] for x in (mask, bias))
    return keys.exact, values.exact, mask, bias
