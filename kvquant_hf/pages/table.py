"""Which page holds which tokens of every sequence, and one reference to a page for each entry that names it."""

from __future__ import annotations

import numpy as np
import torch

from .budget import Claim
from .pool import PagePool


def to_device(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    """``numbers`` on ``device``, in memory of their own unless that is the CPU; nobody waits for a GPU.

    Page-locked memory is read by a GPU while the host goes on, and torch gives it to nobody else before that is done.
    """
    host = torch.from_numpy(numbers)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class PageTable:
    """Page ids, int32 ``[batch, pages]``, on the host and, when asked for, on the device.

    Args:
        pool: where the pages come from.
        batch: number of sequences.
        device: where kernels read the table.
    """

    def __init__(self, pool: PagePool, batch: int, device: torch.device) -> None:
        self.pool = pool
        self.device = device
        self.ids = np.zeros((batch, 0), dtype=np.int32)
        self._on_device: torch.Tensor | None = None
        self._blank = -1  # a page of padding alone, as long as an entry names it

    @property
    def on_device(self) -> torch.Tensor:
        """The table on its device."""
        if self._on_device is None:
            self._on_device = to_device(self.ids.copy(), self.device)
        return self._on_device

    @property
    def nbytes(self) -> int:
        """Bytes on the host and on the device."""
        return self.ids.nbytes + (0 if self._on_device is None else self._on_device.nbytes)

    def take(self, count: int, blank: np.ndarray | None = None, claim: Claim | None = None) -> np.ndarray:
        """Take pages from the pool that are to follow those in the table; they are not in it before :meth:`append`.

        Sequence by sequence, so that the pages of one sequence are neighbours.

        Args:
            count: pages of each sequence.
            blank: bool ``[batch, count]``, pages of padding alone, which are all one page; None if there are none.
            claim: where the pages were promised, if they were.

        Returns:
            Page ids ``[batch, count]``.

        Raises:
            OutOfPages: the pool's budget has no more.
        """
        if blank is None:
            return self.pool.allocate(len(self.ids) * count, claim).reshape(len(self.ids), count)
        pages = np.empty(blank.shape, dtype=np.int32)
        known, shared = self._blank in self.ids, int(blank.sum())
        ids = self.pool.allocate(blank.size - shared + (shared > 0 and not known), claim)
        pages[~blank] = ids[: blank.size - shared]
        if shared:
            pages[blank] = self._blank if known else ids[-1]
            self.pool.retain(pages[blank][0 if known else 1 :])
        return pages

    def followed_by(self, pages: np.ndarray) -> torch.Tensor:
        """The table with ``pages`` at its end, on the device; its own tensor if there are none."""
        if pages.shape[1] == 0:
            return self.on_device
        return to_device(np.concatenate([self.ids, pages], axis=1), self.device)

    def append(self, pages: np.ndarray, blank: np.ndarray | None, on_device: torch.Tensor) -> None:
        """Put ``pages`` of :meth:`take` at the end; ``on_device`` is what :meth:`followed_by` gave."""
        self.ids, self._on_device = np.concatenate([self.ids, pages], axis=1), on_device
        if blank is not None and blank.any():
            self._blank = int(pages[blank][0])

    def keep(self, first: int, last: int) -> None:
        """Keep the pages from ``first`` up to and without ``last`` of every sequence; the others are given back."""
        dropped = np.concatenate([self.ids[:, :first], self.ids[:, last:]], axis=1)
        self._replace(self.ids[:, first:last].copy(), dropped)

    def select(self, rows: np.ndarray) -> None:
        """Make sequence ``rows[i]`` the new sequence i; pages are shared."""
        ids = self.ids[rows]
        self.pool.retain(ids)
        self._replace(ids, self.ids)

    def compact(self) -> None:
        """Have the pool give back the memory of pages that nobody holds, unless another table draws from it."""
        pages, places = np.unique(self.ids, return_inverse=True)
        with self.pool.lock:
            if self.pool.used != pages.size:
                return
            kept = [plane[torch.from_numpy(pages).long()] for plane in self.pool.planes]
            shape = self.ids.shape
            # Should this be stopped half way, the table is short of pages, which its layer notices.
            self._replace(self.ids[:, :0].copy(), self.ids)
            moved = self.pool.allocate(pages.size)
            for plane, rows in zip(self.pool.planes, kept, strict=True):
                plane[torch.from_numpy(moved).long()] = rows
            self.adopt(moved[places.reshape(shape)], moved)

    def adopt(self, ids: np.ndarray, pages: np.ndarray) -> None:
        """Be the table ``ids`` of ``pages`` that were just allocated, each once."""
        self.pool.retain(ids)
        self._replace(ids, pages)

    def fork(self) -> PageTable:
        """A second table with the same pages."""
        twin = object.__new__(PageTable)
        twin.__dict__.update(self.__dict__, ids=self.ids.copy())
        self.pool.retain(twin.ids)
        return twin

    def _replace(self, ids: np.ndarray, dropped: np.ndarray) -> None:
        self.ids, self._on_device = ids, None
        if self._blank not in ids:
            self._blank = -1  # it may become anybody's page
        self.pool.release(dropped)

    def __del__(self) -> None:
        # Pages go back to the pool that other tables may draw from.  A table whose constructor failed has none.
        if "ids" in self.__dict__ and self.ids.size:
            self.pool.abandon(self.ids)
