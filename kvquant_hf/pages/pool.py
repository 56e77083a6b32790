"""Physical pages: allocation, reference counts, growth.  Integers and tensors only.

A pool owns one tensor per plane, ``[capacity, *shape]``; page i is row i of each.  Pages are shared by counting
references and are written once, so forks and beams cost table entries instead of bytes.  The pool grows to exactly what
a prompt needs, then by 1/32 at a time: at most 3.2 % (or one page) of it is ever reserved but unused, and a page is
moved fewer than 33 times in its life however long the context becomes.  Pools of several layers may share a budget,
which bounds their growth (``budget.py``), and may live in the CPU's memory (``offload.py``).
"""

import contextlib
import math
import mmap
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .budget import Budget, Claim
from .offload import HostCopy

_GROWTH_FRACTION = 32
# Planes on the CPU from this size on have memory of their own.
_MAPPED_BYTES = 1 << 16

PlaneShape = tuple[torch.dtype, tuple[int, ...]]


def new_plane(shape: Sequence[int], nbytes: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A plane ``shape`` of ``nbytes`` whose content is anything.

    A large one on the CPU is a mapping of its own, which goes back to the system when the plane has been outgrown.  In
    the allocator's heap, layers that grow in turn leave holes, each too small for the next plane: a process grew by 1.3
    to 1.7 times what the pages take.
    """
    if nbytes >= _MAPPED_BYTES and device.type == "cpu" and hasattr(mmap, "MAP_ANONYMOUS"):
        with contextlib.suppress(OSError):  # no more memory, or no more mappings: the allocator has the last word
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            return torch.frombuffer(memory, dtype=dtype).view(*shape)
    return torch.empty(shape, dtype=dtype, device=device)


class PagePool:
    """A growing set of equal pages.

    Args:
        planes: ``(dtype, shape)`` of each plane of one page.
        device: where the planes are worked on.
        budget: what the pages are taken from; by default a budget of its own, without a bound.
        offload: whether the pages live in the CPU's memory and visit ``device`` (see ``offload.py``).
    """

    def __init__(
        self,
        planes: Sequence[PlaneShape],
        device: torch.device,
        budget: Budget | None = None,
        offload: bool = False,
    ) -> None:
        self.layout = [(dtype, tuple(shape)) for dtype, shape in planes]
        self.device = device
        self._planes = [torch.empty(0, *shape, dtype=dtype, device=device) for dtype, shape in planes]
        self._host = HostCopy(device) if offload and HostCopy.helps(device) else None
        self._plane_bytes = [math.prod(shape) * dtype.itemsize for dtype, shape in planes]  # of a page
        self.page_bytes = sum(self._plane_bytes)
        self._references = np.zeros(0, dtype=np.int32)
        self._free: list[int] = []
        self._abandoned: list[np.ndarray] = []
        # What stores have made of the planes, which must not outlive them: old planes would stay in memory.
        self.made_of_planes: weakref.WeakKeyDictionary[object, Any] = weakref.WeakKeyDictionary()
        self.budget = Budget() if budget is None else budget
        self.budget.adopt(self)

    @property
    def lock(self) -> threading.RLock:
        """The budget's lock."""
        return self.budget.lock

    @property
    def planes(self) -> list[torch.Tensor]:
        """The planes on the pool's device; offloaded pages are brought back if they are not there."""
        if self._host is not None:
            with self.lock:
                self._planes = self._host.arrived(self._planes)
        return self._planes

    @property
    def offloads(self) -> bool:
        """Whether the pages live in the CPU's memory and visit the device."""
        return self._host is not None

    @property
    def lying(self) -> list[torch.Tensor]:
        """The planes where they lie, for a look at them that brings nothing to the device."""
        if self._host is None or not self._host.away:
            return self.planes
        return self._host.complete()

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
        """Bytes of the pool's tensors, unused pages included, each page once."""
        self._settle()
        return self.device_bytes if self._host is None else self.capacity * self.page_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of the offloaded pages in the CPU's memory; 0 without offloading."""
        return 0 if self._host is None else self._host.nbytes

    @property
    def away(self) -> bool:
        """Whether the pages are in the CPU's memory alone."""
        return self._host is not None and self._host.away

    @property
    def device_bytes(self) -> int:
        """Bytes of the tensors that are on the pool's device now."""
        return sum(plane.untyped_storage().nbytes() for plane in self._planes)

    def references(self, pages: np.ndarray) -> np.ndarray:
        """Number of holders of each of ``pages`` (any shape)."""
        self._settle()
        return self._references[pages]

    def allocate(self, count: int, claim: Claim | None = None) -> np.ndarray:
        """Take ``count`` unused pages, each with one reference; int32 ``[count]``, lowest ids first.

        Args:
            count: number of pages.
            claim: where they were promised, if they were.

        Raises:
            OutOfPages: the budget does not allow them; nothing has changed then.
        """
        with self.lock:
            self._settle()
            if claim is not None:
                claim.pages[self] = max(0, claim.pages[self] - count)
            self.budget.check({self: count})
            if count > len(self._free):
                self._grow(self.used + count)
            # The free list is kept in descending order of id, so that prompts get consecutive pages.
            pages = np.array([self._free.pop() for _ in range(count)], dtype=np.int32)
            self._references[pages] = 1
            if self._host is not None:
                self._host.written(pages)
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

    def offload(self) -> None:
        """Leave the device: pages that are not on the CPU yet are copied there.  Nothing without offloading."""
        if self._host is not None:
            with self.lock:
                self._planes = self._host.leave(self._planes, self.capacity)

    def prefetch(self) -> None:
        """Begin to bring offloaded pages back, beside what the device is doing.  Nothing if they are there."""
        if self._host is not None:
            with self.lock:
                self._planes = self._host.begin(self._planes)

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
            self.made_of_planes = weakref.WeakKeyDictionary()
            self._planes = [torch.empty(0, *shape, dtype=t, device=self.device) for t, shape in self.layout]
            self._host = None if self._host is None else HostCopy(self.device)
            self._references = np.zeros(0, dtype=np.int32)
            self._free = []
        else:
            self._free.sort(reverse=True)

    def _grow(self, needed: int) -> None:
        """Make room for ``needed`` pages in all, keeping what is stored."""
        old = self.capacity
        ahead, ceiling = old + old // _GROWTH_FRACTION, self.budget.ceiling(self)
        capacity = max(needed, ahead if ceiling is None else min(ahead, ceiling))
        # One plane at a time, so that old and new never exist together for the whole pool.  Should memory run out half
        # way, the planes already moved are merely longer than the others.
        self.made_of_planes = weakref.WeakKeyDictionary()
        planes = self.planes
        for i, plane in enumerate(planes):
            grown = new_plane((capacity, *plane.shape[1:]), capacity * self._plane_bytes[i], plane.dtype, plane.device)
            if old:
                grown[:old] = plane[:old]
            planes[i] = grown
            del plane
        self._references = np.concatenate([self._references, np.zeros(capacity - old, dtype=np.int32)])
        self._free = list(range(capacity - 1, old - 1, -1)) + self._free

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name != "made_of_planes"}
        return kept | {"_planes": self.planes, "_host": self._host and HostCopy(self.device)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, made_of_planes=weakref.WeakKeyDictionary())
        self.budget.adopt(self)


class LayerPool:
    """Where one layer of a model gets its pages: a pool that is made when the first keys say what a page is, and that
    lives as long as somebody draws from it.

    Args:
        budget: what the pages are taken from.
        offload: see ``PagePool``.
    """

    def __init__(self, budget: Budget, offload: bool = False) -> None:
        self.budget = budget
        self.offload = offload
        self._pool: weakref.ref[PagePool] | None = None

    @property
    def pool(self) -> PagePool | None:
        """The pool, if there is one."""
        return None if self._pool is None else self._pool()

    def make(self, planes: list[PlaneShape], device: torch.device) -> PagePool:
        """The pool of such pages: the one there is, or a new one if there is none or its pages are different."""
        with self.budget.lock:
            pool = self.pool
            if pool is None or (pool.layout, pool.device) != (planes, device):
                pool = PagePool(planes, device, self.budget, self.offload)
                self._pool = weakref.ref(pool)
            return pool

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pool": self.pool}

    def __setstate__(self, state: dict[str, Any]) -> None:
        pool = state["_pool"]
        self.__dict__.update(state, _pool=None if pool is None else weakref.ref(pool))

    def __deepcopy__(self, memo: dict[int, object]) -> "LayerPool":
        return self  # forks share the pages
