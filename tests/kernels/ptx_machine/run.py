"""Some CTAs of a launch, run together: each register is one vector over all their threads.

Threads that are at the same place go on together.  Where a branch parts them, those that are furthest behind go first,
and threads that meet are one group again; so a uniform branch costs nothing and any other is right.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from .formats import UNSIGNED, bits_of
from .instruction import GLOBAL_BASE, LOCAL_BASE, SHARED_BASE, PtxError
from .memory import MEMBER_BITS, Memory
from .parser import Kernel

_POISON = {bits: UNSIGNED[bits](0xDEADBEEF_DEADBEEF & (1 << bits) - 1) for bits in UNSIGNED} | {1: np.True_}
_GUARD = 64  # bytes behind the shared memory of a CTA that nobody may touch
_CLOCK_BITS = 24  # of the barriers that it has passed


class Pending:
    """What threads have begun and not yet waited for, in groups that each of them counts for itself.

    ``finish(run, threads, *columns)`` is called for what is complete; ``columns`` are as they were issued.
    """

    def __init__(self, lanes: int, finish: Callable[..., None]) -> None:
        self.committed, self.finish = np.zeros(lanes, np.int32), finish
        self.issued: list[tuple[np.ndarray, ...]] = []
        self.where: list[str] = []

    def issue(self, threads: np.ndarray, where: str, *columns: np.ndarray) -> None:
        self.issued.append((threads, self.committed[threads], *columns))
        self.where.append(where)

    def commit(self, active: Any) -> None:
        self.committed[slice(None) if active is None else active] += 1

    def wait(self, run: "Run", active: Any, left: int | None) -> None:
        """For all but the last ``left`` groups of each active thread; None: for everything."""
        issued, places, self.issued, self.where = self.issued, self.where, [], []
        for entry, where in zip(issued, places, strict=True):
            threads, group = entry[:2]
            done = np.ones(len(threads), bool) if left is None else group < self.committed[threads] - left
            if active is not None:
                done &= active[threads]
            if done.any():
                self.finish(run, where, threads[done], *(column[done] for column in entry[2:]))
            if not done.all():
                self.issued.append(tuple(column[~done] for column in entry))
                self.where.append(where)


class Copies(Pending):
    """Asynchronous copies to shared memory: poison until the wait, a write of the waiting thread then."""

    def __init__(self, lanes: int) -> None:
        super().__init__(lanes, self._land)

    def begin(
        self, run: "Run", threads: np.ndarray, offsets: np.ndarray, data: np.ndarray, granules: np.ndarray, where: str
    ) -> None:
        """Of ``data`` ``[threads, bytes]``."""
        memory = run.shared
        memory.note_write(run, threads, granules, where)
        memory.expect(granules, 1)
        memory.fill(offsets, 0xFF, data.shape[1])
        self.issue(threads, where, offsets, data, granules)

    def _land(self, run: "Run", where: str, threads: Any, offsets: Any, data: Any, granules: Any) -> None:
        run.shared.fill(offsets, data, data.shape[1])
        run.shared.expect(granules, -1)
        run.shared.note_write(run, threads, granules, where)
        run.shared.bytes_written -= data.size  # counted when it began


class Run:
    """CTAs ``first`` and following, whose indices in the grid are ``places``.

    ``registers`` by number, ``special`` registers and parameters by name.
    """

    def __init__(
        self,
        kernel: Kernel,
        parameters: dict[str, Any],
        grid: tuple[int, int, int],
        first: int,
        places: list[tuple[int, int, int]],
        memory: Memory,
        shared_bytes: int,
        report: Callable[..., None],
    ) -> None:
        self.kernel, self.memory, self.places, self.report = kernel, memory, places, report
        self.threads = kernel.threads
        self.lanes = lanes = len(places) * kernel.threads
        self.all = np.arange(lanes)
        self.cta = first + self.all // kernel.threads
        warp = (first * kernel.threads + self.all) // 32
        shift, clock = MEMBER_BITS["CTA"], _CLOCK_BITS  # see ``memory.Order``: barriers are counted in the bits between
        self.keys = {
            "launch": self.cta.astype(np.uint64),
            "CTA": (self.cta << clock << shift | warp % (kernel.threads // 32)).astype(np.uint64),
            "warp": (warp << clock << shift | self.all % 32).astype(np.uint64),
        }
        self._key_tables: dict[tuple[str, ...], np.ndarray] = {}
        self.stride = -(-shared_bytes // 16) * 16 + _GUARD
        self.shared = Memory("shared", self.stride * len(places), kernel.grain["shared"], report, ("CTA", "warp"))
        self.shared.valid.reshape(len(places), -1)[:, : shared_bytes // self.shared.grain] = True
        self.stack = Memory("stack", kernel.local * lanes, 1, report)
        self.stack.valid[: kernel.local * lanes] = True
        self.copies = Copies(lanes)
        self.products = Pending(lanes, _check_operands)
        self.executed: Counter[str] = Counter()
        self.special = self._special_registers(grid) | parameters
        poison = {bits: np.full(lanes, number) for bits, number in _POISON.items()}
        self.registers = [poison[bits_of(kind)] for kind in kernel.kinds]  # shared: steps replace registers

    def _special_registers(self, grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        thread = (self.all % self.threads).astype(np.uint32)
        lane, one = thread & np.uint32(31), np.ones(self.lanes, np.uint32)
        special = {"%laneid": lane, "%warpid": thread >> np.uint32(5), "%lanemask_lt": (one << lane) - one}
        for axis, letter in enumerate("xyz"):
            place = np.array([place[axis] for place in self.places], np.uint32)
            special[f"%ctaid.{letter}"] = np.repeat(place, self.threads)
            special[f"%nctaid.{letter}"] = one * np.uint32(grid[axis])
            special[f"%tid.{letter}"] = one * np.uint32(0) if axis else thread
            special[f"%ntid.{letter}"] = one if axis else one * np.uint32(self.threads)
        return special

    def locate(self, space: str, addresses: Any, threads: np.ndarray) -> tuple[Memory, np.ndarray]:
        """The memory, and the offsets in it of the addresses that ``threads`` have; -1 for none."""
        addresses = np.broadcast_to(addresses, self.lanes)[threads]
        if space == "global":
            return self.memory, addresses - GLOBAL_BASE
        if space == "local":
            return self.stack, _within(addresses - LOCAL_BASE, self.kernel.local, threads)
        return self.shared_at(addresses, threads)

    def shared_at(self, addresses: np.ndarray, threads: np.ndarray) -> tuple[Memory, np.ndarray]:
        """The same in shared memory, for one address of each of ``threads``."""
        return self.shared, _within(addresses - SHARED_BASE, self.stride, threads // self.threads)

    def whole_warps(self, active: Any, where: str) -> np.ndarray:
        """Numbers of the active warps.

        Raises:
            PtxError: a part of a warp is somewhere else.
        """
        if active is None:
            return np.arange(self.lanes // 32)
        threads = active.reshape(-1, 32)
        warps = threads.all(1)
        if (threads.any(1) != warps).any():
            raise PtxError(f"a part of a warp is somewhere else: {where}")
        return np.flatnonzero(warps)

    def pass_barrier(self, active: Any, level: str) -> None:
        """Of the threads' warp or CTA: what comes is ordered behind what was."""
        for key in ("CTA", "warp") if level == "CTA" else ("warp",):
            self.keys[key][slice(None) if active is None else active] += np.uint64(1 << MEMBER_BITS[key])
        self._key_tables.clear()

    def keys_of(self, threads: np.ndarray, levels: tuple[str, ...]) -> np.ndarray:
        """Their keys, ``[levels, threads, 1]``; see ``memory.Order``."""
        if levels not in self._key_tables:
            keys = [self.keys[level] for level in levels]
            self._key_tables[levels] = np.stack(keys) if keys else np.zeros((0, self.lanes), np.uint64)
        return self._key_tables[levels].take(threads, 1)[:, :, None]

    def execute(self) -> None:
        """Run all threads to their end."""
        with np.errstate(all="ignore"):  # infinity and NaN are numbers here
            _Schedule(self).run()


