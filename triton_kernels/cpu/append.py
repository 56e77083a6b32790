"""Append by the compiled kernels: tokens into open pages, and pages of affine and of floating-point codes.

Of other codecs the kernels do the rotation and the choice of the codes, where results are exact; the sums between them
remain torch's, so that the stored bytes are the same.
"""

import functools
from collections.abc import Sequence

import torch

from ..append_reference import append_reference, encode_pages, round_pages
from ..codecs.base import Codec
from ..pages import PagedSide
from .native import APPEND, BUCKET, DTYPES, ENCODE, ROTATE, SEARCH, library, side


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


def round_cpu(side: PagedSide, x: torch.Tensor, pages: torch.Tensor, metric: torch.Tensor) -> None:
    """``ops.round_keys``, which see; planes are contiguous."""
    metric = metric.contiguous()
    round_pages(side, x, pages, functools.partial(_encode, metric=metric))


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


def _encode(
    codec: Codec,
    planes: Sequence[torch.Tensor],
    x: torch.Tensor,
    ids: torch.Tensor,
    metric: torch.Tensor | None = None,
) -> None:
    """``append_reference.encode_pages``, which see."""
    cpu = codec.cpu(x.shape[4])
    whole = cpu is not None and (cpu.affine or cpu.given or cpu.floats or cpu.covered is not None)
    if cpu is None or x.dtype not in DTYPES or not (whole or cpu.bucketed or codec.rotated):
        return encode_pages(codec, planes, x, ids, metric)
    if x.stride(4) != 1:
        x = x.contiguous()
    ids = ids.contiguous()
    compiled = library()
    source = (x.data_ptr(), DTYPES[x.dtype], *x.stride()[:4], *x.shape[:4])
    threads = (torch.get_num_threads(), compiled.fork)
    if whole:
        covered = None if cpu.covered is None else torch.tensor(cpu.covered)
        options = (cpu.given, *(0 if extra is None else extra.data_ptr() for extra in (covered, metric)))
        compiled.encode(ENCODE.pack(*source, ids.data_ptr(), *options, *threads) + side(codec, planes, x[0]))
        return None
    if codec.rotated:
        domain = torch.empty(x.shape, dtype=torch.float32)
        compiled.rotate(ROTATE.pack(*source, x.shape[4], domain.data_ptr(), *threads))
    else:
        domain = x.float()
    choice = {"bucket": _search if cpu.octets else _bucket} if cpu.bucketed else {}
    for stored, plane in zip(planes, codec._encode(domain, x.dtype, **choice), strict=True):
        stored[ids.reshape(-1)] = plane.flatten(0, 1)
    return None


def _bucket(u: torch.Tensor, boundaries: tuple[float, ...]) -> torch.Tensor:
    """``lloyd_max.bucket``, which see."""
    u, compiled = u.contiguous(), library()
    codes = torch.empty(u.shape, dtype=torch.uint8)
    table = torch.tensor(boundaries, dtype=torch.float32)
    compiled.bucket(
        BUCKET.pack(
            u.data_ptr(),
            u.numel(),
            table.data_ptr(),
            len(boundaries),
            codes.data_ptr(),
            torch.get_num_threads(),
            compiled.fork,
        )
    )
    return codes


def _search(u: torch.Tensor, table: tuple[float, ...]) -> torch.Tensor:
    """``octet.search``, which see."""
    u, compiled = u.contiguous(), library()
    codes = torch.empty(u.shape, dtype=torch.uint8)
    levels = torch.tensor(table, dtype=torch.float32)
    dim = u.shape[-1]
    pointers = (levels.data_ptr(), len(table), codes.data_ptr())
    compiled.search(SEARCH.pack(u.data_ptr(), u.numel() // dim, dim, *pointers, torch.get_num_threads(), compiled.fork))
    return codes
