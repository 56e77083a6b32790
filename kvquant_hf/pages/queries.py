"""What a store has seen of queries, and keys rounded in their metric.

A codec with ``uses_queries`` rounds keys by the second moments of the queries that meet them (``codecs/feedback.py``).
Queries come after their keys: a page that a step completes is rounded in the metric of all queries before that step;
the pages of a first prompt, which attends to its exact keys, once its own queries have been seen.  Where no queries
come by (another attention function reads the keys), pages stay as they were sealed: every code the nearest one.

Moments are summed over the sequences of a batch.  Pages say nothing of them: whoever reads a page needs no metric.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import numpy as np
import torch

from ..triton_kernels.ops import Implementation, PagedSide, round_keys

MOMENTS = "keys.moments"  # what they are called in a file
_FOLDED = 256  # tokens of queries that are kept as they came, and summed at a time


class Fresh(NamedTuple):
    """Pages that were just sealed: the store's version, the open page before that and its tokens, the new keys, and
    where they went."""

    version: int
    tail: torch.Tensor  # [batch, heads, page_size, head_dim]
    held: int
    keys: torch.Tensor  # [batch, heads, tokens, head_dim]
    pages: torch.Tensor  # int64 [batch, count]


class SeenQueries:
    """Second moments of the queries of one layer, for each key/value head.

    Args:
        heads: key/value heads.
        head_dim: elements of a key.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        self.heads, self.head_dim = heads, head_dim
        self.rounded = self.nearest = 0  # pages sealed: in the metric of queries, and without
        self.padding: np.ndarray | None = None  # bool [batch, tokens] of the step under way, True where padded
        self._fresh: Fresh | None = None
        self._total: torch.Tensor | None = None
        self._recent: list[torch.Tensor] = []  # as they came, one tensor for each step
        self._tokens = 0  # of these

    def see(self, query: torch.Tensor) -> None:
        """Take the queries of a step, ``[batch, query_heads, tokens, head_dim]``."""
        if self.padding is not None and self.padding.shape == (query.shape[0], query.shape[2]):
            real = torch.from_numpy(~self.padding).to(query.device)
            query = query * real[:, None, :, None]
        self._recent.append(query.detach())
        self._tokens += query.shape[2]
        if self._tokens > _FOLDED:
            self._fold()

    def drop(self, count: int) -> None:
        """Forget the queries of the last ``count`` tokens, as far as they are not summed yet."""
        while count > 0 and self._recent:
            last = self._recent.pop()
            if (left := last.shape[2] - count) > 0:
                self._recent.append(last[:, :, :left])
            count -= last.shape[2]
        self._tokens = sum(query.shape[2] for query in self._recent)

    def _fold(self) -> None:
        """Sum what came; new tensors, because forks share the old."""
        recent, self._recent, self._tokens = self._recent, [], 0
        if not recent:
            return
        for query in torch.cat(recent, 2).split(_FOLDED, 2):
            rows = query.unflatten(1, (self.heads, -1)).transpose(0, 1).flatten(1, 3).float()  # [heads, rows, head_dim]
            moments = rows.transpose(1, 2) @ rows
            self._total = moments if self._total is None else self._total + moments

    def sealed(self, fresh: Fresh) -> None:
        """Pages were sealed, every code the nearest one; :meth:`round` may do better."""
        self._fresh = fresh
        self.nearest += fresh.pages.numel()

    def metric(self) -> torch.Tensor | None:
        """float32 ``[heads, head_dim, head_dim]``, up to a factor; None before the first query."""
        self._fold()
        return self._total

    def round(self, version: int, side: PagedSide, impl: Implementation) -> None:
        """Encode the pages that were just sealed again, in the metric of the queries seen, if there are both.

        Args:
            version: the store's; pages of another one may be somebody else's by now.
            side: keys.
            impl: what is to run.
        """
        fresh = self._fresh
        if fresh is None or (metric := self.metric()) is None:
            return
        self._fresh = None
        if fresh.version != version:
            return
        self.nearest -= fresh.pages.numel()
        self.rounded += fresh.pages.numel()
        tokens = fresh.pages.shape[1] * side.page_size
        content = fresh.keys[:, :, : max(0, tokens - fresh.held)]
        if fresh.held:
            content = torch.cat((fresh.tail[:, :, : fresh.held], content), 2)[:, :, :tokens]
        round_keys(side, content, fresh.pages, metric, impl=impl)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a saved store keeps."""
        metric = self.metric()
        return {} if metric is None else {MOMENTS: metric}

    def fits(self, moments: torch.Tensor) -> bool:
        """Whether what was saved can be moments of these heads."""
        shape = (self.heads, self.head_dim, self.head_dim)
        return moments.shape == shape and moments.dtype == torch.float32 and bool(moments.isfinite().all())

    def restore(self, moments: torch.Tensor) -> None:
        """Go on from what was saved."""
        self._total, self._recent, self._tokens = moments, [], 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = [*self._recent, *([] if self._total is None else [self._total])]
        return sum(tensor.nbytes for tensor in held)

    def empty(self) -> SeenQueries:
        """For the same heads, nothing seen."""
        return SeenQueries(self.heads, self.head_dim)

    def fork(self) -> SeenQueries:
        """As many queries seen, by another store."""
        twin = self.empty()
        twin.rounded, twin.nearest = self.rounded, self.nearest
        twin._total, twin._recent, twin._tokens = self._total, list(self._recent), self._tokens
        return twin


_NAME = "_kvquant_store"


def mark(keys: torch.Tensor, store: object) -> None:
    """Say whose ``keys`` these plain tensors are, so that who attends to them can tell the store of its queries."""
    setattr(keys, _NAME, weakref.ref(store))


def saw(keys: torch.Tensor, query: torch.Tensor) -> None:
    """``query`` has attended to ``keys``; tell the store that these were marked with."""
    reference = getattr(keys, _NAME, None)
    if reference is not None and (store := reference()) is not None:
        store.saw(query)
