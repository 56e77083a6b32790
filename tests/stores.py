"""Helpers around PagedStore that the tests of pages, attention and reports share."""

import unittest.mock
from collections.abc import Iterable
from typing import Any

import torch
from calibrated import with_range

from kvquant_hf.pages.queries import SeenQueries
from kvquant_hf.pages.store import PagedStore
from kvquant_hf.policies.table import POLICIES, KVPolicy, parse_policy
from kvquant_hf.triton_kernels.codecs import CODECS

# What the CPU kernels take: every codec that declares itself to them, and the policies made of these.
CPU_CODECS = [name for name, codec in CODECS.items() if codec.cpu(64) is not None]
CPU_POLICIES = [name for name, policy in POLICIES.items() if {policy.keys, policy.values} <= set(CPU_CODECS)]
ONLINE = [name for name, policy in POLICIES.items() if not policy.calibrated]  # nothing has to be measured beforehand


def seeing_no_queries() -> Any:
    """A context in which caches see no queries, as static ones and batches do: they round keys to the nearest codes, or
    by a calibration alone."""
    return unittest.mock.patch.object(SeenQueries, "see", lambda self, query: None)


def vectors(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Keys or values ``[batch, heads, tokens, head_dim]`` with a bias per channel and tokens of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * (0.2 + 2 * torch.rand(*shape[:-1], 1, generator=generator))
    return (x + 2 * torch.randn(shape[1], 1, shape[3], generator=generator)).to(dtype)


def make_store(policy: str, keys: torch.Tensor, values: torch.Tensor, page_size: int = 64) -> PagedStore:
    """An empty store for tensors like these."""
    parsed = parse_policy(policy)
    assert isinstance(parsed, KVPolicy)
    sides = ((CODECS[parsed.keys], keys), (CODECS[parsed.values], values))
    codecs = [with_range(codec, x.shape[1], x.shape[3]) for codec, x in sides]
    return PagedStore(codecs[0], codecs[1], page_size, keys, values)


def chunks(total: int, size: int) -> Iterable[slice]:
    """Slices of ``size`` that cover ``total``."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def fill(store: PagedStore, keys: torch.Tensor, values: torch.Tensor, chunk: int = 1 << 30) -> PagedStore:
    """Append all tokens, ``chunk`` at a time."""
    for part in chunks(keys.shape[2], chunk):
        store.append(keys[:, :, part], values[:, :, part])
    return store


def raw(x: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in logical order, so that NaN equals NaN."""
    return x.contiguous().reshape(-1).view(torch.uint8)


def logical_planes(store: PagedStore) -> list[torch.Tensor]:
    """Bytes of every plane, sequence by sequence and page by page, and of both open pages."""
    view = store.view()
    planes = [raw(plane[view.page_table]) for plane in store.pool.planes]
    return planes + [raw(side.tail[:, :, : view.tail_length]) for side in (view.keys, view.values)]


def same_bytes(a: PagedStore, b: PagedStore) -> bool:
    """Whether two stores hold the same tokens, bit for bit."""
    return a.length == b.length and all(map(torch.equal, logical_planes(a), logical_planes(b)))


def live_pages(*stores: PagedStore) -> set[int]:
    """Distinct physical pages in the tables of stores that share a pool."""
    return {int(page) for store in stores for page in store.page_table.flatten()}
