"""One layer of a static cache: the checks around a ``StaticStore``, and what attention is handed.

Nothing that a step does may depend on the number of tokens in Python, or each step would be another graph.  The only
thing that is remembered here is whether there are tokens at all: the first prompt and later steps are two graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import CacheFullError, InterruptedForwardError
from ..pages.budget import Pool
from ..pages.layout import plain_tensors
from ..pages.padding import replace_padding
from ..pages.sinks import FirstTokens
from ..pages.static_ops import full_message
from ..pages.static_store import StaticStore
from .carrier import Side
from .paged import PagedLayer, refuse_gradient
from .static_carrier import StaticKV


class StaticPagedLayer(PagedLayer):
    """A ``PagedLayer`` in memory that is reserved once.

    A layer with a sliding window keeps all tokens too: what hides them is the mask, and a step that decodes one token
    reads the pages of its window only.

    Args:
        max_length: tokens that each sequence may have.
        window: tokens that a query sees, itself included; 0 for all.
        arguments: those of ``PagedLayer``; a pool is not used.
    """

    store: StaticStore | None  # type: ignore[assignment]  # shares the layout with PagedStore, and no pool

    def __init__(self, max_length: int, window: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.max_length = max_length
        self.window = window
        self.leads = False  # whether this layer sees to it that a step fits; the first of a cache does
        self.filled = False  # whether there are tokens
        self._handed: tuple[Any, ...] = ()  # what attention was handed last: store, dtypes, keys, values

    def __getstate__(self) -> dict[str, Any]:
        # A copy has a store of its own to hand out.
        return self.__dict__ | {"_handed": ()}

    def _carrier(
        self, side: Side, dtype: torch.dtype | None = None, exact: torch.Tensor | None = None
    ) -> StaticKV | None:
        return None if self.store is None else StaticKV(self.store, side, self.log, self.window, exact, dtype)

    def initialize(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Reserve the memory for tensors like these."""
        arguments = (*self.codecs, self.page_size, keys, values, self.impl, self.max_length, self.sinks, self.prior)
        if torch.compiler.is_compiling():
            self.store = StaticStore(*arguments)
        else:
            with plain_tensors():
                self.store = StaticStore(*arguments)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[Any, Any]:
        """As of ``PagedLayer``, for ``torch.compile`` too.

        Raises:
            CacheFullError: there is no room for the new tokens; nothing has changed.
        """
        refuse_gradient(keys, values)
        if self.store is not None and not self.filled and not self.store.is_like(keys, values):
            self.store = None  # emptied: the next batch may have another size, and another dtype
        if self.store is None:
            self.initialize(keys, values)
        assert self.store is not None
        new = self.store.fitted(keys, values)
        first = not self.filled
        exact = self.exact_prefill and first and keys.shape[2] > 1  # attended to as it came
        compiling = torch.compiler.is_compiling()
        if compiling:
            self.store.append(*(self.store.keep_first(*new) if first else new), self.leads, first)
        else:
            with plain_tensors():
                self.store.append(*self._without_padding(*new), self.leads, first)
            self.log.prefill += exact
        self.filled = True
        dtypes = self.store.promoted(keys, values)
        if exact or compiling:  # what is kept here would be one more thing for a graph to watch
            held = (keys, values) if exact else (None, None)
            return self._carrier("keys", dtypes[0], held[0]), self._carrier("values", dtypes[1], held[1])
        handed = self._handed
        if not handed or handed[0] is not self.store or handed[1] != dtypes:  # they stand for any number of tokens
            both = self._carrier("keys", dtypes[0]), self._carrier("values", dtypes[1])
            self._handed = handed = (self.store, dtypes, *both)
        return handed[2], handed[3]

    def _without_padding(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens with padding replaced, so that it takes no part in the scales of the pages that they will be in.

        The open page cannot wait until it is sealed, which a graph may do, so all padding that is known of is replaced
        at once, in tokens already held too.  What is replaced is never attended to.
        """
        assert self.store is not None
        if self.padding is None or len(self.padding) != len(keys):
            return (keys, values) if self.filled else self.store.keep_first(keys, values)
        start, count = self.store.length, keys.shape[2]
        held = start % self.page_size or (self.page_size if start else 0)  # a full page stays open
        part = self.padding[:, start - held : start + count]
        if self.padding.shape[1] <= start + count:
            self.padding = None  # nothing is known of the tokens to come: no step has to ask for the length again
        if not part.any():
            return (keys, values) if self.filled else self.store.keep_first(keys, values)
        whole = -(-(held + count) // self.page_size) * self.page_size
        part = np.pad(part, ((0, 0), (0, held + count - part.shape[1])))
        part = np.pad(part, ((0, 0), (0, whole - held - count)), constant_values=True)  # not there yet: as padding
        if not self.filled:
            part = self._first_of(keys, values, part)
        replaced = []
        for new, side in zip((keys, values), self.store.view()[:2], strict=True):
            content = torch.cat([side.tail[:, :, :held], new], dim=2)
            content = torch.nn.functional.pad(content, (0, 0, 0, whole - held - count))
            content = replace_padding(content, part, self.page_size)
            side.tail[:, :, :held] = content[:, :, :held]
            replaced.append(content[:, :, held : held + count])
        return replaced[0], replaced[1]

    def _first_of(self, keys: torch.Tensor, values: torch.Tensor, padding: np.ndarray) -> np.ndarray:
        """Keep the first tokens of a first prompt, and which tokens take no part in scales: they, and ``padding``, bool
        ``[batch, whole pages]``.  A sequence of which not all of them are there yet keeps none."""
        assert self.store is not None
        begin = padding.argmin(1)
        end = np.minimum(begin + self.sinks, (begin // self.page_size + 1) * self.page_size)
        wanted = np.where(end <= keys.shape[2], -1, -2)
        none = FirstTokens(self.sinks, wanted, None, self.page_size)
        content = self.store.view()
        tails = content.keys.tail, content.values.tail
        first, unread = none.seal(tails, (keys, values), 0, 0, padding.shape[1] // self.page_size, padding)
        self.store.hold_first(first)
        unread = padding if unread is None else unread
        return np.concatenate([unread, padding[:, unread.shape[1] :]], 1)

    def pages_for(self, batch: int, tokens: int) -> dict[Pool, int]:
        """Nothing: the pages are reserved."""
        return {}

    def drop(self, count: int) -> None:
        """Drop the last ``count`` tokens."""
        if self.store is not None and count:
            with plain_tensors():
                self.store.crop(count)
                self.filled = self.store.length > 0

    def clear(self) -> None:
        """Drop all tokens; the memory stays reserved, and graphs stay valid."""
        self.padding, self.filled = None, False
        if self.store is not None:
            with plain_tensors():
                self.store.clear()

    def offload(self) -> None:
        """Nothing: a graph reads the pages where they are."""

    def prefetch(self) -> None:
        """Nothing."""


def check_before_generating(layers: Sequence[StaticPagedLayer], needed: int) -> None:
    """Refuse what would fail later, inside of a graph; waits for the device.

    Args:
        layers: the layers of one cache.
        needed: tokens that each sequence may come to have.

    Raises:
        CacheFullError: more than there is room for.
        InterruptedForwardError: the last forward pass did not finish.
    """
    if needed > layers[0].max_length:
        raise CacheFullError(full_message(needed, layers[0].max_length))
    lengths = sorted({layer.length for layer in layers}, reverse=True)
    if len(lengths) > 1:
        raise InterruptedForwardError(
            f"the last forward pass was interrupted and the layers hold {', '.join(map(str, lengths))} tokens; call "
            "cache.rollback() to drop the unfinished tokens, or cache.reset() to start again."
        )
