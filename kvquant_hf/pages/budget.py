"""What pools may take: a bound over the pools of several layers, and promises to the step that is running.

What is bounded is the size of the pools, unused pages included.  A step of the model first claims the pages that it
will need in all layers, so that it is refused before any of them has changed.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

from ..errors import OutOfPages


class Pool(Protocol):
    """What a budget knows of a ``PagePool``."""

    page_bytes: int

    @property
    def used(self) -> int:
        """Pages held."""

    @property
    def capacity(self) -> int:
        """Pages reserved."""

    @property
    def nbytes(self) -> int:
        """Bytes of the pages reserved."""

    @property
    def host_bytes(self) -> int:
        """Those of them in the CPU's memory, of a pool on another device."""


class Claim:
    """Pages that a step was promised and has not taken yet, by pool; given back by ``close`` or with the last reference
    to it."""

    def __init__(self, pages: Mapping[Pool, int]) -> None:
        self.pages = Counter(pages)

    def close(self) -> None:
        """Give back what was not taken."""
        self.pages.clear()


class Budget:
    """A bound on the pools that are made with it; without arguments there is none.

    Args:
        max_pages: pages of each pool.
        max_bytes: bytes of all pools together.
    """

    def __init__(self, max_pages: int | None = None, max_bytes: int | None = None) -> None:
        self.max_pages, self.max_bytes = max_pages, max_bytes
        # One lock for the pools of a budget.  Held from taking pages until they are written, so that no other thread
        # moves the planes in between.
        self.lock = threading.RLock()
        self._pools: weakref.WeakSet[Pool] = weakref.WeakSet()
        self._claims: weakref.WeakSet[Claim] = weakref.WeakSet()

    @property
    def bounded(self) -> bool:
        """Whether there is a bound at all."""
        return self.max_pages is not None or self.max_bytes is not None

    @property
    def pools(self) -> list[Pool]:
        """The pools that exist."""
        return list(self._pools)

    @property
    def promised_bytes(self) -> int:
        """Bytes of the pages that running steps have claimed and not taken yet."""
        with self.lock:
            return sum(n * pool.page_bytes for pool, n in self._promised().items())

    def adopt(self, pool: Pool) -> None:
        """Count ``pool`` from now on."""
        with self.lock:
            self._pools.add(pool)

    def claim(self, pages: Mapping[Pool, int]) -> Claim:
        """Promise ``pages`` of each pool.

        Raises:
            OutOfPages: they are not there; nothing is promised then.
        """
        with self.lock:
            self.check(pages)
            claim = Claim(pages)
            self._claims.add(claim)
            return claim

    def check(self, pages: Mapping[Pool, int]) -> None:
        """Refuse to hand out ``pages`` of each pool, beyond those that are held or promised.

        Raises:
            OutOfPages: the pools would have to grow past the bound.
        """
        if not self.bounded or not any(pages.values()):
            return
        with self.lock:
            promised = self._promised()
            taken = {pool: pool.used + promised[pool] for pool in self._pools}
            if self.max_pages is not None:
                pool = max(pages, key=lambda pool: taken[pool] + pages[pool])
                free = max(0, self.max_pages - taken[pool])
                if pages[pool] > free:
                    raise OutOfPages(
                        f"this step needs {pages[pool]} more pages in a layer and {free} of "
                        f"max_pages={self.max_pages} are free; release, reset or crop a cache, or allow more pages."
                    )
            if self.max_bytes is not None:
                free = self.max_bytes - sum(max(p.capacity, n) * p.page_bytes for p, n in taken.items())
                short = {p: n - max(0, p.capacity - taken[p]) for p, n in pages.items()}  # beyond the pool's own unused
                if sum(max(0, n) * p.page_bytes for p, n in short.items()) > free:
                    wanted = sum(n * p.page_bytes for p, n in pages.items())
                    free += sum(max(0, p.capacity - taken[p]) * p.page_bytes for p in pages)
                    raise OutOfPages(
                        f"this step needs {sum(pages.values())} more pages ({wanted:,} bytes) in {len(pages)} layers "
                        f"and {max(0, free):,} bytes of max_bytes={self.max_bytes:,} are free; release, reset or "
                        "crop a cache, or allow more bytes."
                    )

    def ceiling(self, pool: Pool) -> int | None:
        """Pages up to which ``pool`` may reserve in advance; None without a bound.

        Of a bound in bytes a pool reserves no more than leaves every pool as many pages, so that no layer starves
        because another one was grown first.
        """
        if self.max_bytes is None:
            return self.max_pages
        promised = self._promised()
        others = sum(max(p.capacity, p.used + promised[p]) * p.page_bytes for p in self._pools if p is not pool)
        even = self.max_bytes // sum(p.page_bytes for p in self._pools)
        return min(even, (self.max_bytes - others) // pool.page_bytes)

    def _promised(self) -> Counter[Pool]:
        total: Counter[Pool] = Counter()
        for claim in self._claims:
            total.update(claim.pages)
        return total

    def __getstate__(self) -> dict[str, Any]:
        return {"max_pages": self.max_pages, "max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # the pools make themselves known, see PagePool.__setstate__

    def __deepcopy__(self, memo: dict[int, object]) -> Budget:
        return self  # forks draw from one budget
