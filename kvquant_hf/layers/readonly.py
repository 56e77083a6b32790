"""Keys and values that may be read by anything and written by nothing.

What is stored is packed, so what a reader gets is a copy of it, multiplied out.  Written into, the copy would change
and the cache would not, and nobody would know: whatever leads back to such a copy refuses to be written.

    ReadOnly       a tensor whose operations run on ``dense()``, which is plain
    DenseView      memory that is there, and refuses: what operations on a ``ReadOnly`` return that share its memory
                   (slices, transposes, detach, ...); what does not share it is a plain tensor, and nobody's business

So a model that reads ``keys.transpose(1, 2) @ query`` pays for one view, and its product is plain.  The rule is held by
the dispatcher, below Python: an operation is refused by what its schema says that it writes, whoever calls it.  What
goes past the dispatcher (numpy, pickle, storages) is answered here by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch

from ..errors import CacheMismatchError


def refuse_write(what: str) -> NoReturn:
    """Refuse ``what``, which would write.

    Raises:
        CacheMismatchError: always.
    """
    raise CacheMismatchError(
        f"{what} would write into packed keys or values, and be lost; write into a clone() of them, drop the last "
        "tokens with cache.crop(), or fill a new cache through its update()."
    )


_is_alias_of = torch._C._is_alias_of  # type: ignore[attr-defined]  # not in torch's stub


@functools.lru_cache(maxsize=1024)
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Place and name of the arguments that the operation ``func`` writes."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    return tuple((i, x.name) for i, x in enumerate(schema.arguments) if x.alias_info and x.alias_info.is_write)


def _is_read_only(value: Any) -> bool:
    """Whether ``value`` is a ``ReadOnly``, or a sequence with one in it."""
    if isinstance(value, (list, tuple)):
        return any(map(_is_read_only, value))
    return isinstance(value, ReadOnly)


class ReadOnly(torch.Tensor):
    """A tensor that any operation may read; what would write raises ``CacheMismatchError``."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    # The same as a plain tensor, for readers only; takes the reason: in words, or the operation that reads.
    dense: Callable[[Any], torch.Tensor]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has the arguments of the disabled version
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Any operation: on plain tensors; what shares memory with them is a ``DenseView`` again.

        Raises:
            CacheMismatchError: it would write into one that is read only.
        """
        options = kwargs or {}
        for i, name in _written(func):
            if _is_read_only(args[i] if i < len(args) else options.get(name)):
                refuse_write(str(func))
        sources: list[torch.Tensor] = []

        def plain(value: Any) -> Any:
            if isinstance(value, ReadOnly):
                sources.append(value.dense(func))
                return sources[-1]
            return type(value)(map(plain, value)) if type(value) in (list, tuple) else value

        def guarded(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                shared = any(_is_alias_of(value, source) for source in sources)
                return DenseView(value) if shared else value
            return type(value)(map(guarded, value)) if type(value) in (list, tuple) else value

        return guarded(func(*map(plain, args), **{name: plain(value) for name, value in options.items()}))

    # -- what goes past the dispatcher ---------------------------------------------------------------------------------

    @property
    def data(self) -> torch.Tensor:
        """The same, read only too."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        refuse_write("setting .data")

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """As of a tensor, read only."""
        array = self.dense("read by numpy").numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy() if dtype is None else self.numpy().astype(dtype, copy=False)
        return array.copy() if copy else array

    def tolist(self) -> Any:
        """As of a tensor."""
        return self.dense("read by tolist").tolist()

    def __format__(self, spec: str) -> str:  # of one number: as of a number
        return format(self.dense("read by format"), spec) if self.dim() == 0 else super().__format__(spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        memo[id(self)] = copied = self.clone()
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:  # copy, pickle, torch.save, queues between processes
        return self.clone().__reduce_ex__(protocol)

    def __dlpack__(self, *args: Any, **options: Any) -> Any:
        return self.clone().__dlpack__(*args, **options)

    def data_ptr(self) -> int:
        """Address of the first element as multiplied out, for kernels that read; it lives as long as this tensor."""
        return self.dense("read by data_ptr").data_ptr()

    def _without_memory(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse to hand out memory that could be written.

        Raises:
            CacheMismatchError: always.
        """
        raise CacheMismatchError("cached keys and values have no memory to be shared or written; take a clone() first.")

    untyped_storage = storage = _typed_storage = share_memory_ = _without_memory


class DenseView(ReadOnly):
    """Memory with keys or values multiplied out, ``tensor``, read only."""

    _plain: torch.Tensor

    @staticmethod
    def __new__(cls, tensor: torch.Tensor) -> DenseView:
        self = torch.Tensor._make_subclass(cls, tensor)
        self._plain = tensor
        return self

    def dense(self, reason: Any) -> torch.Tensor:
        return self._plain

    def __repr__(self) -> str:  # type: ignore[override]  # torch's own argument is for tensors with contents
        return repr(self._plain)


def dense(tensor: torch.Tensor, reason: str) -> torch.Tensor:
    """``tensor`` itself, or as a plain tensor if it is read only; by what it can do, as ``carrier.is_packed``."""
    return tensor.dense(reason) if hasattr(tensor, "dense") else tensor
