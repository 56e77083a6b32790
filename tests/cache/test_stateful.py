"""Random lives of caches and their forks against a dense model of them; every page accounted for after every step.

What is expected of a token: itself as long as its page is open, and what the codecs make of its whole page afterwards.
A crop into a sealed page takes the decoded tokens for the new truth.  Some caches are offloaded: the CPU poses as a
device with a memory of its own, and pages are away or there as it comes.  About 2,000 steps usually; the test marked
``full`` makes 100,000.
"""

import copy
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from models import tiny_llama
from stores import live_pages

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.pages.offload import HostCopy
from kvquant_hf.policies.table import POLICIES
from kvquant_hf.triton_kernels.codecs import CODECS, Codec

PAGE, HEADS, DIM, LAYERS = 8, 2, 32, 2
CONFIG = tiny_llama(num_hidden_layers=LAYERS).config
Layers = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each layer, [batch, heads, tokens, head_dim]


class Dense(NamedTuple):
    """What a cache was given, and how many tokens of it are in sealed pages."""

    layers: Layers
    sealed: int = 0

    @property
    def batch(self) -> int:
        return self.layers[0][0].shape[0]

    @property
    def tokens(self) -> int:
        return self.layers[0][0].shape[2]


def through(codec: Codec, x: torch.Tensor, sealed: int, sinks: int) -> torch.Tensor:
    """Tokens ``[batch, heads, tokens, head_dim]`` as a store gives them back: the first ``sealed`` encoded, all but the
    first ``sinks``, in place of which their page holds the next one."""
    if not sealed:
        return x
    pages = torch.cat([x[:, :, sinks : sinks + 1].expand(-1, -1, sinks, -1), x[:, :, sinks:sealed]], 2)
    decoded = codec.decode(codec.encode(pages.unflatten(2, (-1, PAGE)))).flatten(2, 3)
    return torch.cat([x[:, :, :sinks], decoded[:, :, sinks:], x[:, :, sealed:]], 2)


