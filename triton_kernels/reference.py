"""Attention over packed pages in plain torch: the oracle of every kernel, and what runs where no kernel does.

The loop is flash decoding with the scales folded out (see ``codecs/base.py``): a block of pages is unpacked to small
levels, scored against the scaled query, and merged by the online softmax

    m' = max(m, max_t s_t)
    l' = l * e^(m - m') + sum_t e^(s_t - m')
    o' = o * e^(m - m') + sum_t e^(s_t - m') v_t

The open page (``tail``) is one more block, in the model's dtype.  What a block is scored by and what is added under its
weights is a reader's: keys and values here, latents in ``latent_reference.py``.  Work memory is bounded by
``BLOCK_BYTES`` whatever the context: a dense copy of the cache never exists.  Arithmetic is float32, or float64 for
float64 queries.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .codecs.base import Tile
from .first import FirstTokens, put_first
from .pages import PagedSide
from .softmax import OnlineSoftmax, View

# Work memory of one block of pages or of scores.  Small enough to stay in a CPU's second-level cache for usual heads.
BLOCK_BYTES = 4 << 20


class Reader:
    """What a loop over pages reads, for some queries: keys, which score, and values, which are added.

    Args:
        query: ``[batch, query_heads, queries, key_dim]``, scaled, in the dtype of the arithmetic.
        sides: keys and values, open pages without their unused rows.
        packed: whether there are sealed pages.
    """

    def __init__(self, query: torch.Tensor, sides: Sequence[PagedSide], packed: bool) -> None:
        self.keys, self.values = sides[0], sides[-1]
        self.heads, self.value_dim = self.keys.tail.shape[1], self.values.head_dim
        batch, query_heads, queries, key_dim = query.shape
        # The query heads of one key/value head are rows of one product: [batch, heads, group * queries, key_dim].
        self.query = query.reshape(batch, self.heads, query_heads // self.heads * queries, key_dim)
        self.in_domain = self.keys.codec.to_domain(self.query) if packed else self.query

    @property
    def widest(self) -> int:
        """Numbers of a token and head that a block has at a time, at most; scores not counted."""
        return max(self.keys.head_dim, self.values.head_dim)

    def score(self, page_ids: torch.Tensor) -> torch.Tensor:
        """Scores ``[batch, heads, rows, n * page_size]`` of the pages ``page_ids`` ``[batch, n]``."""
        return score_tile(self.in_domain, read_tile(self.keys, page_ids, self.query.dtype))

    def weigh(self, weights: torch.Tensor, page_ids: torch.Tensor) -> torch.Tensor:
        """Sum of their values ``[batch, heads, rows, value_dim]``, in the values' domain, under ``weights``."""
        return weigh_tile(weights, read_tile(self.values, page_ids, self.query.dtype))

    def from_domain(self, x: torch.Tensor) -> torch.Tensor:
        """Sums of values back in the model's domain."""
        return self.values.codec.from_domain(x)

    def rows(self, take: Callable[[PagedSide], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[batch, heads, n, dim]`` of tokens that are not packed; ``take`` has them of one side."""
        return take(self.keys), take(self.values)


def paged_attention_reference(
    query: torch.Tensor,
    keys: PagedSide,
    values: PagedSide,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """``ops.paged_attention``, which see.  Lengths are read on the host; ragged sequences run one by one."""
    return attend_by(Reader, query, (keys, values), page_table, lengths, **options)


def attend_by(
    reader: Callable[[torch.Tensor, Sequence[PagedSide], bool], Reader],
    query: torch.Tensor,
    sides: Sequence[PagedSide],
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
    """Attention by what ``reader`` makes of a query, ``sides`` and whether pages are sealed; the rest as
    ``ops.paged_attention``."""
    options: dict[str, Any] = {"scale": scale, "causal": causal, "softcap": softcap, "window": window}
    rows = lengths.tolist()
    if all(row == rows[0] for row in rows):
        return _attend_uniform(reader, query, sides, page_table, *rows[0], mask=mask, sinks=sinks, **options)
    parts = []
    for b, (sealed, held) in enumerate(rows):
        one = slice(b, b + 1)
        parts.append(
            _attend_uniform(
                reader,
                query[one],
                [side.of(one) for side in sides],
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
    reader: Callable[[torch.Tensor, Sequence[PagedSide], bool], Reader],
    query: torch.Tensor,
    sides: Sequence[PagedSide],
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
    sides = [side._replace(tail=side.tail[:, :, :held]) for side in sides]
    page_table, page_size = page_table[:, :sealed], sides[0].page_size
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    step = max(1, BLOCK_BYTES // (batch * query_heads * page_size * 4))
    parts = []
    for start in range(0, queries, step):
        part = query[:, :, start : start + step]
        part_mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, start : start + step]
        # Absolute position of each query of this part; the causal rule says nothing to a query at the end.
        first = sealed * page_size + held - queries + start
        view = View(first, part.shape[2], causal and queries > 1, window)
        read = reader(part.to(dtype) * scale, sides, sealed > 0)
        parts.append(_attend(part, read, page_table, view, part_mask, softcap, sinks).to(query.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _attend(
    query: torch.Tensor,
    reader: Reader,
    page_table: torch.Tensor,
    view: View,
    mask: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One part of the queries; arguments as in ``ops.paged_attention``, open pages without their unused rows."""
    batch, query_heads, queries, _ = query.shape
    keys, heads, q = reader.keys, reader.heads, reader.query
    group, dtype = query_heads // heads, q.dtype
    softmax = OnlineSoftmax(q, reader.value_dim)

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

    for first, last in _blocks(reader, page_table, group * queries, view):
        ids = page_table[:, first:last]
        weights = softmax.weigh(finish(reader.score(ids), first * keys.page_size))
        softmax.packed += reader.weigh(weights, ids)
    if keys.tail.shape[2]:
        k, v = reader.rows(lambda side: side.tail.to(dtype))
        weights = softmax.weigh(finish(q @ k.transpose(-1, -2), page_table.shape[1] * keys.page_size))
        softmax.exact += weights @ v
    if first_tokens is not None:
        k, v = reader.rows(lambda side: first_tokens.rows(side, dtype))
        softmax.exact += softmax.weigh(finish(q @ k.transpose(-1, -2), 0, first_tokens)) @ v
    if sinks is not None:
        softmax.add_sinks(sinks.to(dtype).reshape(heads, group, 1).expand(-1, -1, queries).reshape(heads, -1))

    output = softmax.exact
    if page_table.shape[1]:
        output = output + reader.from_domain(softmax.packed)
    output = output / softmax.total.masked_fill(softmax.total == 0, 1.0).unsqueeze(-1)
    return output.reshape(batch, query_heads, queries, reader.value_dim)


def _blocks(reader: Reader, page_table: torch.Tensor, rows: int, view: View) -> Iterator[tuple[int, int]]:
    """Ranges of visible logical pages whose unpacked levels and scores stay within ``BLOCK_BYTES``."""
    batch, pages = page_table.shape
    page_size = reader.keys.page_size
    page_bytes = batch * reader.heads * page_size * max(reader.widest, rows) * 4
    step = max(1, BLOCK_BYTES // page_bytes)
    start, end = view.pages(page_size, pages)
    for first in range(start, end, step):
        yield first, min(first + step, end)


def read_tile(side: PagedSide, page_ids: torch.Tensor, dtype: torch.dtype) -> Tile:
    """Unpack the pages ``page_ids`` ``[batch, n]``; the leading dimensions become ``[batch, heads, n]``."""
    planes = [plane[page_ids].transpose(1, 2) for plane in side.planes]
    tile = side.codec.tile(planes)
    return Tile(tile.levels.to(dtype), *(None if part is None else part.to(dtype) for part in tile[1:]))


def score_tile(q: torch.Tensor, tile: Tile) -> torch.Tensor:
    """Scores ``[batch, heads, rows, n * page_size]`` of ``q`` ``[batch, heads, rows, dim]``, in the domain of ``tile``,
    with its keys ``[batch, heads, n, page_size, dim]``."""
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


def weigh_tile(weights: torch.Tensor, tile: Tile) -> torch.Tensor:
    """Sum of the values of ``tile``, ``[batch, heads, rows, dim]``, in its domain, under ``weights`` ``[.., rows,
    tokens]``."""
    weights = weights.unflatten(-1, tile.levels.shape[2:4]).transpose(2, 3)  # [batch, heads, n, rows, page_size]
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
