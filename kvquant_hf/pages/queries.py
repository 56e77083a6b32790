"""What a store has seen of queries, and keys rounded in their metric.

A codec with ``uses_queries`` rounds keys by the second moments of the queries that meet them (``codecs/feedback.py``).
Queries come after their keys: a page that a step completes is rounded in the metric of all queries before that step;
the pages of a first prompt, which attends to its exact keys, once its own queries have been seen.  Where no queries
come by (another attention function reads the keys), pages stay as they were sealed: every code the nearest one.

Every sequence has moments of its own, so that who shares its batch changes nothing.  Pages say nothing of them: whoever
reads a page needs no metric.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..triton_kernels.ops import Implementation, PagedSide, round_keys

SAVED = ("keys.moments", "keys.correlations", "keys.queries")  # what they are called in a file
_SAMPLE = 64  # tokens with whose queries correlations count half
_SUMMED = 256  # tokens whose queries are multiplied out at a time
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


@functools.lru_cache(maxsize=16)
def _below(dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of what is below the diagonal of a matrix."""
    rows, columns = torch.tril_indices(dim, dim, -1, device=device)
    return rows, columns


class Moments(NamedTuple):
    """A symmetric matrix in a quarter of its bytes; what fp16 rounds of it is far below what is added as damping."""

    diagonal: torch.Tensor  # float32 [heads, head_dim]
    correlations: torch.Tensor  # fp16 [heads, head_dim (head_dim - 1) / 2]: below the diagonal, over the roots of both

    @classmethod
    def of(cls, matrix: torch.Tensor) -> Moments:
        """Of float32 ``[heads, head_dim, head_dim]``."""
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        size = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
        rows, columns = _below(matrix.shape[1], matrix.device)
        scaled = matrix * size.unsqueeze(1) * size.unsqueeze(2)
        return cls(diagonal.clone(), scaled[:, rows, columns].half())

    def matrix(self) -> torch.Tensor:
        """The matrix again."""
        size, (heads, dim) = self.diagonal.sqrt(), self.diagonal.shape
        rows, columns = _below(dim, size.device)
        lower = size.new_zeros(heads, dim * dim).index_copy_(1, rows * dim + columns, self.correlations.float())
        lower = lower.view(heads, dim, dim)
        full = (lower + lower.transpose(1, 2)) * size.unsqueeze(1) * size.unsqueeze(2)
        return full + torch.diag_embed(self.diagonal)


def _nobody() -> None:
    """No pages wait for queries."""


class SeenQueries:
    """Second moments of the queries of one layer, for each sequence and key/value head.

    Args:
        heads: key/value heads.
        head_dim: elements of a key.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        self.heads, self.head_dim = heads, head_dim
        self.rounded = self.nearest = 0  # pages sealed: in the metric of queries, and without
        self.padding: np.ndarray | None = None  # bool [batch, tokens] of the step under way, True where padded
        self._fresh: Any = _nobody  # gives the pages just sealed, or None
        self._moments: list[Moments] = []  # of each sequence; beams share them
        self.count = 0  # tokens whose queries these are of
        self._recent: list[torch.Tensor] = []  # as they came, one tensor for each step
        self._tokens = 0  # of these

    def see(self, query: torch.Tensor) -> None:
        """Take the queries of a step, ``[batch, query_heads, tokens, head_dim]``; those of other heads, or of another
        number of sequences, say nothing of these keys."""
        if query.dim() != 4 or query.shape[1] % self.heads or query.shape[3] != self.head_dim:
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
        for query in torch.cat(recent, 2).split(_SUMMED, 2):
            rows = query.unflatten(1, (self.heads, -1)).flatten(2, 3).float()  # [batch, heads, queries, head_dim]
            products = rows.transpose(2, 3) @ rows
            total = products if total is None else total + products
        assert total is not None
        self._moments = [Moments.of(matrix) for matrix in total]

    def sealed(self, fresh: Fresh) -> None:
        """Pages were sealed, every code the nearest one; :meth:`round` may do better."""
        self._fresh = lambda: fresh
        self.nearest += fresh.pages.numel()

    def hand_over(self) -> Fresh | None:
        """The pages just sealed, which go on being known as long as somebody has them."""
        fresh: Fresh | None = self._fresh()
        self._fresh = _nobody if fresh is None else weakref.ref(fresh)
        return fresh

    def metric(self) -> torch.Tensor | None:
        """float32 ``[batch, heads, head_dim, head_dim]``, up to a factor; None before the first query.

        Of few tokens it says little but on its diagonal, and as little is made of the rest.
        """
        self._fold()
        if not self._moments:
            return None
        metric = torch.stack([moments.matrix() for moments in self._moments])
        diagonal = metric.diagonal(dim1=2, dim2=3)
        diagonal *= 1 + _SAMPLE / max(1, self.count)
        return metric

    def round(self, version: int, side: PagedSide, impl: Implementation) -> None:
        """Encode the pages that were just sealed again, in the metric of the queries seen, if there are both.

        Args:
            version: the store's; pages of another one may be somebody else's by now.
            side: keys.
            impl: what is to run.
        """
        fresh = self._fresh()
        if fresh is None or (metric := self.metric()) is None:
            return
        self._fresh = _nobody
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
        held = [*self._recent, *itertools.chain(*self._moments)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
        return sum(storages.values())

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_fresh": _nobody}

    def empty(self) -> SeenQueries:
        """For the same heads, nothing seen."""
        return SeenQueries(self.heads, self.head_dim)

    def fork(self) -> SeenQueries:
        """As many queries seen, by another store."""
        twin = self.empty()
        twin.rounded, twin.nearest, twin.count = self.rounded, self.nearest, self.count
        twin._moments, twin._recent, twin._tokens = list(self._moments), list(self._recent), self._tokens
        return twin


_NAME = "_kvquant_store"


def mark(keys: torch.Tensor, store: object, seen: SeenQueries) -> None:
    """Say whose ``keys`` a model is handed, so that who attends to them can tell the store of its queries."""
    setattr(keys, _NAME, (weakref.ref(store), seen.hand_over()))


def saw(keys: torch.Tensor, query: torch.Tensor) -> None:
    """``query`` has attended to ``keys``; tell the store that these were marked with."""
    marked = getattr(keys, _NAME, None)
    if marked is not None and (store := marked[0]()) is not None:
        store.saw(query)