class CacheMachine(RuleBasedStateMachine):
    """Up to four caches that share their pools, each beside a dense model of what it holds."""

    policies = ("exact", "int8", "turboquant")

    def __init__(self) -> None:
        super().__init__()
        self.caches: list[tuple[QuantizedPagedCache, Dense]] = []
        self.seed = 0
        self.folder = tempfile.TemporaryDirectory()
        self.apart = patch.object(HostCopy, "helps", staticmethod(lambda device: True))
        self.apart.start()

    def teardown(self) -> None:
        self.apart.stop()
        self.folder.cleanup()

    def fresh(self, batch: int, tokens: int) -> torch.Tensor:
        self.seed += 1
        return torch.randn(batch, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(self.seed))

    @initialize(data=st.data(), batch=st.integers(1, 3), offload=st.booleans(), sinks=st.integers(0, 2))
    def start(self, data: st.DataObject, batch: int, offload: bool, sinks: int) -> None:
        self.policy = data.draw(st.sampled_from(self.policies))
        self.codecs = CODECS[POLICIES[self.policy].keys], CODECS[POLICIES[self.policy].values]
        cache = QuantizedPagedCache(CONFIG, self.policy, page_size=PAGE, offload=offload, sinks=sinks)
        self.sinks = sinks
        self.caches = [(cache, self.empty(batch))]
        self.append_to(0, 1)

    def empty(self, batch: int) -> Dense:
        return Dense([(self.fresh(batch, 0), self.fresh(batch, 0)) for _ in range(LAYERS)])

    def draw(self, data: st.DataObject) -> tuple[int, QuantizedPagedCache, Dense]:
        i = data.draw(st.integers(0, len(self.caches) - 1), label="cache")
        return i, *self.caches[i]

    def replace(self, i: int, dense: Dense) -> None:
        self.caches[i] = (self.caches[i][0], dense)

    def append_to(self, i: int, tokens: int) -> None:
        cache, dense = self.caches[i]
        grown: Layers = []
        for layer, held in enumerate(dense.layers):
            new = [self.fresh(x.shape[0], tokens) for x in held]
            cache.update(*new, layer)
            grown.append(tuple(torch.cat(pair, 2) for pair in zip(held, new, strict=True)))
        # The first token that does not fit seals a page; a crop to a page's end leaves it sealed.
        self.replace(i, Dense(grown, max(dense.sealed, (dense.tokens + tokens - 1) // PAGE * PAGE)))

    def take(self, i: int, rows: torch.Tensor) -> None:
        dense = self.caches[i][1]
        self.replace(i, dense._replace(layers=[(keys[rows], values[rows]) for keys, values in dense.layers]))

    @rule(data=st.data(), tokens=st.sampled_from([1, 1, 2, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 2]))
    def append(self, data: st.DataObject, tokens: int) -> None:
        self.append_to(self.draw(data)[0], tokens)

    @rule(data=st.data(), count=st.integers(1, 3 * PAGE))
    def crop(self, data: st.DataObject, count: int) -> None:
        i, cache, dense = self.draw(data)
        kept = max(0, dense.tokens - count)
        # A page that is cut comes back decoded, and what came back is the truth from then on: to decode it here would
        # sum in another order.
        reopened = kept % PAGE > 0 and kept < dense.sealed
        first = kept // PAGE * PAGE if reopened else kept
        cache.crop(-count)
        cut: Layers = []
        for layer, pair in enumerate(dense.layers):
            parts = []
            for name, codec, x in zip(("keys", "values"), self.codecs, pair, strict=True):
                part = x[:, :, :kept]
                if reopened:
                    open_page = cache.paged_layers[layer].store.view().dense(name)[:, :, first:]
                    expected = through(codec, x, dense.sealed, self.sinks)[:, :, first:kept]
                    torch.testing.assert_close(open_page, expected, rtol=1e-5, atol=1e-5)
                    part = torch.cat([x[:, :, :first], open_page], 2)
                parts.append(part)
            cut.append(tuple(parts))
        self.replace(i, Dense(cut, min(dense.sealed, kept // PAGE * PAGE)))

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        i, cache, dense = self.draw(data)
        rows = torch.tensor(data.draw(st.permutations(range(dense.batch)), label="rows"))
        cache.reorder_cache(rows)
        self.take(i, rows)

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        i, cache, dense = self.draw(data)
        rows = torch.tensor(data.draw(st.lists(st.integers(0, dense.batch - 1), min_size=1, max_size=3), label="rows"))
        cache.batch_select_indices(rows)
        self.take(i, rows)

    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        i, cache, dense = self.draw(data)
        if dense.batch <= 3:
            cache.batch_repeat_interleave(2)
            self.take(i, torch.arange(dense.batch).repeat_interleave(2))

    @precondition(lambda self: len(self.caches) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        _, cache, dense = self.draw(data)
        self.caches.append((copy.deepcopy(cache), dense))

    @precondition(lambda self: len(self.caches) > 1)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        self.caches.pop(data.draw(st.integers(0, len(self.caches) - 1), label="forgotten"))

    @rule(data=st.data(), batch=st.integers(1, 3))
    def reset(self, data: st.DataObject, batch: int) -> None:
        i, cache, _ = self.draw(data)
        cache.reset()
        self.replace(i, self.empty(batch))
        self.append_to(i, 1)

    @rule(data=st.data(), offload=st.booleans())
    def save_and_load(self, data: st.DataObject, offload: bool) -> None:
        i, cache, dense = self.draw(data)
        path = Path(self.folder.name) / "cache.safetensors"
        cache.save(path)
        self.caches[i] = (QuantizedPagedCache.load(path, CONFIG, offload=offload), dense)

    @precondition(lambda self: any(cache.pools.offload for cache, _ in self.caches))
    @rule(data=st.data(), layer=st.integers(0, LAYERS - 1), leave=st.booleans())
    def move_pages(self, data: st.DataObject, layer: int, leave: bool) -> None:
        movable = [i for i, (cache, _) in enumerate(self.caches) if cache.pools.offload]
        moved = self.caches[data.draw(st.sampled_from(movable), label="cache")][0].paged_layers[layer]
        moved.offload() if leave else moved.prefetch()
        if moved.store is not None and moved.store.sealed_pages:
            assert moved.store.pool.away == leave
            assert (moved.store.pool.device_bytes == 0) == leave

    @invariant()
    def content_is_what_it_should_be(self) -> None:
        for cache, dense in self.caches:
            assert cache.get_seq_length() == dense.tokens
            for layer, held in enumerate(dense.layers):
                store = cache.paged_layers[layer].store
                if store is None or dense.tokens == 0:
                    assert dense.tokens == 0
                    continue
                assert store.sealed_pages * PAGE == dense.sealed
                away = store.pool.away
                for name, codec, x in zip(("keys", "values"), self.codecs, held, strict=True):
                    expected = through(codec, x, dense.sealed, self.sinks)
                    tail = store.tail_length
                    got = store.view().dense(name)
                    assert torch.equal(got[:, :, got.shape[2] - tail :], expected[:, :, got.shape[2] - tail :])
                    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
                if away:  # reading brought them
                    store.pool.offload()

    @invariant()
    def every_page_is_counted_once_per_holder(self) -> None:
        for layer in range(LAYERS):
            stores = [store for cache, _ in self.caches if (store := cache.paged_layers[layer].store) is not None]
            for pool in {id(store.pool): store.pool for store in stores}.values():
                sharing = [store for store in stores if store.pool is pool]
                tables = torch.cat([store.page_table.flatten() for store in sharing])
                pages, holders = tables.unique(return_counts=True)
                assert pool.used == len(pages) == len(live_pages(*sharing))
                assert pool.references(pages.numpy()).tolist() == holders.tolist()
                assert pool.nbytes == pool.capacity * pool.page_bytes


TestCaches = CacheMachine.TestCase
TestCaches.settings = settings(max_examples=60, stateful_step_count=34, deadline=None, derandomize=True)


@pytest.mark.full
def test_a_hundred_thousand_steps() -> None:
    run_state_machine_as_test(CacheMachine, settings=settings(max_examples=2000, stateful_step_count=50, deadline=None))
