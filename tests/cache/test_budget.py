"""Budgets and shared pools: a step is taken in all layers or in none, and no page is lost or freed twice."""

import copy
import gc
import io
import json
import re
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from models import DECODERS, prompt, tiny_gemma2, tiny_llama
from stores import chunks, logical_planes
from transformers import DynamicCache, PreTrainedModel

from kvquant_hf import Int8PagedCache, PagePools, QuantizedPagedCache, errors
from kvquant_hf.transformers_api.names import with_cache

PAGE = 16
GREEDY = {"do_sample": False}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama()


def forward(model: PreTrainedModel, cache: Any, ids: torch.Tensor, chunk: int = 1 << 30) -> torch.Tensor:
    with torch.no_grad():
        parts = [model(ids[:, part], **with_cache(cache)).logits for part in chunks(ids.shape[1], chunk)]
    return torch.cat(parts, 1)


def state(cache: QuantizedPagedCache) -> list[Any]:
    """Everything that a refused step must not change, in layers of any kind."""
    paged = [
        (store.version, store.length, store.pool.used, store.pool.capacity, *map(bytes, map(np.asarray, parts)))
        for store in cache.stores
        for parts in [logical_planes(store)]
    ]
    others = [
        (layer.get_seq_length(), layer.is_initialized, None if layer.keys is None else layer.keys.tolist())
        for layer in cache.layers
        if layer not in cache.paged_layers
    ]
    return [paged, others]


def check_accounts(pools: PagePools, *caches: QuantizedPagedCache) -> None:
    """References are those of the tables, nothing is promised between steps, and the bound holds."""
    gc.collect()
    budget, held = pools.budget, 0
    for pool in budget.pools:
        tables = [store.page_table.flatten() for cache in caches for store in cache.stores if store.pool is pool]
        pages, counts = torch.cat(tables).unique(return_counts=True) if tables else (torch.empty(0), torch.empty(0))
        assert pool.used == len(pages)
        assert pool.references(pages.long().numpy()).tolist() == counts.tolist()
        assert budget.max_pages is None or pool.capacity <= budget.max_pages
        held += pool.nbytes
    assert budget.promised_bytes == 0
    assert budget.max_bytes is None or held <= budget.max_bytes


def row_bytes(model: PreTrainedModel, policy: str = "int4", **options: Any) -> int:
    """Bytes of one page in every paged layer."""
    cache = QuantizedPagedCache(model.config, policy, page_size=PAGE, **options)
    forward(model, cache, prompt(1, PAGE + 1))
    return sum(store.pool.page_bytes for store in cache.stores)


# -- one cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["max_pages", "max_bytes"])
@pytest.mark.parametrize("batch", [1, 3])
def test_generate_until_out_of_pages(unit: str, batch: int, model: PreTrainedModel) -> None:
    """The cache then has the tokens of the last finished step, and can go on after a crop or with more."""
    pages = 5 * batch
    amount = pages if unit == "max_pages" else pages * row_bytes(model) + 7
    cache = QuantizedPagedCache(model.config, "int4", page_size=PAGE, **{unit: amount})
    ids = prompt(batch, 40)
    with pytest.raises(errors.OutOfPages) as caught:
        model.generate(ids, **with_cache(cache), max_new_tokens=200, **GREEDY)
    assert isinstance(caught.value, MemoryError) and isinstance(caught.value, errors.KVQuantError)
    message = str(caught.value)
    assert "\n" not in message and f"needs {batch if unit == 'max_pages' else 3 * batch} more pages" in message
    assert unit in message and re.search(r"reset or crop a cache, or allow more \w+\.$", message)
    # Five pages are sealed, and the open page is full: one token more would have to seal it.
    assert [layer.length for layer in cache.layers] == [6 * PAGE] * 3
    assert {store.pool.used for store in cache.stores} == {store.pool.capacity for store in cache.stores} == {pages}
    check_accounts(cache.pools, cache)

    unbounded = QuantizedPagedCache(model.config, "int4", page_size=PAGE)
    expected = model.generate(ids, **with_cache(unbounded), max_new_tokens=6 * PAGE - 40 + 1, **GREEDY)
    reference = QuantizedPagedCache(model.config, "int4", page_size=PAGE)
    full = expected[:, : 6 * PAGE]
    forward(model, reference, full[:, :40])
    forward(model, reference, full[:, 40:], 1)
    assert [logical_planes(s)[0].tolist() for s in cache.stores] == [
        logical_planes(s)[0].tolist() for s in reference.stores
    ]
    before = state(cache)
    with pytest.raises(errors.OutOfPages):
        forward(model, cache, full[:, -1:])
    assert state(cache) == before
    cache.crop(-3)
    reference.crop(-3)
    again = full[:, -3:]
    assert torch.equal(forward(model, cache, again, 1), forward(model, reference, again, 1))
    twice = 2 * amount
    cache.pools.budget.max_pages, cache.pools.budget.max_bytes = (twice, None) if unit == "max_pages" else (None, twice)
    more = prompt(batch, 5 * PAGE, seed=1)
    assert torch.equal(forward(model, cache, more, 7), forward(model, reference, more, 7))
    check_accounts(cache.pools, cache)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen2"])
