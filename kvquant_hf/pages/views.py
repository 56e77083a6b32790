"""What a store shows of itself: its content for attention, and its bytes."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..triton_kernels.ops import PagedSide, gather_dense
from .pool import PagePool


class StoreView(NamedTuple):
    """What attention reads; valid until the store changes."""

    keys: PagedSide
    values: PagedSide
    page_table: torch.Tensor  # int32 [batch, sealed_pages]
    lengths: torch.Tensor  # int32 [batch, 2]: sealed pages, tokens in the open page
    tail_length: int

    def dense(self, side: str) -> torch.Tensor:
        """``"keys"`` or ``"values"`` multiplied out, ``[batch, heads, tokens, head_dim]``."""
        paged = self.keys if side == "keys" else self.values
        with torch.autocast(paged.tail.device.type, enabled=False):
            return gather_dense(paged._replace(tail=paged.tail[:, :, : self.tail_length]), self.page_table)

    def opened(self, page: int, tokens: int) -> tuple[torch.Tensor, ...]:
        """Open pages of keys and values, new tensors, that hold the first ``tokens`` of the sealed page ``page``."""
        table = self.page_table[:, page : page + 1]
        tails = tuple(torch.empty_like(side.tail) for side in (self.keys, self.values))
        for tail, side in zip(tails, (self.keys, self.values), strict=True):
            tail[:, :, :tokens] = gather_dense(side._replace(tail=side.tail[:, :, :0], first=None), table)[
                :, :, :tokens
            ]
        return tails


@dataclass(frozen=True)
class Footprint:
    """Bytes held by one store.  ``packed``: its sealed pages, each once however many sequences share it, without those
    of forks in the same pool.  ``open_page``: open pages, and first tokens beside sealed ones.  ``unused``: pages of
    the pool that nobody holds.  ``shared``: of ``packed``, the pages that several sequences refer to, of this store or
    of others; ``holders``: the most that refer to one.  ``copies``: pages of the pool that are both on the CPU and on
    the device.  ``tables``: page tables, lengths, and what codecs keep once per layer."""

    packed: int
    open_page: int
    unused: int
    tables: int
    shared: int = 0
    holders: int = 0
    copies: int = 0

    @classmethod
    def of(cls, pool: PagePool, ids: np.ndarray, exact: int, tables: int) -> "Footprint":
        """Of a store with the pages ``ids`` of ``pool``, and bytes of what is exact and of tables."""
        pages = np.unique(ids)
        holders = pool.references(pages)
        packed, shared = (int(n) * pool.page_bytes for n in (pages.size, (holders > 1).sum()))
        unused = pool.nbytes - pool.used * pool.page_bytes
        copies = pool.host_bytes + pool.device_bytes - pool.nbytes
        return cls(packed, exact, unused, tables, shared, int(holders.max(initial=0)), copies)

    @property
    def total(self) -> int:
        """Everything."""
        return self.packed + self.open_page + self.unused + self.tables + self.copies
