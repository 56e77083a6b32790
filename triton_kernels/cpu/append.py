"""Append by the compiled kernels: tokens into open pages, and pages of affine codes; other codecs encode in torch."""

from collections.abc import Sequence

import torch

from ..append_reference import append_reference, encode_pages
from ..codecs.base import Codec
from ..reference import PagedSide
from .native import APPEND, DTYPES, ENCODE, library, side


def append_cpu(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_side: PagedSide,
    value_side: PagedSide,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    new_lengths: torch.Tensor,
) -> None:
    """``ops.append_pages``, which see; planes are contiguous."""
    tokens = keys.shape[2]
    arguments = (keys, values, key_side, value_side, page_table, lengths, new_lengths)
    if any(held + tokens > key_side.page_size for _, held in lengths.tolist()):
        return append_reference(*arguments, encode=_encode)
    keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (keys, values))
    call = APPEND.pack(
        keys.shape[0],
        tokens,
        lengths.data_ptr(),
        new_lengths.data_ptr(),
        *_copy(keys, key_side.tail),
        *_copy(values, value_side.tail),
    )
    library().append(call)
    return None


def _copy(x: torch.Tensor, tail: torch.Tensor) -> tuple[int, ...]:
    """Members of ``Copy``."""
    size = x.element_size()
    return (
        x.data_ptr(),
        *x.stride()[:3],
        tail.data_ptr(),
        *tail.stride()[:3],
        x.shape[1],
        x.shape[3] * size,
        size,
    )


def _encode(codec: Codec, planes: Sequence[torch.Tensor], x: torch.Tensor, ids: torch.Tensor) -> None:
    """``append_reference.encode_pages``, which see."""
    cpu = codec.cpu(x.shape[4])
    if cpu is None or not cpu.affine or x.dtype not in DTYPES:
        return encode_pages(codec, planes, x, ids)
    if x.stride(4) != 1:
        x = x.contiguous()
    ids = ids.contiguous()
    compiled = library()
    batch, pages, heads, page_size, _ = x.shape
    call = ENCODE.pack(
        x.data_ptr(),
        DTYPES[x.dtype],
        *x.stride()[:4],
        batch,
        pages,
        heads,
        page_size,
        ids.data_ptr(),
        torch.get_num_threads(),
        compiled.fork,
        *side(codec, planes, x[0]),
    )
    compiled.encode(call)
    return None