@pytest.mark.parametrize("unit", ["max_pages", "max_bytes"])
def test_refused_prompt_leaves_an_empty_cache(name: str, unit: str) -> None:
    """On new pools a page's size is not known before its first keys: the layers before the refused one are undone."""
    model = DECODERS[name]()
    amount = 4 if unit == "max_pages" else 4 * row_bytes(model, sliding="exact")
    # Gemma2 with layers that are not paged: they are to be as they were, too.
    options = {"page_size": PAGE, "sliding": "exact"}
    cache = QuantizedPagedCache(model.config, "int4", **options, **{unit: amount})
    empty = state(cache)
    for _ in range(2):
        with pytest.raises(errors.OutOfPages):
            forward(model, cache, prompt(1, 5 * PAGE + 1))
        assert cache.get_seq_length() == 0 and cache.report().bytes == 0 and state(cache) == empty
        check_accounts(cache.pools, cache)
    fits = prompt(1, 5 * PAGE)
    free = QuantizedPagedCache(model.config, "int4", **options)
    assert torch.equal(forward(model, cache, fits), forward(model, free, fits))
    before = state(cache)
    with pytest.raises(errors.OutOfPages):
        forward(model, cache, prompt(1, 1))
    assert state(cache) == before
    check_accounts(cache.pools, cache)


