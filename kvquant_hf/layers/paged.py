"""One layer of a cache: a store that is made when the first keys arrive, and the checks around it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..errors import GradientError
from ..pages.budget import Budget, Pool
from ..pages.layout import plain_tensors
from ..pages.moments import Moments
from ..pages.pool import LayerPool
from ..pages.queries import mark
from ..pages.store import PagedStore
from ..policies.table import KVPolicy
from ..reports.calls import CallLog
from ..triton_kernels.codecs import CODECS
from ..triton_kernels.ops import Implementation
from .carrier import KVTensor, Side, check_assigned
from .guard import StepGuard


def refuse_gradient(keys: torch.Tensor, values: torch.Tensor) -> None:
    """Refuse to store what carries a gradient.

    Raises:
        GradientError: it does.
    """
    if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
        raise GradientError(
            "a quantized KV cache has no gradient: call the model under torch.no_grad(), or train with use_cache=False."
        )


class PagedLayer:
    """Keys and values of one attention layer in pages.

    Args:
        policy: the codecs.
        page_size: tokens per page.
        exact_prefill: whether the first prompt attends to its exact keys and values.
        guard: shared by the layers of one cache.
        log: shared by the layers of one cache.
        impl: what is to run on the pages.
        sinks: first tokens of each sequence that are kept exact; by default as many as the policy says.
        pool: where the pages come from; by default a pool of its own.
    """

    store_type: type[PagedStore] = PagedStore
    held_window = 0  # tokens of the sliding window that is all that is held; 0: everything is

    def __init__(
        self,
        policy: KVPolicy,
        page_size: int,
        exact_prefill: bool,
        guard: StepGuard,
        log: CallLog,
        impl: Implementation = "auto",
        sinks: int | None = None,
        pool: LayerPool | None = None,
    ) -> None:
        self.policy = policy
        self.codecs = CODECS[policy.keys], CODECS[policy.values]
        self.prior: Moments | None = None  # of queries, from a calibration
        self.page_size = page_size
        self.exact_prefill = exact_prefill
        self.guard = guard
        self.log = log
        self.impl = impl
        self.sinks = policy.sinks if sinks is None else sinks
        self.pool = LayerPool(Budget()) if pool is None else pool
        self.store: PagedStore | None = None
        self.padding: np.ndarray | None = None  # bool [batch, tokens from the first on], True where padded
        self.known: object = None  # to ``guard``, which see
        self._opens = exact_prefill and impl == "auto"  # whether an open page may be read as it is

    @property
    def is_initialized(self) -> bool:
        """Whether the first keys have arrived."""
        return self.store is not None

    @property
    def length(self) -> int:
        """Tokens held."""
        return 0 if self.store is None else self.store.length

    @property
    def batch_size(self) -> int:
        """Sequences held; 0 before the first keys."""
        return 0 if self.store is None else self.store.batch_size

    @property
    def dense_bytes(self) -> int:
        """Bytes of the tokens held, in the model's dtype."""
        return 0 if self.store is None else self.store.dense_bytes()

    @property
    def keys(self) -> Any:
        """All keys, packed, for models that read a layer directly; None before the first.

        Setting them is refused (``CacheMismatchError``), except to themselves, as in ``layer.keys =
        layer.keys.to(device)`` where they are there already.
        """
        return self._carrier("keys")

    @keys.setter
    def keys(self, value: Any) -> None:
        check_assigned(self.store, "keys", value)

    @property
    def values(self) -> Any:
        """All values, packed; as ``keys``."""
        return self._carrier("values")

    @values.setter
    def values(self, value: Any) -> None:
        check_assigned(self.store, "values", value)

    def _carrier(self, side: Side, dtype: torch.dtype | None = None) -> Any:
        """What is handed out for the ``"keys"`` or ``"values"`` that are held."""
        return None if self.store is None else KVTensor(self.store, side, self.log, dtype)

    def initialize(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Make an empty store for tensors like these."""
        with plain_tensors():
            make, sinks, prior = self.pool.make, self.sinks, self.prior
            self.store = self.store_type(*self.codecs, self.page_size, keys, values, self.impl, make, sinks, prior)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens and return what attention is to read.

        Args:
            keys: ``[batch, heads, tokens, key_dim]``, any floating dtype: the first ones decide in which all are held.
            values: ``[batch, heads, tokens, value_dim]``.

        Returns:
            Keys and values, in the dtypes that ``torch.cat`` of those held and the new ones would have.

        Raises:
            GradientError: they carry a gradient.
            InterruptedForwardError: the last forward pass did not finish.
            CacheMismatchError: they do not fit what is held.
            OutOfPages: the budget has no more pages.
        """
        if self._opens and self.store is not None and self.store.loose is not None and not torch.is_grad_enabled():
            self.guard.enter(self, self.length, keys.shape[2])  # the usual case, without what it does not need
            if (opened := self.store.append_open(keys, values)) is not None:
                self.log.open += 1
                self._mark(opened[0], None)
                return opened
        refuse_gradient(keys, values)
        held, count = self.length, keys.shape[2]
        if held == 0 and self.store is not None and not self.store.is_like(keys, values):
            self.store = None  # emptied: the next batch may have another size, and another dtype
        exact = self.exact_prefill and held == 0 and count > 1  # attended to as it came
        # Nothing is packed yet: the open page is what any attention function reads, and needs no kernel.
        simple = self._opens and (not exact or count <= self.page_size)
        if self.store is not None and not simple:
            self.store.check(keys, values)
        self.guard.enter(self, held, count)
        if self.store is None:
            self.initialize(keys, values)
        assert self.store is not None
        if simple and (opened := self.store.append_open(keys, values)) is not None:
            self.log.prefill += exact
            self.log.open += not exact
            opened = (keys, values) if exact else opened
            self._mark(opened[0], self._padded(held, count))
            return opened
        self.store.claim = self.guard.claim
        sealed = self.store.pages_for(count) // keys.shape[0]  # by each sequence
        try:
            self._write(keys, values, exact)
            if sealed and not self.log.out_of_range and keys.device.type == "cpu":  # a GPU would have to be waited for
                self.log.saturated(self.store.saturated_pages(min(sealed, self.store.sealed_pages)))
        finally:
            self.store.claim = None
        if exact:
            self.log.prefill += 1
            self._mark(keys, self._padded(held, count))
            return keys, values
        self.store.round_keys()
        dtypes = self.store.promoted(keys, values)
        packed = self._carrier("keys", dtypes[0]), self._carrier("values", dtypes[1])
        self._mark(packed[0], self._padded(held, count))
        return packed

    def _mark(self, keys: torch.Tensor, padding: np.ndarray | None) -> None:
        """Let who attends to ``keys`` tell the store of the queries; ``padding`` of these, if any."""
        if self.store is not None and self.store.seen is not None:
            self.store.seen.padding = padding
            mark(keys, self.store, self.store.seen)

    def _padded(self, held: int, count: int) -> np.ndarray | None:
        """Which of the ``count`` tokens after ``held`` others are padding, as far as it was said of all of them."""
        part = None if self.padding is None else self.padding[:, held : held + count]
        return part if part is not None and part.shape[1] == count and part.any() else None

    def _padding_of(self, keys: torch.Tensor) -> np.ndarray | None:
        """``padding`` of the open page and the new ``keys``, which are not stored yet.

        None where there is none, or where it was said of another batch: padding then takes part in scales, and the
        mask still hides it.
        """
        if self.padding is None or self.store is None or len(self.padding) != len(keys):
            return None
        start, end = self.length - self.store.tail_length, self.length + keys.shape[2]
        part = self.padding[:, start:end]
        return np.pad(part, ((0, 0), (0, end - start - part.shape[1]))) if part.any() else None

    def _write(self, keys: torch.Tensor, values: torch.Tensor, exact: bool) -> None:
        """Store new tokens; ``exact``: attention reads these tensors and not what is stored."""
        assert self.store is not None
        self.store.append(keys, values, self._padding_of(keys))

    def check_drop(self, count: int) -> None:
        """Refuse to drop the last ``count`` tokens if that cannot be right.

        Raises:
            RollbackError: what the remaining tokens need is no longer held.
        """

    def pages_for(self, batch: int, tokens: int) -> dict[Pool, int]:
        """Pages that storing ``tokens`` more tokens of ``batch`` sequences takes, by the pool they come from; nothing
        as long as it is not known what a page of this layer is."""
        if self.store is not None and self.store.batch_size == batch:
            return {self.store.pool: self.store.pages_for(tokens)}
        pool = self.pool.pool
        return {} if pool is None else {pool: batch * (max(0, tokens - 1) // self.page_size)}

    def drop(self, count: int) -> None:
        """Drop the last ``count`` tokens."""
        if self.store is not None and count:
            away = self.store.pool.away
            with plain_tensors():
                self.store.crop(count)
                if self.store.seen is not None:
                    self.store.seen.drop(count)
            if away:
                self.offload()  # a page that had to be decoded brought the others with it

    def select(self, indices: torch.Tensor) -> None:
        """Make sequence ``indices[i]`` the new sequence i."""
        if self.store is not None:
            with plain_tensors():
                self.store.select(indices)
        if self.padding is not None:
            self.padding = self.padding[indices.cpu().numpy()]

    def clear(self) -> None:
        """Drop all tokens; memory of the pages is given back."""
        self.store = self.padding = None

    def offload(self) -> None:
        """Take the pages off the device, if they live in the CPU's memory."""
        if self.store is not None:
            self.store.pool.offload()

    def prefetch(self) -> None:
        """Begin to bring the pages to the device, if they live in the CPU's memory."""
        if self.store is not None:
            self.store.pool.prefetch()
