"""Append in plain torch: the oracle of the append kernel, and what runs where there is none."""

from collections.abc import Callable, Sequence

import torch

from .codecs.base import Codec
from .reference import PagedSide

# Stores full pages ``x`` ``[batch, n, heads, page_size, head_dim]`` as the pages ``ids`` (int64 ``[batch, n]``).
Encode = Callable[[Codec, Sequence[torch.Tensor], torch.Tensor, torch.Tensor], None]

# Pages encoded at a time, summed over the batch: bounds the float32 work memory of storing a long prompt.
ENCODED_PAGES = 64


def encode_pages(codec: Codec, planes: Sequence[torch.Tensor], x: torch.Tensor, ids: torch.Tensor) -> None:
    """``Encode`` by the codec itself."""
    in_pages = [plane.per != "layer" for plane in codec.planes(x.shape[4])]
    codec = codec.given(*(plane[0] for plane, paged in zip(planes, in_pages, strict=True) if not paged))
    for stored, plane, paged in zip(planes, codec.encode(x), in_pages, strict=True):
        if paged:
            stored[ids.reshape(-1)] = plane.flatten(0, 1)


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
    together = all(row == rows[0] for row in rows)
    batch = len(rows)
    for part in [slice(0, batch)] if together else [slice(b, b + 1) for b in range(batch)]:
        sealed, held = rows[part.start]
        count = max(0, (held + keys.shape[2] - 1) // key_side.page_size)
        pages = page_table[part, sealed : sealed + count].long()
        for side, new in ((key_side, keys[part]), (value_side, values[part])):
            _store_pages(side, side.tail[part, :, :held], new, pages, encode)
            rest = held + new.shape[2] - count * side.page_size
            kept = min(rest, new.shape[2])
            side.tail[part, :, rest - kept : rest] = new[:, :, new.shape[2] - kept :]
        new_lengths[part] = torch.tensor([sealed + count, rest], dtype=torch.int32)


def _store_pages(
    side: PagedSide, open_page: torch.Tensor, new: torch.Tensor, pages: torch.Tensor, encode: Encode
) -> None:
    """Encode the tokens of ``open_page`` followed by those of ``new`` into ``pages`` ``[batch, count]``."""
    batch, count = pages.shape
    if not count:
        return
    held, page_size = open_page.shape[2], side.page_size
    step = max(1, ENCODED_PAGES // batch)
    for first in range(0, count, step):
        last = min(first + step, count)
        start, end = max(0, first * page_size - held), last * page_size - held
        if end == 0:  # the open page was full
            x = open_page
        else:
            x = new[:, :, start:end]
            if first == 0 and held:
                x = torch.cat([open_page, x], dim=2)
        # To [batch, n, heads, page_size, head_dim].
        x = x.unsqueeze(1) if count == 1 else x.unflatten(2, (last - first, page_size)).transpose(1, 2)
        encode(side.codec, side.planes, x, pages[:, first:last])
