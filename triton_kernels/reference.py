"""Attention over packed pages in plain torch: the oracle of every kernel, and what runs where no kernel does.

The loop is flash decoding with the scales folded out (see ``codecs/base.py``): a block of pages is unpacked to small
levels, scored against the scaled query, and merged by the online softmax

    m' = max(m, max_t s_t)
    l' = l * e^(m - m') + sum_t e^(s_t - m')
    o' = o * e^(m - m') + sum_t e^(s_t - m') v_t

The open page (``tail``) is one more block, in the model's dtype.  Work memory is bounded by ``BLOCK_BYTES`` whatever
the context: a dense copy of the cache never exists.  Arithmetic is float32, or float64 for float64 queries.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .codecs.base import Tile
from .first import FirstTokens, put_first
from .pages import PagedSide

# Work memory of one block of pages or of scores.  Small enough to stay in a CPU's second-level cache for usual heads.
BLOCK_BYTES = 4 << 20


class _View(NamedTuple):
    """What consecutive queries may see by their positions: ``first`` is the position of the first of ``queries``."""

    first: int
    queries: int
    causal: bool
    window: int  # the last so many positions up to the query's own; 0 for all

    def pages(self, page_size: int, pages: int) -> tuple[int, int]:
        """Range of pages that any of the queries sees."""
        last = min(pages, (self.first + self.queries - 1) // page_size + 1) if self.causal else pages
        first = max(0, self.first - self.window + 1) // page_size if self.window else 0
        return min(first, last), last

    def seen(self, token: torch.Tensor) -> torch.Tensor | None:
        """bool ``[..., queries, count]`` for tokens at the positions ``token`` ``[..., count]``, or None where all are
        seen."""
        if not (self.causal or self.window):
            return None
        position = torch.arange(self.first, self.first + self.queries, device=token.device).unsqueeze(-1)
        token = token.unsqueeze(-2)
        seen = token <= position if self.causal else torch.ones_like(token <= position)
        return seen & (token > position - self.window) if self.window else seen


class _Softmax:
    """Online softmax over blocks; rows are ``[batch, heads, rows]``.

    Two accumulators, because packed values may live in a rotated domain while the open page does not; both are rescaled
    together.
    """

    def __init__(self, query: torch.Tensor, value_dim: int) -> None:
        rows = query.shape[:-1]
        self.maximum = query.new_full(rows, float("-inf"))
        self.total = query.new_zeros(rows)
        self.packed = query.new_zeros(*rows, value_dim)
        self.exact = query.new_zeros(*rows, value_dim)

    def weigh(self, scores: torch.Tensor) -> torch.Tensor:
        """Take scores ``[batch, heads, rows, tokens]``, return the weights of these tokens, rescale what is there."""
        maximum = torch.maximum(self.maximum, scores.amax(-1))
        # A row that has seen no token yet keeps maximum -inf; measure from 0 there, so that no inf - inf arises.
        origin = maximum.masked_fill(maximum == float("-inf"), 0.0)
        weights = (scores - origin.unsqueeze(-1)).exp_()
        decay = (self.maximum - origin).exp_()
        self.total = self.total * decay + weights.sum(-1)
        self.packed *= decay.unsqueeze(-1)
        self.exact *= decay.unsqueeze(-1)
        self.maximum = maximum
        return weights

    def add_sinks(self, sinks: torch.Tensor) -> None:
        """Add one logit per row that takes probability and carries no value; ``[heads, rows]``."""
        maximum = torch.maximum(self.maximum, sinks)
        decay = (self.maximum - maximum).exp()
        self.total = self.total * decay + (sinks - maximum).exp()
        self.packed *= decay.unsqueeze(-1)
        self.exact *= decay.unsqueeze(-1)
        self.maximum = maximum


def paged_attention_reference(
    query: torch.Tensor,
    keys: PagedSide,
    values: PagedSide,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    window: int = 0,
) -> torch.Tensor:
    """``ops.paged_attention``, which see.  Lengths are read on the host; ragged sequences run one by one."""
    options: dict[str, Any] = {"scale": scale, "causal": causal, "softcap": softcap, "window": window}
    rows = lengths.tolist()
    if all(row == rows[0] for row in rows):
        return _attend_uniform(query, keys, values, page_table, *rows[0], mask=mask, sinks=sinks, **options)
    parts = []
    for b, (sealed, held) in enumerate(rows):
        one = slice(b, b + 1)
        parts.append(
            _attend_uniform(
                query[one],
                keys.of(one),
                values.of(one),
                page_table[one],
                sealed,
                held,
                mask=mask if mask is None or mask.shape[0] == 1 else mask[one],
                sinks=sinks,
                **options,
            )
        )
    return torch.cat(parts)


def _attend_uniform(
    query: torch.Tensor,
    keys: PagedSide,
    values: PagedSide,
    page_table: torch.Tensor,
    sealed: int,
    held: int,
    *,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    window: int,
) -> torch.Tensor:
    """Sequences of ``sealed`` pages and ``held`` open tokens each, in parts of the queries that bound the scores."""
    batch, query_heads, queries, _ = query.shape
    keys, values = (side._replace(tail=side.tail[:, :, :held]) for side in (keys, values))
    page_table = page_table[:, :sealed]
    step = max(1, BLOCK_BYTES // (batch * query_heads * keys.page_size * 4))
    parts = []
    for start in range(0, queries, step):
        part = query[:, :, start : start + step]
        part_mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, start : start + step]
        # Absolute position of each query of this part; the causal rule says nothing to a query at the end.
        first = sealed * keys.page_size + held - queries + start
        view = _View(first, part.shape[2], causal and queries > 1, window)
        parts.append(_attend(part, keys, values, page_table, scale, view, part_mask, softcap, sinks).to(query.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _attend(
    query: torch.Tensor,
    keys: PagedSide,
    values: PagedSide,
    page_table: torch.Tensor,
    scale: float,
    view: _View,
    mask: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One part of the queries; arguments as in ``ops.paged_attention``, open pages without their unused rows."""
    batch, query_heads, queries, key_dim = query.shape
    heads = keys.tail.shape[1]
    group = query_heads // heads
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    # The query heads of one key/value head are rows of one product: [batch, heads, group * queries, key_dim].
    q = query.to(dtype).reshape(batch, heads, group * queries, key_dim) * scale
    q_packed = keys.codec.to_domain(q) if page_table.shape[1] else q
    softmax = _Softmax(q, values.head_dim)

    first_tokens = None if keys.first is None else FirstTokens(keys)

    def finish(scores: torch.Tensor, start: int, own: FirstTokens | None = None) -> torch.Tensor:
        """Softcap and masks on scores ``[batch, heads, group * queries, tokens]`` of what pages hold from ``start`` on;
        or of the ``own`` first tokens of each sequence."""
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        token = torch.arange(start, start + scores.shape[-1], device=q.device) if own is None else own.position
        seen, block = view.seen(token), mask if mask is None or own else mask[..., start : start + len(token)]
        if own is not None:
            scores = scores.masked_fill(~own.there[:, None, None], float("-inf"))
            seen, block = own.by_head(seen), None if block is None else own.of_each(block)
        elif first_tokens is not None:
            scores = scores.masked_fill(first_tokens.replaces(token), float("-inf"))
        if block is None and seen is None:
            return scores
        scores = scores.reshape(batch, heads, group, queries, -1)
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        if block is not None:
            # [batch or 1, query_heads or 1, queries or 1, tokens] -> the same with heads and group apart
            block = block.unflatten(1, (heads, group) if block.shape[1] == query_heads > 1 else (1, block.shape[1]))
            scores = scores.masked_fill(~block, float("-inf")) if block.dtype == torch.bool else scores + block
        return scores.flatten(2, 3)

    for first, last in _blocks(keys, values, page_table, group * queries, view):
        scores = _score_pages(q_packed, keys, page_table[:, first:last], dtype)
        weights = softmax.weigh(finish(scores, first * keys.page_size))
        softmax.packed += _weigh_pages(weights, values, page_table[:, first:last], dtype)
    if keys.tail.shape[2]:
        scores = q @ keys.tail.to(dtype).transpose(-1, -2)
        weights = softmax.weigh(finish(scores, page_table.shape[1] * keys.page_size))
        softmax.exact += weights @ values.tail.to(dtype)
    if first_tokens is not None:
        k, v = (first_tokens.rows(side, dtype) for side in (keys, values))
        softmax.exact += softmax.weigh(finish(q @ k.transpose(-1, -2), 0, first_tokens)) @ v
    if sinks is not None:
        softmax.add_sinks(sinks.to(dtype).reshape(heads, group, 1).expand(-1, -1, queries).reshape(heads, -1))

    output = softmax.exact
    if page_table.shape[1]:
        output = output + values.codec.from_domain(softmax.packed)
    output = output / softmax.total.masked_fill(softmax.total == 0, 1.0).unsqueeze(-1)
    return output.reshape(batch, query_heads, queries, values.head_dim)


