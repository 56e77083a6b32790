"""What an attention module gets from a static cache instead of dense keys or values.

A plain object and no tensor subclass, because ``torch.compile`` follows plain Python: our attention function finds the
pages in it, and whatever else is done to it is done to the pages multiplied out, which outside of graphs nobody can
write (``readonly.py``).  It stands for ``max_length`` tokens,
as the buffers of transformers' ``StaticCache`` do, so that every mask fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_map

from ..pages.static_ops import multiply_out
from ..pages.static_store import StaticStore, StaticView
from ..reports.calls import CallLog
from .attention import scaled_dot_product_attention
from .readonly import DenseView, refuse_write


class StaticKV:
    """Keys or values of one layer, ``[batch, heads, max_length, head_dim]``, still packed.

    Args:
        store: what holds them.
        side: which of the two.
        log: where a detour is counted; detours inside of a compiled graph are not.
        window: tokens that the last query sees, itself included; 0 for all.
        exact: the same tokens as they came, ``[batch, heads, tokens, head_dim]``, if attention is to read these.
        dtype: what readers get; by default as stored.
    """

    ndim = 4
    expansion: Any = None  # where a layer would make keys and values of what is held: see ``latent.py``

    def __init__(
        self,
        store: StaticStore,
        side: Literal["keys", "values"],
        log: CallLog,
        window: int = 0,
        exact: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.store, self.side, self.window, self.exact, self._log = store, side, window, exact, log
        self._pages, self.shape, held, self.device = store.about[side]
        self.dtype = held if dtype is None else dtype

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
        exact = pages.tail, pages.first, pages.first_at
        held = view.page_table, view.lengths, self.shape[2]
        return multiply_out(pages.codec.name, list(pages.planes), *exact, *held).to(self.dtype)

    def _read(self, reason: str) -> torch.Tensor:
        """All tokens for a reader who may go on to write: read only, except in graphs, which cannot follow that."""
        dense = self.dense(reason)
        return dense if torch.compiler.is_compiling() else DenseView(dense)

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
        if function is torch.nn.functional.scaled_dot_product_attention:
            result = _attention(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        # A graph cannot follow the name of a function, nor needs it.
        name = "" if torch.compiler.is_compiling() else getattr(function, "__name__", str(function))

        def unwrap(value: Any) -> Any:
            return value._read(f"read by {name}") if isinstance(value, StaticKV) else value

        return function(*tree_map(unwrap, list(args)), **tree_map(unwrap, dict(kwargs or {})))

    def __getattr__(self, name: str) -> Any:
        """Any method or attribute of a tensor: of the dense tensor."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._read(f"read by {name}"), name)

    @property
    def data(self) -> torch.Tensor:
        """As of a tensor, read only."""
        return self._read("read by data").data

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        refuse_write("setting .data")

    def __len__(self) -> int:
        return self.shape[0]

    def to(self, *args: Any, **options: Any) -> Any:
        """As of a tensor: itself where it is there already, which layers that share keys ask for."""
        if len(args) == 1 and not options and args[0] in (self.device, str(self.device), self.dtype):
            return self
        return self._read("read by to").to(*args, **options)

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As of a tensor."""
        return 4

    def __repr__(self) -> str:
        return f"StaticKV({self.side}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def _operator(name: str) -> Callable[..., Any]:
    """What Python looks up on the type and not by ``__getattr__``: of the dense tensor."""

    def operate(self: StaticKV, *args: Any, **options: Any) -> Any:
        return getattr(self._read(f"read by {name}"), name)(*args, **options)

    return operate


_BINARY = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
_UNARY = ("neg", "pos", "abs", "invert", "bool", "int", "float", "complex", "index", "iter", "format")
_OTHERS = ("lt", "le", "gt", "ge", "eq", "ne", "getitem", "setitem", "contains")
_COPIES = ("array", "dlpack", "dlpack_device", "deepcopy", "reduce_ex")
for _name in (*(kind + name for name in _BINARY for kind in ("", "r", "i")), *_UNARY, *_OTHERS, *_COPIES):
    if hasattr(torch.Tensor, f"__{_name}__"):
        setattr(StaticKV, f"__{_name}__", _operator(f"__{_name}__"))


def _attention(query: Any, key: Any, value: Any, attn_mask: torch.Tensor | None = None, **options: Any) -> Any:
    """torch's own attention on what is held exactly, or over pages; NotImplemented where pages cannot give it."""
    key, value, attn_mask, _ = exact_prompt(key, value, attn_mask, None)
    if not isinstance(key, StaticKV) and not isinstance(value, StaticKV):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    return scaled_dot_product_attention(query, key, value, attn_mask, **options)


def exact_prompt(
    keys: Any, values: Any, mask: Any, bias: torch.Tensor | None
) -> tuple[Any, Any, Any, torch.Tensor | None]:
    """Plain tensors for what a static cache holds exactly, with mask and position bias cut to their tokens.

    Args:
        keys, values: arguments of an attention call.
        mask: ``[batch or 1, heads or 1, queries, max_length]``, None, or what is no tensor (a ``BlockMask`` of as many
            tokens: keys and values are then filled up to it with zeros, which it hides).
        bias: the same, added to the scores.

    Returns:
        The arguments to go on with; unchanged where nothing is held exactly.
    """
    if not isinstance(keys, StaticKV) or keys.exact is None or not isinstance(values, StaticKV):
        return keys, values, mask, bias
    count = keys.exact.shape[2]
    if mask is not None and not isinstance(mask, torch.Tensor):
        missing = (0, 0, 0, keys.shape[2] - count)
        filled: Any = (keys.exact, values.exact)
        return *(torch.nn.functional.pad(x, missing) for x in filled), mask, bias
    mask, bias = (x if x is None or x.dim() != 4 else x[..., :count] for x in (mask, bias))
    return keys.exact, values.exact, mask, bias