def test_refusal_comes_before_the_first_layer_changes(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = QuantizedPagedCache(model.config, "int4", page_size=PAGE, max_bytes=3 * row_bytes(model))
    forward(model, cache, prompt(1, 3 * PAGE))
    updated = []
    for i, layer in enumerate(cache.layers):
        monkeypatch.setattr(layer, "update", lambda *args, i=i, **kwargs: updated.append(i))
    with pytest.raises(errors.OutOfPages):
        forward(model, cache, prompt(1, PAGE + 1))
    assert updated == []


def test_growth_ahead_stays_within_the_budget(model: PreTrainedModel) -> None:
    """Layers reserve 1/32 ahead, but no layer takes what another one needs."""
    x = torch.randn(1, 2, 1, 32)
    rows = 100
    first = QuantizedPagedCache(model.config, "int4", page_size=8)
    first.update(x, x, 0)
    page = first.stores[0].pool.page_bytes
    cache = QuantizedPagedCache(model.config, "int4", page_size=8, max_bytes=(3 * rows + 2) * page)
    ahead = 0
    with pytest.raises(errors.OutOfPages):
        while True:
            for layer in range(3):
                cache.update(x, x, layer)
            pools = [store.pool for store in cache.stores]
            ahead = max(ahead, *(pool.capacity - pool.used for pool in pools))
            assert sum(pool.nbytes for pool in pools) <= (3 * rows + 2) * page
    assert ahead > 0 and [store.pool.used for store in cache.stores] == [rows] * 3
    assert [layer.length for layer in cache.layers] == [8 * (rows + 1)] * 3


def test_layers_with_other_heads(model: PreTrainedModel) -> None:
    """Layers of different sizes share one budget in bytes: what counts is the sum."""
    small, large = torch.randn(1, 1, 1, 32), torch.randn(1, 4, 1, 32)
    cache = QuantizedPagedCache(model.config, "int8", page_size=8, max_bytes=1_000_000)

    def step(tokens: int) -> None:
        for layer, x in enumerate((small, large, small)):
            wide = x.expand(-1, -1, tokens, -1)
            cache.update(wide, wide, layer)

    step(9)
    pages = [store.pool.page_bytes for store in cache.stores]
    assert pages == [pages[0], 4 * pages[0], pages[0]]
    cache.pools.budget.max_bytes = 10 * sum(pages) - 1
    step(8 * 8)
    assert [store.pool.used for store in cache.stores] == [9] * 3
    before = state(cache)
    with pytest.raises(errors.OutOfPages, match=r"in 3 layers and [\d,]+ bytes of max_bytes=[\d,]+ are free"):
        step(8)
    assert state(cache) == before
    cache.pools.budget.max_bytes += 1
    step(8)
    assert sum(store.pool.nbytes for store in cache.stores) == cache.pools.budget.max_bytes
    check_accounts(cache.pools, cache)


def test_interrupted_step_gives_its_claim_back(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = PagePools(model.config, "int4", page_size=PAGE, max_pages=4)
    cache, other = (QuantizedPagedCache(model.config, pool=pools) for _ in range(2))
    forward(model, cache, prompt(1, PAGE + 1))

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache.layers[1], "update", interrupt)
        forward(model, cache, prompt(1, 2 * PAGE))
    assert pools.report().claimed_bytes > 0
    assert cache.rollback() == PAGE + 1
    cache.reset()
    check_accounts(pools, cache, other)
    forward(model, other, prompt(1, 4 * PAGE + 1))
    check_accounts(pools, cache, other)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_pages": 0}, ["max_pages", "positive", "0"]),
        ({"max_bytes": -1}, ["max_bytes", "positive", "-1"]),
        ({"max_bytes": 1e9}, ["max_bytes", "1000000000.0"]),
        ({"max_pages": True}, ["max_pages", "True"]),
        ({"max_pages": 1, "max_bytes": 1}, ["max_pages", "max_bytes", "one of them"]),
        ({"offload": 1}, ["offload", "True or False"]),
    ],
    ids=str,
)
def test_options_out_of_range(options: dict[str, Any], named: list[str], model: PreTrainedModel) -> None:
    for make in (QuantizedPagedCache, PagePools):
        with pytest.raises(errors.UnknownPolicyError) as caught:
            make(model.config, **options)
        assert all(name in str(caught.value) for name in named)


def test_budget_by_name(model: PreTrainedModel) -> None:
    with pytest.raises(errors.OutOfPages, match="max_pages=1"):
        model.generate(
            prompt(1, 200), max_new_tokens=1, cache_implementation="kvquant", cache_config={"max_pages": 1}, **GREEDY
        )


# -- pools that caches share -------------------------------------------------------------------------------------------


def test_requests_draw_from_one_budget(model: PreTrainedModel) -> None:
    row = row_bytes(model, "int8")
    pools = PagePools(model.config, "int8", page_size=PAGE, max_bytes=10 * row)
    first, second = (QuantizedPagedCache(model.config, pool=pools) for _ in range(2))
    forward(model, first, prompt(1, 6 * PAGE + 1))
    assert pools.report().free_bytes == 4 * row
    before = state(first)
    with pytest.raises(errors.OutOfPages):
        forward(model, second, prompt(1, 5 * PAGE + 1))
    assert state(first) == before and second.get_seq_length() == 0
    forward(model, second, prompt(1, 4 * PAGE + 1))
    report = pools.report()
    assert (report.used_pages, report.used_bytes, report.unused_bytes, report.free_bytes) == (30, 10 * row, 0, 0)
    assert json.loads(json.dumps(report.as_dict()))["max_bytes"] == 10 * row
    assert "10 used" not in str(report) and "30 used" in str(report) and "int8, pages of 16 tokens" in str(report)
    # Each cache reports its own pages.
    assert [cache.report().packed_bytes for cache in (first, second)] == [6 * row, 4 * row]
    with pytest.raises(errors.OutOfPages):
        forward(model, second, prompt(1, PAGE))
    check_accounts(pools, first, second)
    del first
    forward(model, second, prompt(1, 2 * PAGE))
    assert pools.report().free_bytes == 4 * row
    assert second.report().unused_bytes == 0 and pools.report().unused_bytes == 4 * row
    check_accounts(pools, second)
    second.reset()
    assert pools.report().used_bytes == pools.report().unused_bytes == 0


