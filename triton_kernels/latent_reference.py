"""Attention over latents (MLA) in plain torch: two readers for the loop of ``reference.py``.

A layer of this kind caches for each token one latent c, of which all heads make their keys and values, and one rotary
key r, which they share.  With the rows of a head's weight for keys, W_k ``[nope, rank]``, and for values, W_v ``[value,
rank]``:

    score  = q_nope . (W_k c) + q_rope . r  =  (W_k^T q_nope) . c + q_rope . r
    output = sum_t p_t W_v c_t              =  W_v (sum_t p_t c_t)

``Latents`` reads the right-hand sides: the queries of all heads, absorbed, meet one head whose latents are keys and
values at once.  ``ExpandedLatents`` reads the left-hand ones, the keys and values of a block of pages at a time: more
work for each token that is held, less for each query.
"""

from collections.abc import Callable, Sequence

import torch

from .codecs.base import Tile
from .pages import PagedSide
from .reference import Reader, read_tile, score_tile, weigh_tile


class Latents(Reader):
    """Latents and rotary keys, for queries ``[batch, query_heads, queries, rank + rope]``; values are the latents.

    Args:
        query, packed: as of ``Reader``.
        sides: latents and rotary keys, one head each.
    """

    _tile: Tile  # of the block that was scored, which is weighed next

    def __init__(self, query: torch.Tensor, sides: Sequence[PagedSide], packed: bool) -> None:
        self.keys = self.values = sides[0]
        self.rotary, self.heads, self.value_dim = sides[1], 1, sides[0].head_dim
        self.query = query.flatten(1, 2).unsqueeze(1)
        parts = self.query.split([side.head_dim for side in sides], -1)
        self._parts = [side.codec.to_domain(x) if packed else x for side, x in zip(sides, parts, strict=True)]

    @property
    def widest(self) -> int:
        return self.keys.head_dim + self.rotary.head_dim

    def score(self, page_ids: torch.Tensor) -> torch.Tensor:
        self._tile = read_tile(self.keys, page_ids, self.query.dtype)
        rotary = read_tile(self.rotary, page_ids, self.query.dtype)
        return score_tile(self._parts[0], self._tile) + score_tile(self._parts[1], rotary)

    def weigh(self, weights: torch.Tensor, page_ids: torch.Tensor) -> torch.Tensor:
        return weigh_tile(weights, self._tile)

    def rows(self, take: Callable[[PagedSide], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        latents = take(self.keys)
        return torch.cat((latents, take(self.rotary)), -1), latents


class ExpandedLatents(Reader):
    """The keys and values of all heads, made of latents and rotary keys as they are read.

    Args:
        weight: ``[query_heads, nope + value, rank]``.
        query: ``[batch, query_heads, queries, nope + rope]``.
        sides, packed: as of ``Latents``.
    """

    _values: torch.Tensor  # of the block that was scored

    def __init__(self, weight: torch.Tensor, query: torch.Tensor, sides: Sequence[PagedSide], packed: bool) -> None:
        self.keys, self.rotary = self.values, _ = sides
        self.heads, self._nope = query.shape[1], query.shape[3] - self.rotary.head_dim
        self.value_dim = weight.shape[1] - self._nope
        self.query, self._weight = query, weight.to(query.dtype)

    @property
    def widest(self) -> int:
        return self.query.shape[3] + self.value_dim

    def _expand(self, latents: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, ``[batch, query_heads, tokens, dim]``, of latents and rotary keys, ``[batch, 1, ..]``."""
        both = torch.nn.functional.linear(latents[:, 0], self._weight.flatten(0, 1))  # one product for all heads
        both = both.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        nope, values = both.split([self._nope, self.value_dim], -1)
        return torch.cat((nope, rotary.expand(-1, self.heads, -1, -1)), -1), values

    def score(self, page_ids: torch.Tensor) -> torch.Tensor:
        def read(side: PagedSide) -> torch.Tensor:
            return side.codec.from_domain(read_tile(side, page_ids, self.query.dtype).dense()).flatten(2, 3)

        keys, self._values = self.rows(read)
        return self.query @ keys.transpose(-1, -2)

    def weigh(self, weights: torch.Tensor, page_ids: torch.Tensor) -> torch.Tensor:
        return weights @ self._values

    def from_domain(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def rows(self, take: Callable[[PagedSide], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return self._expand(take(self.keys), take(self.rotary))