def _within(inside: np.ndarray, size: int, owner: np.ndarray) -> np.ndarray:
    """Offsets in a memory of which each owner has ``size`` bytes; -1 where ``inside`` is not in its part."""
    return np.where((inside < 0) | (inside >= size), -1, owner * size + inside)


def _check_operands(run: Run, where: str, threads: Any, offsets: Any, values: Any) -> None:
    """What a product of four warps reads must not change before it has been waited for; it was read at once."""
    changed = run.shared.load(offsets, 16, 1)[0] != values
    if changed.any():
        run.report(run.shared, "write to what a product still reads", run, where, threads[changed], offsets[changed])


class _Schedule:
    """Which threads of a run are where: ``groups`` by segment, None for all threads."""

    def __init__(self, run: Run) -> None:
        self.current = run
        self.groups: dict[int, Any] = {0: None}
        self.gone, self.waiting = np.zeros(run.lanes, bool), np.zeros(run.lanes, bool)
        self.resume = np.zeros(run.lanes, np.int32)

    def join(self, segment: int, threads: Any) -> None:
        """``threads`` go on at ``segment``."""
        if segment in self.groups and threads is not None:
            threads = threads | self.groups[segment]
        self.groups[segment] = None if threads is None or threads.all() else threads

    def run(self) -> None:
        run = self.current
        visits: Counter[int] = Counter()
        while self.groups:
            number = min(self.groups)
            active = self.groups.pop(number)
            segment = run.kernel.segments[number]
            for i, step in enumerate(segment.steps):
                try:
                    step(run, active)
                except PtxError:
                    raise
                except Exception as error:
                    raise PtxError(f"{type(error).__name__} ({error}) in {segment.places[i]}") from error
            visits[number] += run.lanes if active is None else int(active.sum())
            getattr(self, f"_{segment.end}")(number, segment, active)
        for number, threads in visits.items():
            for opcode, count in run.kernel.segments[number].opcodes.items():
                run.executed[opcode] += count * threads
        for bad, kind in (
            (self.waiting, "thread at a barrier that others never reach"),
            (
                np.isin(run.all, [t for entry in run.copies.issued for t in entry[0]]),
                "asynchronous copy never waited for",
            ),
        ):
            if bad.any():
                threads = np.flatnonzero(bad)
                run.report(run.shared, kind, run, run.kernel.name, threads, np.zeros(len(threads), np.int64))

    def _next(self, number: int, segment: Any, active: Any) -> None:
        self.join(number + 1, active)

    def _branch(self, number: int, segment: Any, active: Any) -> None:
        if segment.guard is None:
            self.join(segment.target, active)
            return
        taken = np.broadcast_to(segment.guard(self.current), self.current.lanes)
        taken = taken if active is None else taken & active
        stays = ~taken if active is None else active & ~taken
        if taken.any():
            self.join(segment.target, taken if stays.any() else active)
        if stays.any():
            self.join(number + 1, stays if taken.any() else active)

    def _return(self, number: int, segment: Any, active: Any) -> None:
        here = np.ones(self.current.lanes, bool) if active is None else active
        leaves = here if segment.guard is None else here & segment.guard(self.current)
        self.gone |= leaves
        if (here & ~leaves).any():
            self.join(number + 1, here & ~leaves)
        self._release()

    def _barrier(self, number: int, segment: Any, active: Any) -> None:
        if active is None:
            self.current.pass_barrier(None, "CTA")
            self.groups[number + 1] = None
            return
        self.waiting |= active
        self.resume[active] = number + 1
        self._release()

    def _release(self) -> None:
        """CTAs go on whose threads have all come to the barrier or to their end."""
        run = self.current
        if not self.waiting.any():
            return
        complete = (self.waiting | self.gone).reshape(-1, run.threads).all(1)
        free = np.repeat(complete, run.threads) & self.waiting
        if free.any():
            self.waiting &= ~free
            run.pass_barrier(free, "CTA")
            for segment in np.unique(self.resume[free]):
                self.join(int(segment), free & (self.resume == segment))