def test_refused_request_takes_nothing_from_the_running_one(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once one cache has filled the pools, the size of every layer's pages is known: a new one is refused at once."""
    pools = PagePools(model.config, "int4", page_size=PAGE, max_bytes=6 * row_bytes(model))
    running, new = (QuantizedPagedCache(model.config, pool=pools) for _ in range(2))
    forward(model, running, prompt(1, 4 * PAGE + 1))
    monkeypatch.setattr(new.layers[0], "update", lambda *args: pytest.fail("the first layer was updated"))
    with pytest.raises(errors.OutOfPages):
        forward(model, new, prompt(1, 3 * PAGE + 1))
    forward(model, running, prompt(1, 2 * PAGE))
    check_accounts(pools, running, new)


def test_step_that_runs_keeps_its_claim(model: PreTrainedModel) -> None:
    """Between two layers of a step another cache cannot take what the later layers will need."""
    pools = PagePools(model.config, "int4", page_size=PAGE, max_pages=3)
    first, second = (QuantizedPagedCache(model.config, pool=pools) for _ in range(2))
    forward(model, first, prompt(1, PAGE + 1))
    x = torch.randn(1, 2, 2 * PAGE, 32)
    first.update(x, x, 0)
    y = torch.randn(1, 2, PAGE + 1, 32)
    with pytest.raises(errors.OutOfPages):
        second.update(y, y, 0)
    assert pools.report().claimed_bytes == 2 * (pools.report().used_bytes // 5) * 2
    for layer in (1, 2):
        first.update(x, x, layer)
    check_accounts(pools, first, second)


def test_pools_give_the_same_results(model: PreTrainedModel) -> None:
    """Two requests in turn, on the same pools: their pages lie mixed."""
    pools = PagePools(model.config, "int4", page_size=PAGE)
    ids = [prompt(1, 50, seed=i) for i in range(3)]
    shared = [QuantizedPagedCache(model.config, pool=pools) for _ in ids]
    alone = [QuantizedPagedCache(model.config, "int4", page_size=PAGE) for _ in ids]
    for _ in range(4):
        for mine, own, tokens in zip(shared, alone, ids, strict=True):
            assert torch.equal(forward(model, mine, tokens), forward(model, own, tokens))
    assert len({id(store.pool) for cache in shared for store in cache.stores}) == 3
    check_accounts(pools, *shared)


def test_threads(model: PreTrainedModel) -> None:
    """Every request either finishes with the right tokens or is refused whole, whatever the others do."""
    ids = [prompt(1, 20 + 9 * i, seed=i) for i in range(4)]
    expected = [
        model.generate(
            x, **with_cache(QuantizedPagedCache(model.config, "int4", page_size=8)), max_new_tokens=20, **GREEDY
        )
        for x in ids
    ]
    pools = PagePools(model.config, "int4", page_size=8, max_pages=20)
    wrong: list[object] = []

    def serve(i: int) -> None:
        while True:
            cache = QuantizedPagedCache(model.config, pool=pools)
            try:
                output = model.generate(ids[i], **with_cache(cache), max_new_tokens=20, **GREEDY)
            except errors.OutOfPages:
                lengths = {layer.length for layer in cache.layers}
                wrong.extend([lengths] if len(lengths) != 1 else [])
                time.sleep(0.05 * i)  # or two of them could refuse each other for ever
                continue
            wrong.extend([] if torch.equal(output, expected[i]) else [output])
            return

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    check_accounts(pools)
    assert pools.report().used_pages == 0


def test_wrong_pools_are_refused(model: PreTrainedModel) -> None:
    pools = PagePools(model.config, "int8", page_size=PAGE, max_pages=9)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tiny_gemma2().config, {}, "made for the config .*gemma2.*make pools of its own"),
        (model.config, {"policy": "int4"}, "policy='int8', the cache asks for 'int4'; leave policy out"),
        (model.config, {"page_size": 64}, "page_size=16, the cache asks for 64"),
        (model.config, {"offload": True}, "offload=False, the cache asks for True"),
        (model.config, {"max_pages": 9}, "max_pages belongs to shared pools.*PagePools"),
        (model.config, {"max_bytes": 9}, "max_bytes belongs to shared pools"),
    ]
    for config, options, message in cases:
        with pytest.raises(errors.PoolMismatchError, match=message):
            QuantizedPagedCache(config, pool=pools, **options)
    assert QuantizedPagedCache(model.config, "int8", page_size=PAGE, pool=pools).policy.name == "int8"
    assert Int8PagedCache(model.config, pool=pools).page_size == PAGE


