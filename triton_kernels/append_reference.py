"""Append in plain torch: the oracle of the append kernel, and what runs where there is none."""

import functools
from collections.abc import Callable, Sequence

import torch

from .codecs.base import Codec
from .pages import PagedSide

# Stores full pages ``x`` ``[batch, n, heads, page_size, head_dim]`` as the pages ``ids`` (int64 ``[batch, n]``).
Encode = Callable[[Codec, Sequence[torch.Tensor], torch.Tensor, torch.Tensor], None]

# Pages encoded at a time, summed over the batch: bounds the float32 work memory of storing a long prompt.
ENCODED_PAGES = 64


def encode_pages(
    codec: Codec,
    planes: Sequence[torch.Tensor],
    x: torch.Tensor,
    ids: torch.Tensor,
    metric: torch.Tensor | None = None,
) -> None:
    """``Encode`` by the codec itself; ``metric`` as of ``Codec.encode``."""
    in_pages = [plane.per != "layer" for plane in codec.planes(x.shape[4])]
    codec = codec.given(*(plane[0] for plane, paged in zip(planes, in_pages, strict=True) if not paged))
    for stored, plane, paged in zip(planes, codec.encode(x, metric), in_pages, strict=True):
        if paged:
            stored[ids.reshape(-1)] = plane.flatten(0, 1)


def round_reference(side: PagedSide, x: torch.Tensor, pages: torch.Tensor, metric: torch.Tensor) -> None:
    """``ops.round_keys``, which see."""
    round_pages(side, x, pages, functools.partial(encode_pages, metric=metric.unsqueeze(1)))


def round_pages(side: PagedSide, x: torch.Tensor, pages: torch.Tensor, encode: Encode) -> None:
    """Encode whole pages ``x`` ``[batch, heads, count * page_size, head_dim]`` into ``pages`` ``[batch, count]``."""
    _store_pages(side, 0, x, pages, encode)


def append_reference(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_side: PagedSide,
    value_side: PagedSide,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    new_lengths: torch.Tensor,
    *,
    encode: Encode = encode_pages,
) -> None:
    """``ops.append_pages``, which see.  Lengths are read on the host; ragged sequences are stored one by one."""
    rows = lengths.tolist()
    if all(row == rows[0] for row in rows):
        _append(keys, values, key_side, value_side, page_table, rows[0], new_lengths, encode)
        return
    for b, row in enumerate(rows):
        part = slice(b, b + 1)
        key_row, value_row = (side._replace(tail=side.tail[part]) for side in (key_side, value_side))
        _append(keys[part], values[part], key_row, value_row, page_table[part], row, new_lengths[part], encode)


def _append(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_side: PagedSide,
    value_side: PagedSide,
    page_table: torch.Tensor,
    lengths: list[int],
    new_lengths: torch.Tensor,
    encode: Encode,
) -> None:
    """The same for sequences whose ``lengths`` are the same."""
    sealed, held = lengths
    tokens, page_size = keys.shape[2], key_side.page_size
    count = max(0, (held + tokens - 1) // page_size)
    rest = held + tokens - count * page_size
    kept = min(rest, tokens)
    pages = page_table[:, sealed : sealed + count].long() if count else None
    for side, new in ((key_side, keys), (value_side, values)):
        if pages is not None:
            _store_pages(side, held, new, pages, encode)
        side.tail[:, :, rest - kept : rest] = new if kept == tokens else new[:, :, tokens - kept :]
    new_lengths[:] = torch.tensor([sealed + count, rest], dtype=torch.int32)


def _store_pages(side: PagedSide, held: int, new: torch.Tensor, pages: torch.Tensor, encode: Encode) -> None:
    """Encode the ``held`` tokens of the open page followed by those of ``new`` into ``pages`` ``[batch, count]``."""
    (batch, count), page_size = pages.shape, side.page_size
    if held == page_size and count == 1:  # decoding: the open page as it is
        return encode(side.codec, side.planes, side.tail.unsqueeze(1), pages)
    step = max(1, ENCODED_PAGES // batch)
    for first in range(0, count, step):
        last = min(first + step, count)
        x = new[:, :, max(0, first * page_size - held) : last * page_size - held]
        if first == 0 and held:
            x = torch.cat([side.tail[:, :, :held], x], dim=2)
        x = x.unflatten(2, (last - first, page_size)).transpose(1, 2)  # [batch, n, heads, page_size, head_dim]
        encode(side.codec, side.planes, x, pages[:, first:last])
    return None
