"""A memory that knows of each byte whether it may be touched, who wrote it, and who has read it since.

What is known is kept for *granules*, the narrowest access of a kernel, and found out at every access:

    bounds       outside of what the kernel was given: for tensors, the bytes of their elements exactly
    alignment    not a multiple of the width of the access, of a vector that of the whole vector
    unwritten    a read of bytes that nobody wrote, or that the caller has said nobody may read
    pending      an access to the target of an asynchronous copy that its thread has not waited for
    races        two threads, one of them writing, without a barrier between: see ``Order``

Several threads that write the same value to a place are no race: Triton lets threads repeat each other's work.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .formats import UNSIGNED

if TYPE_CHECKING:
    from .run import Run

NEVER = np.uint64(2**64 - 1)  # the key of nobody
MEMBER_BITS = {"launch": 40, "CTA": 6, "warp": 6}  # levels of ``Order``, and bits of a member


class Order:
    """Who may touch what after whom, between the members of each kind of group, its *level*.

    ``"launch"``   CTAs      of the launch   nothing makes them orderly
    ``"CTA"``      warps     of a CTA        its barriers do
    ``"warp"``     threads   of a warp       its barriers and those of its CTA do

    The *key* of a thread at a level is (group, barriers that it has passed, member); two accesses are unordered if
    their keys differ in the member alone.  For each granule the keys of the last write and of the last reads are kept,
    ``[levels, granules]``; where several members have read, all bits of the member are set, which is nobody.
    """

    def __init__(self, levels: tuple[str, ...], granules: int) -> None:
        self.levels = levels
        self.several = np.array([(1 << MEMBER_BITS[level]) - 1 for level in levels], np.uint64).reshape(-1, 1, 1)
        self.written, self.read = (np.full((len(levels), granules), NEVER) for _ in range(2))

    def unordered(self, earlier: np.ndarray, now: np.ndarray) -> np.ndarray:
        """Where keys differ, and only in the member.  The subtraction makes the largest number of no difference."""
        return (earlier ^ now) - np.uint64(1) < self.several

    @staticmethod
    def _put(known: np.ndarray, granules: np.ndarray, keys: np.ndarray) -> None:
        for row, key in zip(known, keys, strict=True):
            row[granules] = key

    def note_read(self, granules: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Where what is read was written by another one, ``[levels, threads, granules]``."""
        others = self.unordered(self.read.take(granules, 1), keys)
        now = np.where(others, keys | self.several, keys) if others.any() else keys
        self._put(self.read, granules, now)
        lost = self.read.take(granules, 1) != now  # of several readers of this very instruction one remains
        for row, several, overwritten in zip(self.read, self.several.flat, lost, strict=True):
            row[granules[overwritten]] |= several
        return self.unordered(self.written.take(granules, 1), keys)

    def note_write(self, granules: np.ndarray, keys: np.ndarray, changes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where another one's write changes, and where it comes after another one's read."""
        over_write = self.unordered(self.written.take(granules, 1), keys) & changes
        over_read = self.unordered(self.read.take(granules, 1), keys)
        self._put(self.written, granules, keys)
        return over_write, over_read


class Memory:
    """``size`` bytes with what is known of each granule of ``grain`` bytes; at first nothing may be touched."""

    def __init__(
        self, name: str, size: int, grain: int, report: Callable[..., None], levels: tuple[str, ...] = ()
    ) -> None:
        self.name, self.grain, self._report = name, grain, report
        size = -(-size // 16) * 16
        granules = size // grain
        self.data = np.full(size, 0xFF, np.uint8)
        self.valid, self.written = np.zeros(granules, bool), np.zeros(granules, bool)
        self.pending, self.any_pending = np.zeros(granules, np.int16), False
        self.order = Order(levels, granules)
        self.bytes_read = self.bytes_written = 0

    def allowed(
        self, run: "Run", threads: np.ndarray, offsets: np.ndarray, size: int, where: str, access: str
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """Which of the accesses of ``size`` bytes are in bounds and aligned (None: all); the others are reported.

        The second is the granules of those, ``[accesses, size / grain]``.
        """
        granules = (offsets // self.grain)[:, None] + np.arange(size // self.grain)
        inside = (offsets >= 0) & (offsets + size <= len(self.data))
        if inside.all():
            inside = self.valid[granules].all(1)
        else:
            inside[inside] = self.valid[granules[inside]].all(1)
        aligned = offsets % size == 0
        if inside.all() and aligned.all():
            return None, granules
        for kind, good in ((f"{access} out of bounds", inside), (f"misaligned {access}", aligned)):
            if not good.all():
                self._report(self, kind, run, where, threads[~good], offsets[~good])
        good = inside & aligned
        return good, granules[good]

    def note_read(self, run: "Run", threads: np.ndarray, granules: np.ndarray, where: str) -> None:
        """``threads[i]`` reads ``granules[i]``."""
        self.bytes_read += granules.size * self.grain
        found = {"read of what nobody wrote": ~self.written[granules]}
        if self.any_pending:
            found["read before the wait of its asynchronous copy"] = self.pending[granules] > 0
        after_write = self.order.note_read(granules, run.keys_of(threads, self.order.levels))
        self._add_races(found, "read after write", after_write)
        self._report_all(found, run, threads, granules, where)

    def note_write(
        self, run: "Run", threads: np.ndarray, granules: np.ndarray, where: str, changes: np.ndarray | None = None
    ) -> None:
        """``threads[i]`` writes ``granules[i]``, and changes those of ``changes`` alone."""
        self.bytes_written += granules.size * self.grain
        changes = np.ones(granules.shape, bool) if changes is None else changes
        found = {}
        if self.any_pending:
            found["write before the wait of an asynchronous copy"] = self.pending[granules] > 0
        keys = run.keys_of(threads, self.order.levels)
        after_write, after_read = self.order.note_write(granules, keys, changes)
        self._add_races(found, "write after write", after_write)
        self._add_races(found, "write after read", after_read)
        self.written[granules] = True
        self._report_all(found, run, threads, granules, where)

    def _add_races(self, found: dict[str, np.ndarray], what: str, unordered: np.ndarray) -> None:
        if unordered.any():
            found |= {f"race in a {level}: {what}": unordered[i] for i, level in enumerate(self.order.levels)}

    def _report_all(self, found: dict[str, Any], run: "Run", threads: Any, granules: Any, where: str) -> None:
        for kind, bad in found.items():
            if bad.any():
                rows, columns = np.nonzero(bad)
                self._report(self, kind, run, where, threads[rows], granules[rows, columns] * self.grain)

    def load(self, offsets: np.ndarray, bits: int, count: int) -> list[np.ndarray]:
        """``count`` numbers of ``bits`` from each offset on."""
        view, index = self.data.view(UNSIGNED[bits]), offsets // (bits // 8)
        return [view[index + i] for i in range(count)]

    def store(
        self, run: "Run", threads: np.ndarray, offsets: np.ndarray, bits: int, values: list[np.ndarray], where: str
    ) -> None:
        """The numbers ``values`` of each thread, one behind the other, checked and noted."""
        size = bits // 8 * len(values)
        good, granules = self.allowed(run, threads, offsets, size, where, "write")
        if good is not None:
            threads, offsets, values = threads[good], offsets[good], [value[good] for value in values]
        before = self.load(offsets, bits, len(values))
        changes = np.stack([a != b for a, b in zip(before, values, strict=True)], 1)  # [accesses, values]
        if bits // 8 >= self.grain:
            changes = np.repeat(changes, bits // 8 // self.grain, 1)
        else:
            changes = changes.reshape(*granules.shape, -1).any(2)
        self.note_write(run, threads, granules, where, changes)
        view, index = self.data.view(UNSIGNED[bits]), offsets // (bits // 8)
        for i, value in enumerate(values):
            view[index + i] = value
        lost = np.any([view[index + i] != value for i, value in enumerate(values)], axis=0)
        if lost.any():
            self._report(
                self, "several threads write different values at once", run, where, threads[lost], offsets[lost]
            )

    def expect(self, granules: np.ndarray, copies: int) -> None:
        """So many asynchronous copies more (or, having landed, fewer) to ``granules``."""
        self.pending[granules] += copies
        self.any_pending = bool(copies > 0 or self.pending.any())

    def fill(self, offsets: np.ndarray, rows: np.ndarray | int, size: int) -> None:
        """Bytes ``rows[i]`` to each offset, unchecked."""
        self.data[offsets[:, None] + np.arange(size)] = rows
