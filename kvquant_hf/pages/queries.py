"""What a store has seen of queries, and keys rounded in their metric.

A codec with ``uses_queries`` rounds keys by the second moments of the queries that meet them (``codecs/feedback.py``).
Queries come after their keys: a page that a step completes is rounded in the metric of all queries before that step;
the pages of a first prompt, which attends to its exact keys, once its own queries have been seen.  Where no queries
come by (another attention function reads the keys), pages stay as they were sealed: every code the nearest one.

Every sequence has moments of its own, so that who shares its batch changes nothing.  Pages say nothing of them: whoever
reads a page needs no metric.

A calibration may know moments beforehand.  They are a prior: every sequence begins with them, as if it had
seen ``PRIOR_TOKENS`` tokens, and its own queries are added.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ..triton_kernels.ops import Implementation, PagedSide, round_keys
from .moments import PRIOR_TOKENS, Moments, damped, products, takes

SAVED = ("keys.moments", "keys.correlations", "keys.queries")  # what they are called in a file
_FOLDED = 16  # tokens of queries that are kept as they came, at most: a query is as large as all its group shares


@dataclass(frozen=True, eq=False)
class Fresh:
    """Pages that were just sealed: the store's version, the open page before that and its tokens, the new keys, and
    where they went.  It lives as long as what a model was handed to attend to, and keeps keys no longer."""

    version: int
    tail: torch.Tensor  # [batch, heads, page_size, head_dim]
    held: int
    keys: torch.Tensor  # [batch, heads, tokens, head_dim]
    pages: torch.Tensor  # int64 [batch, count]


class SeenQueries:
    """Second moments of the queries of one layer, for each sequence and key/value head.

    Args:
        heads: key/value heads.
        head_dim: elements of a key.
        prior: moments of the queries of one token, to begin with; None: with nothing.
        batch: sequences that begin so.
    """

    def __init__(self, heads: int, head_dim: int, prior: Moments | None = None, batch: int = 1) -> None:
        self.heads, self.head_dim, self.prior = heads, head_dim, prior
        self.rounded = self.nearest = 0  # pages sealed: in the metric of queries, and without
        self.padding: np.ndarray | None = None  # bool [batch, tokens] of the step under way, True where padded
        self._fresh: Any = None  # gives the pages just sealed, or None; None if there are none
        # Of each sequence; beams share them.
        self._moments: list[Moments] = [] if prior is None else [prior.times(PRIOR_TOKENS)] * batch
        self.count = 0 if prior is None else PRIOR_TOKENS  # tokens whose queries these are of
        self._recent: list[torch.Tensor] = []  # as they came, one tensor for each step
        self._tokens = 0  # of these

    def see(self, query: torch.Tensor) -> None:
        """Take the queries of a step, ``[batch, query_heads, tokens, head_dim]``; those of other heads, or of another
        number of sequences, say nothing of these keys."""
        if not takes(query, self.heads, self.head_dim):
            return
        if self._moments and len(self._moments) != query.shape[0]:
            return
        if self.padding is not None and self.padding.shape == (query.shape[0], query.shape[2]):
            padded = torch.from_numpy(self.padding).to(query.device)
            query = query.masked_fill(padded[:, None, :, None], 0.0)  # what padding computes may be no number
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

    def select(self, rows: torch.Tensor) -> None:
        """Sequence ``rows[i]`` is sequence i now."""
        if self._moments:
            self._moments = [self._moments[row] for row in rows.tolist()]
        if self._recent:
            recent = torch.cat(self._recent, 2)
            self._recent = [recent.index_select(0, rows.to(recent.device))]

    def _fold(self) -> None:
        """Sum what came; new tensors, because forks and beams share the old."""
        recent, self._recent, self._tokens = self._recent, [], 0
        if not recent:
            return
        total = torch.stack([moments.matrix() for moments in self._moments]) if self._moments else None
        self.count += sum(query.shape[2] for query in recent)
        new = products(torch.cat(recent, 2), self.heads)
        total = new if total is None else total + new
        self._moments = [Moments.of(matrix) for matrix in total]

    def sealed(self, fresh: Fresh) -> None:
        """Pages were sealed, every code the nearest one; :meth:`round` may do better."""
        self._fresh = lambda: fresh
        self.nearest += fresh.pages.numel()

    def hand_over(self) -> Fresh | None:
        """The pages just sealed, which go on being known as long as somebody has them."""
        fresh: Fresh | None = self._fresh and self._fresh()
        self._fresh = None if fresh is None else weakref.ref(fresh)
        return fresh

    def metric(self) -> torch.Tensor | None:
        """float32 ``[batch, heads, head_dim, head_dim]``, up to a factor; None before the first query, if there is no
        prior."""
        self._fold()
        if not self._moments:
            return None
        metric = torch.stack([moments.matrix() for moments in self._moments])
        return damped(metric, self.count)

    def round(self, version: int, side: PagedSide, impl: Implementation) -> None:
        """Encode the pages that were just sealed again, in the metric of the queries seen, if there are both.

        Args:
            version: the store's; pages of another one may be somebody else's by now.
            side: keys.
            impl: what is to run.
        """
        fresh = self._fresh and self._fresh()
        if fresh is None or (metric := self.metric()) is None:
            return
        self._fresh = None
        if fresh.version != version or len(metric) != len(fresh.pages):
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
        self._fold()
        if not self._moments:
            return {}
        parts = (*map(torch.stack, zip(*self._moments, strict=True)), torch.tensor([self.count]))
        return dict(zip(SAVED, parts, strict=True))

    def fits(self, tensors: Mapping[str, torch.Tensor], batch: int) -> bool:
        """Whether ``tensors`` can be what :meth:`tensors` gave of ``batch`` sequences of these heads."""
        other = self.head_dim * (self.head_dim - 1) // 2
        rows = batch, self.heads
        expected = ((*rows, self.head_dim), torch.float32), ((*rows, other), torch.float16), ((1,), torch.int64)
        return tensors.keys() == set(SAVED) and all(
            (tuple(tensors[name].shape), tensors[name].dtype) == like
            for name, like in zip(SAVED, expected, strict=True)
        )

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from what was saved."""
        diagonals, correlations, count = (tensors[name] for name in SAVED)
        self._moments = [Moments(*row) for row in zip(diagonals, correlations, strict=True)]
        self._recent, self._tokens, self.count = [], 0, int(count)

    @staticmethod
    def most_bytes(heads: int, head_dim: int, query_heads: int, itemsize: int) -> int:
        """Bytes that are held of one sequence, at most, with queries of ``itemsize`` bytes an element."""
        matrices = heads * (4 * head_dim + 2 * (head_dim * (head_dim - 1) // 2))
        return matrices + _FOLDED * query_heads * head_dim * itemsize

    @property
    def nbytes(self) -> int:
        """Bytes held; what beams share counts once."""
        held = [*self._recent, *itertools.chain(*self._moments), *(self.prior or ())]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
        return sum(storages.values())

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_fresh": None}

    def empty(self, batch: int) -> SeenQueries:
        """For the same heads and ``batch`` sequences, nothing seen."""
        return SeenQueries(self.heads, self.head_dim, self.prior, batch)

    def fork(self) -> SeenQueries:
        """As many queries seen, by another store."""
        twin = self.empty(0)
        twin.rounded, twin.nearest, twin.count = self.rounded, self.nearest, self.count
        twin._moments, twin._recent, twin._tokens = list(self._moments), list(self._recent), self._tokens
        return twin


_NAME = "_kvquant_store"


class Listener(Protocol):
    """Who is told of queries."""

    def saw(self, query: torch.Tensor) -> None:
        """Queries ``[batch, query_heads, tokens, head_dim]`` have attended."""


def mark(keys: torch.Tensor, store: object, seen: SeenQueries) -> None:
    """Say whose ``keys`` a model is handed, so that who attends to them can tell the store of its queries."""
    setattr(keys, _NAME, (weakref.ref(store), seen.hand_over()))


def listen(keys: torch.Tensor, listener: Listener) -> None:
    """Let who attends to ``keys`` tell ``listener``, as long as there is one, of the queries."""
    setattr(keys, _NAME, (weakref.ref(listener), None))


def saw(keys: torch.Tensor, query: torch.Tensor) -> None:
    """``query`` has attended to ``keys``; tell the store or listener that these were marked with."""
    marked = getattr(keys, _NAME, None)
    if marked is not None and (store := marked[0]()) is not None:
        store.saw(query)
