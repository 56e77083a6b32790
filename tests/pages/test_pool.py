"""PagePool: every page is either free or held, grows by little, keeps its content, and is given back."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvquant_hf.errors import OutOfPages
from kvquant_hf.pages import pool as pool_module
from kvquant_hf.pages.budget import Budget
from kvquant_hf.pages.pool import PagePool

PLANES = [(torch.uint8, (2, 4, 3)), (torch.float16, (2, 5)), (torch.float32, (1,))]
PAGE_BYTES = 24 * 1 + 10 * 2 + 1 * 4


def make_pool() -> PagePool:
    return PagePool(PLANES, torch.device("cpu"))


def write(pool: PagePool, pages: np.ndarray, marks: list[int]) -> None:
    """Write a number below 250, different for every caller, all over each page."""
    for page, mark in zip(pages.tolist(), marks, strict=True):
        for plane in pool.planes:
            plane[page] = mark


def read(pool: PagePool, page: int) -> set[float]:
    """All numbers that a page holds."""
    return set().union(*(plane[page].double().unique().tolist() for plane in pool.planes))


def measured_bytes(pool: PagePool) -> int:
    return sum(plane.numel() * plane.element_size() for plane in pool.planes)


def test_empty_pool_holds_nothing() -> None:
    pool = make_pool()
    assert (pool.capacity, pool.used, pool.nbytes, pool.page_bytes) == (0, 0, 0, PAGE_BYTES)
    assert pool.allocate(0).shape == (0,) and pool.capacity == 0
    pool.release(np.zeros(0, dtype=np.int32))
    assert pool.capacity == 0


@pytest.mark.parametrize("count", [1, 7, 64, 65, 1000])
def test_bulk_allocation_is_exact_and_ascending(count: int) -> None:
    pool = make_pool()
    pages = pool.allocate(count)
    assert pages.dtype == np.int32 and pages.tolist() == list(range(count))
    assert pool.capacity == pool.used == count
    assert pool.nbytes == measured_bytes(pool) == count * PAGE_BYTES
    assert (pool.references(pages) == 1).all()


def test_growth_by_single_pages_stays_within_its_fraction() -> None:
    pool = make_pool()
    moves, capacity = 0, 0
    for used in range(1, 1500):
        pool.allocate(1)
        assert pool.used == used
        moves, capacity = moves + (pool.capacity != capacity), pool.capacity
        # One page, or 1/32 of what there was: never more than 3.2 % of the pool is idle.
        assert pool.capacity - used <= max(0, used // 32)
        assert pool.nbytes == measured_bytes(pool) == pool.capacity * PAGE_BYTES
    # Up to 64 pages every page is a growth; then log(1500 / 64) / log(33 / 32) = 103 growths, plus rounding down.
    assert moves <= 64 + 103 + 20


def test_growth_past_free_pages_uses_them_first() -> None:
    pool = make_pool()
    pages = pool.allocate(10)
    pool.release(pages[2:5])
    assert (pool.capacity, pool.used) == (10, 7)
    assert pool.allocate(4).tolist() == [2, 3, 4, 10]
    assert (pool.capacity, pool.used) == (11, 11)


def test_released_pages_come_back_lowest_first() -> None:
    pool = make_pool()
    pages = pool.allocate(8)
    pool.release(pages[[6, 1, 3]])
    assert pool.allocate(2).tolist() == [1, 3]
    pool.release(pages[[0, 7]])
    assert pool.allocate(3).tolist() == [0, 6, 7]


def test_content_survives_growth() -> None:
    pool = make_pool()
    first = pool.allocate(3)
    write(pool, first, [11, 22, 33])
    pool.allocate(200)
    assert [read(pool, page) for page in first.tolist()] == [{11}, {22}, {33}]
    # What nobody wrote is still the poison of conftest.py: growing copied exactly the old pages.
    assert all(bool(plane[3:].isnan().all()) for plane in pool.planes if plane.is_floating_point())


def test_retain_and_release_count_every_occurrence() -> None:
    pool = make_pool()
    pages = pool.allocate(2)
    pool.retain(np.array([[0, 0], [1, 0]]))
    assert pool.references(pages).tolist() == [4, 2]
    pool.release(np.array([0, 1, 0]))
    assert pool.references(pages).tolist() == [2, 1] and pool.used == 2
    pool.release(np.array([[0, 0]]))
    assert pool.references(pages).tolist() == [0, 1] and pool.used == 1


@pytest.mark.parametrize("again", [[0], [1, 0], [0, 2, 2]], ids=str)
def test_double_release_raises_and_changes_nothing(again: list[int]) -> None:
    pool = make_pool()
    pages = pool.allocate(3)
    pool.release(pages[:1])
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(np.array(again, dtype=np.int32))
    assert pool.references(pages).tolist() == [0, 1, 1] and pool.used == 2
    assert pool.allocate(2).tolist() == [0, 3]


def test_emptied_pool_gives_its_memory_back() -> None:
    pool = make_pool()
    pages = pool.allocate(100)
    pool.release(pages[:99])
    assert pool.nbytes == 100 * PAGE_BYTES
    pool.release(pages[99:])
    assert (pool.capacity, pool.used, pool.nbytes) == (0, 0, 0)
    assert sum(plane.untyped_storage().nbytes() for plane in pool.planes) == 0
    assert [(plane.dtype, tuple(plane.shape[1:])) for plane in pool.planes] == PLANES
    assert pool.allocate(2).tolist() == [0, 1] and pool.nbytes == 2 * PAGE_BYTES


def test_claimed_pages_are_for_the_claimer() -> None:
    budget = Budget(max_bytes=10 * PAGE_BYTES)
    first, second = (PagePool(PLANES, torch.device("cpu"), budget) for _ in range(2))
    first.allocate(3)
    claim = budget.claim({first: 2, second: 4})
    assert budget.promised_bytes == 6 * PAGE_BYTES
    with pytest.raises(OutOfPages, match=r"needs 2 more pages \(96 bytes\) in 1 layers and 48 bytes of max_bytes=480"):
        second.allocate(2)
    assert second.capacity == 0 and second.allocate(1).tolist() == [0]
    assert second.allocate(4, claim).tolist() == [1, 2, 3, 4]
    with pytest.raises(OutOfPages):
        first.allocate(1)
    claim.close()
    assert budget.promised_bytes == 0 and first.allocate(2).tolist() == [3, 4]
    second.release(np.arange(5))  # an emptied pool gives its bytes back to all
    assert first.allocate(5).tolist() == [5, 6, 7, 8, 9] and first.nbytes == budget.max_bytes
    forgotten = budget.claim({first: 0})
    del forgotten
    assert budget.promised_bytes == 0


class PoolMachine(RuleBasedStateMachine):
    """A pool against a dict of page -> [references, content]."""

    most = 150

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PLANES, torch.device("cpu"), Budget(max_bytes=self.most * PAGE_BYTES + 5))
        self.model: dict[int, list[int]] = {}
        self.mark = 0

    def pick(self, data: st.DataObject, most: int) -> np.ndarray:
        """Some held pages, with repetitions up to ``most``."""
        pages = data.draw(st.lists(st.sampled_from(sorted(self.model)), min_size=1, max_size=most))
        return np.array(pages, dtype=np.int32)

    @rule(count=st.integers(0, 90))
    def allocate(self, count: int) -> None:
        before, held = self.pool.capacity, len(self.model)
        if held + count > self.most:
            with pytest.raises(OutOfPages):
                self.pool.allocate(count)
            assert self.pool.capacity == before
            return
        pages = self.pool.allocate(count)
        assert len(set(pages.tolist())) == count and not self.model.keys() & set(pages.tolist())
        marks = [(self.mark + i) % 250 for i in range(count)]
        self.mark += count
        write(self.pool, pages, marks)
        self.model |= {page: [1, mark] for page, mark in zip(pages.tolist(), marks, strict=True)}
        # It grew only if it had to, and then by 1/32 or to what was needed.
        assert self.pool.capacity <= max(before, held + count, (before + before // 32) * (held + count > before))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        pages = self.pick(data, 8)
        self.pool.retain(pages)
        for page in pages.tolist():
            self.model[page][0] += 1

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = self.pick(data, 8)
        wanted = {page: pages.tolist().count(page) for page in pages.tolist()}
        if any(times > self.model[page][0] for page, times in wanted.items()):
            with pytest.raises(AssertionError):
                self.pool.release(pages)
            return
        self.pool.release(pages)
        for page, times in wanted.items():
            self.model[page][0] -= times
            if not self.model[page][0]:
                del self.model[page]

    @precondition(lambda self: self.model)
    @rule()
    def release_all(self) -> None:
        self.pool.release(np.repeat(list(self.model), [references for references, _ in self.model.values()]))
        self.model.clear()

    @invariant()
    def same_pages_same_references_same_content(self) -> None:
        held = np.array(sorted(self.model), dtype=np.int64)
        assert self.pool.used == len(held) and self.pool.capacity <= self.most
        assert self.pool.references(held).tolist() == [self.model[page][0] for page in held.tolist()]
        assert self.pool.nbytes == measured_bytes(self.pool) == self.pool.capacity * PAGE_BYTES
        expected = torch.tensor([self.model[page][1] for page in held.tolist()])
        for plane in self.pool.planes:
            content = plane[torch.from_numpy(held)].flatten(1)
            assert torch.equal(content.double(), expected.double().unsqueeze(1).expand(content.shape))

    @invariant()
    def empty_means_no_memory(self) -> None:
        assert self.model or self.pool.nbytes == 0


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None, derandomize=True)


def test_large_planes_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """They grow, are copied and are given back as others are."""
    monkeypatch.setattr(pool_module, "_MAPPED_BYTES", 1)
    pool = make_pool()
    pages = pool.allocate(5)
    write(pool, pages, [1, 2, 3, 4, 5])
    held = pool.planes
    write(pool, pool.allocate(300), [7] * 300)
    assert pool.capacity == 305 and pool.nbytes == measured_bytes(pool) == 305 * PAGE_BYTES
    twin = pickle.loads(pickle.dumps(pool))
    for copied in (pool, twin):
        assert [read(copied, page) for page in pages.tolist()] == [{1.0}, {2.0}, {3.0}, {4.0}, {5.0}]
    assert held[0][0].eq(1).all(), "a plane that somebody still has is still there"
    pool.release(np.arange(305))
    assert pool.nbytes == 0 and read(twin, 304) == {7.0}


GROWTH = """
import torch
from kvquant_hf.pages.pool import PagePool

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

planes = [(torch.uint8, (3, 64, 64)), (torch.float16, (3, 64))]
pools = [PagePool(planes, torch.device("cpu")) for _ in range(12)]
before = resident()
for _ in range(200):
    for pool in pools:
        for page in pool.allocate(2):
            for plane in pool.planes:
                plane[page] = 1
print((resident() - before) / sum(pool.nbytes for pool in pools))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says what a process has")
def test_a_process_grows_by_little_more_than_its_pools() -> None:
    """Layers that grow in turn, as in a model, leave no holes in the heap that no later plane fits into."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.15