def test_another_dtype_gets_pools_of_its_own_from_the_same_budget(model: PreTrainedModel) -> None:
    pools = PagePools(model.config, "exact", page_size=PAGE, max_bytes=1_000_000)
    first, second = (QuantizedPagedCache(model.config, pool=pools) for _ in range(2))
    forward(model, first, prompt(1, 50))
    forward(copy.deepcopy(model).bfloat16(), second, prompt(1, 50))
    assert pools.report().layers == 6
    assert pools.report().used_bytes == first.report().packed_bytes + second.report().packed_bytes
    check_accounts(pools, first, second)


def test_saved_and_forked_caches_keep_their_budget(model: PreTrainedModel) -> None:
    cache = QuantizedPagedCache(model.config, "int4", page_size=PAGE, max_pages=5)
    forward(model, cache, prompt(1, 3 * PAGE + 1))
    twin = copy.deepcopy(cache)
    forward(model, twin, prompt(1, 2 * PAGE))
    with pytest.raises(errors.OutOfPages):  # forks share the budget
        forward(model, cache, prompt(1, PAGE))
    check_accounts(cache.pools, cache, twin)
    del twin
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.pools is not cache.pools and loaded.pools.budget.max_pages == 5
    forward(model, loaded, prompt(1, 2 * PAGE))
    with pytest.raises(errors.OutOfPages):
        forward(model, loaded, prompt(1, PAGE))
    assert loaded.paged_layers[0].pool.pool is loaded.stores[0].pool
    check_accounts(loaded.pools, loaded)


# -- what sequences share ----------------------------------------------------------------------------------------------


def test_beams_store_the_prompt_once(model: PreTrainedModel) -> None:
    ids = prompt(1, 4 * PAGE + 3)
    cache = QuantizedPagedCache(model.config, "exact", page_size=PAGE)
    output = model.generate(ids, **with_cache(cache), num_beams=4, max_new_tokens=10, **GREEDY)
    plain = DynamicCache(config=model.config)
    assert torch.equal(output, model.generate(ids, **with_cache(plain), num_beams=4, max_new_tokens=10, **GREEDY))
    report = cache.report()
    assert report.batch_size == 4 and report.tokens == 4 * PAGE + 12
    assert report.shared_bytes == report.packed_bytes == 4 * sum(store.pool.page_bytes for store in cache.stores)
    assert report.holders == 4 and re.search(r"shared +\S+ kB by up to 4 sequences", str(report))
    check_accounts(cache.pools, cache)


def test_shared_bytes_are_the_pages_with_several_holders(model: PreTrainedModel) -> None:
    cache = QuantizedPagedCache(model.config, "int4", page_size=PAGE)
    forward(model, cache, prompt(1, 3 * PAGE + 1))
    row = sum(store.pool.page_bytes for store in cache.stores)
    report = cache.report()
    assert (report.shared_bytes, report.holders) == (0, 1) and "shared" not in str(report)
    twin = copy.deepcopy(cache)
    forward(model, twin, prompt(1, 2 * PAGE))
    assert (cache.report().shared_bytes, twin.report().shared_bytes) == (3 * row, 3 * row)
    assert (cache.report().packed_bytes, twin.report().packed_bytes) == (3 * row, 5 * row)
    twin.batch_repeat_interleave(3)
    assert (twin.report().shared_bytes, twin.report().holders, cache.report().holders) == (5 * row, 4, 4)
    forward(model, twin, prompt(3, PAGE))
    assert (twin.report().shared_bytes, twin.report().packed_bytes) == (5 * row, (5 + 3) * row)
    check_accounts(cache.pools, cache, twin)
    del twin
    assert cache.report().shared_bytes == 0
