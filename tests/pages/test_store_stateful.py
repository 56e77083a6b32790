"""Random lives of a store and its forks, against dense tensors; the policy "exact" has to return every bit."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from stores import live_pages, make_store

from kvquant_hf.pages.store import PagedStore

PAGE = 8
HEADS, KEY_DIM, VALUE_DIM = 2, 4, 3


class StoreMachine(RuleBasedStateMachine):
    """Up to four stores that share one pool; each beside what it should hold, ``(keys, values)``."""

    def __init__(self) -> None:
        super().__init__()
        self.stores: list[tuple[PagedStore, torch.Tensor, torch.Tensor]] = []
        self.count = 0.0

    def fresh(self, batch: int, tokens: int, dim: int) -> torch.Tensor:
        """Numbers that were never used before, exact in float32."""
        x = torch.arange(batch * HEADS * tokens * dim, dtype=torch.float32) + self.count
        self.count += x.numel()
        return x.reshape(batch, tokens, HEADS, dim).transpose(1, 2)

    def replace(self, i: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.stores[i] = (self.stores[i][0], keys, values)

    @initialize(batch=st.integers(1, 3))
    def start(self, batch: int) -> None:
        keys, values = self.fresh(batch, 0, KEY_DIM), self.fresh(batch, 0, VALUE_DIM)
        self.stores = [(make_store("exact", keys, values, PAGE), keys, values)]

    def draw(self, data: st.DataObject) -> tuple[int, PagedStore, torch.Tensor, torch.Tensor]:
        i = data.draw(st.integers(0, len(self.stores) - 1), label="store")
        return i, *self.stores[i]

    @rule(data=st.data(), tokens=st.sampled_from([0, 1, 1, 2, 3, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 2]))
    def append(self, data: st.DataObject, tokens: int) -> None:
        i, store, keys, values = self.draw(data)
        new = self.fresh(store.batch_size, tokens, KEY_DIM), self.fresh(store.batch_size, tokens, VALUE_DIM)
        store.append(*new)
        self.replace(i, torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2))

    @rule(data=st.data(), count=st.integers(0, 3 * PAGE))
    def crop(self, data: st.DataObject, count: int) -> None:
        i, store, keys, values = self.draw(data)
        reopened, tail = store.reopened_pages, store.tail_length
        store.crop(count)
        kept = max(0, keys.shape[2] - count)
        self.replace(i, keys[:, :, :kept], values[:, :, :kept])
        cut = count > tail and kept % PAGE > 0
        assert store.reopened_pages - reopened == (store.batch_size if cut else 0)

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        i, store, keys, values = self.draw(data)
        rows = data.draw(st.lists(st.integers(0, store.batch_size - 1), min_size=1, max_size=4), label="rows")
        store.select(torch.tensor(rows))
        self.replace(i, keys[rows], values[rows])

    @precondition(lambda self: len(self.stores) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        _, store, keys, values = self.draw(data)
        self.stores.append((store.fork(), keys, values))

    @precondition(lambda self: len(self.stores) > 1)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        self.stores.pop(data.draw(st.integers(0, len(self.stores) - 1), label="forgotten"))

    @rule(data=st.data())
    def clear(self, data: st.DataObject) -> None:
        i, store, keys, values = self.draw(data)
        store.clear()
        self.replace(i, keys[:, :, :0], values[:, :, :0])

    @invariant()
    def content_is_exact(self) -> None:
        for store, keys, values in self.stores:
            view = store.view()
            assert store.length == keys.shape[2] and view.page_table.shape == (keys.shape[0], store.sealed_pages)
            assert torch.equal(view.dense("keys"), keys) and torch.equal(view.dense("values"), values)

    @invariant()
    def every_page_is_counted_once_per_holder(self) -> None:
        if not self.stores:
            return
        pool = self.stores[0][0].pool
        tables = [store.page_table.flatten() for store, _, _ in self.stores]
        assert all(store.pool is pool for store, _, _ in self.stores)
        pages, holders = torch.cat(tables).unique(return_counts=True)
        assert pool.used == len(pages) == len(live_pages(*(store for store, _, _ in self.stores)))
        assert pool.references(pages.numpy()).tolist() == holders.tolist()
        assert pool.nbytes == pool.capacity * pool.page_bytes and (pool.used > 0 or pool.nbytes == 0)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=80, stateful_step_count=25, deadline=None, derandomize=True)
