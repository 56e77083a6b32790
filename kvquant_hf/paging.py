"""Physical pages: allocation, reference counts, growth.  Integers and tensors only.

A pool owns one tensor per plane, ``[capacity, *shape]``; page i is row i of each.  Pages are shared by counting
references and are written once, so forks and beams cost table entries instead of bytes.  The pool grows to exactly what
a prompt needs, then by 1/32 at a time: at most 3.2 % (or one page) of it is ever reserved but unused, and a page is
moved fewer than 33 times in its life however long the context becomes.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_GROWTH_FRACTION = 32


class PagePool:
    """A growing set of equal pages.

    Args:
        planes: ``(dtype, shape)`` of each plane of one page.
        device: where the planes live.
    """

    def __init__(self, planes: Sequence[tuple[torch.dtype, tuple[int, ...]]], device: torch.device) -> None:
        self.planes = [torch.empty(0, *shape, dtype=dtype, device=device) for dtype, shape in planes]
        self.page_bytes = sum(int(np.prod(shape)) * dtype.itemsize for dtype, shape in planes)
        self._references = np.zeros(0, dtype=np.int32)
        self._free: list[int] = []
        self._abandoned: list[np.ndarray] = []
        # Forks share a pool and may run in threads of their own.  Held from taking pages until they are written, so
        # that no other thread moves the planes in between.
        self.lock = threading.RLock()

    @property
    def capacity(self) -> int:
        """Pages that exist, used or not."""
        return len(self._references)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        self._settle()
        return self.capacity - len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of the pool's tensors, unused pages included."""
        self._settle()
        return sum(plane.untyped_storage().nbytes() for plane in self.planes)

    def references(self, pages: np.ndarray) -> np.ndarray:
        """Number of holders of each of ``pages`` (any shape)."""
        self._settle()
        return self._references[pages]

    def allocate(self, count: int) -> np.ndarray:
        """Take ``count`` unused pages, each with one reference; int32 ``[count]``, lowest ids first."""
        with self.lock:
            self._settle()
            if count > len(self._free):
                self._grow(self.used + count)
            # The free list is kept in descending order of id, so that prompts get consecutive pages.
            pages = np.array([self._free.pop() for _ in range(count)], dtype=np.int32)
            self._references[pages] = 1
        return pages

    def retain(self, pages: np.ndarray) -> None:
        """Add one reference for every occurrence of a page in ``pages`` (any shape)."""
        with self.lock:
            np.add.at(self._references, pages.reshape(-1), 1)

    def release(self, pages: np.ndarray) -> None:
        """Drop one reference for every occurrence of a page; pages without references become free.

        An empty pool gives its memory back.
        """
        with self.lock:
            self._settle()
            self._drop(pages)

    def abandon(self, pages: np.ndarray) -> None:
        """:meth:`release`, put off until the pool is next used.

        For finalizers: the garbage collector may call one in the middle of any other method.
        """
        self._abandoned.append(pages)

    def _settle(self) -> None:
        with self.lock:
            while self._abandoned:
                self._drop(self._abandoned.pop())

    def _drop(self, pages: np.ndarray) -> None:
        if pages.size == 0:
            return
        touched, times = np.unique(pages, return_counts=True)
        left = self._references[touched] - times
        if left.min() < 0:
            raise AssertionError("a page was released more often than it was retained")
        self._references[touched] = left
        self._free.extend(touched[left == 0].tolist())
        if len(self._free) == self.capacity:
            self.planes = [plane.new_empty(0, *plane.shape[1:]) for plane in self.planes]
            self._references = np.zeros(0, dtype=np.int32)
            self._free = []
        else:
            self._free.sort(reverse=True)

    def _grow(self, needed: int) -> None:
        """Make room for ``needed`` pages in all, keeping what is stored."""
        old = self.capacity
        capacity = max(needed, old + old // _GROWTH_FRACTION)
        # One plane at a time, so that old and new never exist together for the whole pool.  Should memory run out half
        # way, the planes already moved are merely longer than the others.
        for i, plane in enumerate(self.planes):
            grown = plane.new_empty(capacity, *plane.shape[1:])
            grown[:old] = plane[:old]
            self.planes[i] = grown
            del plane
        self._references = np.concatenate([self._references, np.zeros(capacity - old, dtype=np.int32)])
        self._free = list(range(capacity - 1, old - 1, -1)) + self._free

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())