def _blocks(
    keys: PagedSide, values: PagedSide, page_table: torch.Tensor, rows: int, view: _View
) -> Iterator[tuple[int, int]]:
    """Ranges of visible logical pages whose unpacked levels and scores stay within ``BLOCK_BYTES``."""
    batch, pages = page_table.shape
    widest = max(keys.head_dim, values.head_dim, rows)
    page_bytes = batch * keys.tail.shape[1] * keys.page_size * widest * 4
    step = max(1, BLOCK_BYTES // page_bytes)
    start, end = view.pages(keys.page_size, pages)
    for first in range(start, end, step):
        yield first, min(first + step, end)


def _tile(side: PagedSide, page_ids: torch.Tensor, dtype: torch.dtype) -> Tile:
    """Unpack the pages ``page_ids`` ``[batch, n]``; the leading dimensions become ``[batch, heads, n]``."""
    planes = [plane[page_ids].transpose(1, 2) for plane in side.planes]
    tile = side.codec.tile(planes)
    return Tile(tile.levels.to(dtype), *(None if part is None else part.to(dtype) for part in tile[1:]))


def _score_pages(q: torch.Tensor, keys: PagedSide, page_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scores ``[batch, heads, rows, n * page_size]`` of ``q`` ``[batch, heads, rows, dim]``, in the keys' domain."""
    tile = _tile(keys, page_ids, dtype)
    q = q.unsqueeze(2)  # [batch, heads, 1, rows, dim] against pages [batch, heads, n, ...]
    scaled = q if tile.channel_scale is None else q * tile.channel_scale.unsqueeze(-2)
    scores = scaled @ tile.levels.transpose(-1, -2)  # [batch, heads, n, rows, page_size]
    if tile.token_scale is not None:
        scores = scores * tile.token_scale.unsqueeze(-2)
    if tile.token_offset is not None:
        scores = scores + q.sum(-1, keepdim=True) * tile.token_offset.unsqueeze(-2)
    if tile.channel_offset is not None:
        scores = scores + (q * tile.channel_offset.unsqueeze(-2)).sum(-1, keepdim=True)
    return scores.transpose(2, 3).flatten(-2)


def _weigh_pages(weights: torch.Tensor, values: PagedSide, page_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum of values ``[batch, heads, rows, dim]``, in the values' domain, under ``weights`` ``[.., rows, tokens]``."""
    tile = _tile(values, page_ids, dtype)
    weights = weights.unflatten(-1, (page_ids.shape[1], values.page_size)).transpose(2, 3)  # [b, heads, n, rows, page]
    scaled = weights if tile.token_scale is None else weights * tile.token_scale.unsqueeze(-2)
    out = scaled @ tile.levels  # [batch, heads, n, rows, dim]
    if tile.channel_scale is not None:
        out = out * tile.channel_scale.unsqueeze(-2)
    if tile.token_offset is not None:
        out = out + (weights * tile.token_offset.unsqueeze(-2)).sum(-1, keepdim=True)
    if tile.channel_offset is not None:
        out = out + weights.sum(-1, keepdim=True) * tile.channel_offset.unsqueeze(-2)
    return out.sum(2)


def gather_dense(side: PagedSide, page_table: torch.Tensor) -> torch.Tensor:
    """The whole side multiplied out, ``[batch, heads, tokens, head_dim]`` contiguous, in the open page's dtype.

    For readers that cannot attend to pages; its cost is what the paged path avoids.  All of ``page_table`` and all of
    the open page are taken: give it a table without reserved pages and an open page without unused rows.  The first
    tokens that are held as they came are in their places.
    """
    batch, pages = page_table.shape
    heads, tail_length, head_dim = side.tail.shape[1:]
    packed_tokens = pages * side.page_size
    dense = side.tail.new_empty(batch, heads, packed_tokens + tail_length, head_dim)
    step = max(1, BLOCK_BYTES // (batch * heads * side.page_size * head_dim * 4))
    for first in range(0, pages, step):
        planes = [plane[page_table[:, first : first + step]].transpose(1, 2) for plane in side.planes]
        block = side.codec.decode(planes).flatten(2, 3)  # [batch, heads, n * page_size, head_dim]
        start = first * side.page_size
        dense[:, :, start : start + block.shape[2]] = block
    dense[:, :, packed_tokens:] = side.tail
    put_first(dense, side)
    return dense
