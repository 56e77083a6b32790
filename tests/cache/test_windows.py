"""Layers with a sliding window: their results are transformers', their pages are those of the window and no more."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from models import WINDOWED, prompt, ragged_prompts, tiny_windowed
from stores import chunks, live_pages
from ties import ROUNDING, Margins
from transformers import DynamicCache, PreTrainedModel

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.errors import InterruptedForwardError, RollbackError, UnsupportedModelError
from kvquant_hf.layers.guard import StepGuard
from kvquant_hf.layers.sliding import SlidingStore
from kvquant_hf.policies.table import POLICIES
from kvquant_hf.reports.calls import CallLog
from kvquant_hf.transformers_api.layers import QuantizedSlidingLayer
from kvquant_hf.transformers_api.names import cache_in, with_cache

WINDOW, PAGE = 24, 8
LOOKUP = {"input_ids": prompt(1, 20).repeat(1, 4), "prompt_lookup_num_tokens": 4}
STRATEGIES: dict[str, dict[str, Any]] = {
    "shorter than the window": {"input_ids": prompt(2, 10, seed=1)},
    "as long as the window": {"input_ids": prompt(1, 24)},
    "much longer, left-padded": ragged_prompts((60, 40, 3)),
    "chunks longer than the window": {"input_ids": prompt(1, 90), "prefill_chunk_size": 37},
    "short chunks, left-padded": {**ragged_prompts((60, 31)), "prefill_chunk_size": 11},
    "beams, left-padded": {**ragged_prompts((60, 31)), "num_beams": 2},
    "prompt lookup": LOOKUP,
}


def paged(model: PreTrainedModel, policy: str = "exact", **options: Any) -> QuantizedPagedCache:
    return QuantizedPagedCache(model.config, policy, page_size=PAGE, **options)


def generate(model: PreTrainedModel, cache: Any, new: int = 20, **options: Any) -> torch.Tensor:
    return model.generate(**with_cache(cache), max_new_tokens=new, do_sample=False, **options)


def read(model: PreTrainedModel, cache: Any, ids: torch.Tensor, chunk: int = 1 << 30) -> torch.Tensor:
    """Logits of ``ids``, ``chunk`` tokens per forward pass."""
    with torch.no_grad():
        return torch.cat([model(ids[:, part], **with_cache(cache)).logits for part in chunks(ids.shape[1], chunk)], 1)


def check_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal up to float32 sums in another order; a token more or less in a window moves logits by 1e-2 and more."""
    assert (ours - theirs).abs().max() <= ROUNDING * theirs.abs().max()


def windows(cache: QuantizedPagedCache) -> list[QuantizedSlidingLayer]:
    return [layer for layer in cache.layers if isinstance(layer, QuantizedSlidingLayer)]


def check_bound(layer: QuantizedSlidingLayer, window: int = WINDOW) -> None:
    """Walks the pool: pages that exist, in use or not, the open page of each sequence beside them."""
    store = layer.store
    assert store is not None
    live = live_pages(store)
    assert len(live) == store.pool.used
    assert store.pool.nbytes == store.pool.capacity * store.pool.page_bytes
    pages = store.pool.capacity + store.batch_size
    assert pages <= store.batch_size * (math.ceil(window / PAGE) + 2)


# -- the same results as transformers' own cache -----------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(WINDOWED))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_windowed(request.param, attention="kvquant")


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_exact_is_dynamic_cache(strategy: str, model: PreTrainedModel) -> None:
    options, margins = STRATEGIES[strategy], Margins()
    expected = generate(model, DynamicCache(config=model.config), **options, **margins.options)
    if "num_beams" not in options:
        margins.check()
    cache = paged(model)
    assert torch.equal(generate(model, cache, **options), expected)
    assert len(expected[:, options["input_ids"].shape[1] :].unique()) > 5
    report = cache.report()
    assert report.fallback_calls == 0 and report.paged_calls > 0 and report.other_layers == {}
    assert report.sliding_layers == {"24": len(windows(cache))} and report.tokens == cache.get_seq_length()


@pytest.mark.parametrize("name", ["mistral", "gemma3", "llama4"])
def test_multi_turn(name: str) -> None:
    model = tiny_windowed(name, attention="kvquant")
    ours, theirs, ids = paged(model), DynamicCache(config=model.config), prompt(1, 40)
    for turn, new in enumerate((10, 3, 20)):
        output = generate(model, ours, new, input_ids=ids)
        ids = generate(model, theirs, new, input_ids=ids)
        assert torch.equal(output, ids), f"turn {turn}"
        ids = torch.cat([ids, prompt(1, 29, seed=turn + 1)], 1)
    for layer in windows(ours):
        check_bound(layer)


@pytest.mark.parametrize("name", list(WINDOWED))
def test_the_window_decides_tokens(name: str) -> None:
    """Otherwise the comparisons above would not notice a wrong one."""
    changes = {"attention_chunk_size": 4096} if name == "llama4" else {"sliding_window": 4096}
    ids = prompt(1, 100)
    wide, narrow = (tiny_windowed(name, **c) for c in (changes, {}))
    logits = [read(m, DynamicCache(config=m.config), ids) for m in (wide, narrow)]
    assert (logits[0] - logits[1]).abs().max() > 1e-2 * logits[1].abs().max()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("chunk", [1, 7, PAGE, WINDOW, 37, 120])
def test_chunks_of_any_length(chunk: int, attention: str) -> None:
    model = tiny_windowed("qwen2", attention=attention)
    ids = prompt(2, 50 if chunk == 1 else 120)
    ours, theirs = (read(model, cache, ids, chunk) for cache in (paged(model), DynamicCache(config=model.config)))
    check_close(ours, theirs)


@pytest.mark.parametrize("policy", ["int8", "int4", "turboquant"])
def test_a_page_at_a_time_is_token_by_token(policy: str) -> None:
    """Quantized in pages that are not those of the window: the same, however the tokens came."""
    model = tiny_windowed("mistral").double()
    ids = prompt(1, 8 * PAGE)
    by_page, single = (read(model, paged(model, policy, prefill="quantized"), ids, chunk) for chunk in (PAGE, 1))
    assert (by_page - single).abs().max() <= 1e-10 * single.abs().max()
    exact = read(model, DynamicCache(config=model.config), ids)
    assert (single - exact)[:, PAGE:].abs().max() > 1e-3


# -- what a layer holds ------------------------------------------------------------------------------------------------


def make_layer(window: int, policy: str = "exact", prefill: bool = True) -> QuantizedSlidingLayer:
    return QuantizedSlidingLayer(window, POLICIES[policy], PAGE, prefill, StepGuard(), CallLog())


@pytest.mark.parametrize("window", [1, 2, PAGE - 1, PAGE, PAGE + 1, WINDOW, 30])
@pytest.mark.parametrize("exact_prefill", [True, False])
@pytest.mark.parametrize("record", [False, True])
def test_the_mask_sizes_are_those_of_the_tokens_returned(window: int, exact_prefill: bool, record: bool) -> None:
    layer, seen = make_layer(window, prefill=exact_prefill), torch.zeros(2, 1, 0, 16)
    if record:
        layer.activate_past_recording()
    lengths = torch.randint(1, 20, (25,), generator=torch.Generator().manual_seed(window)).tolist()
    for step, count in enumerate([50, *lengths, *[1] * 30]):
        new = torch.randn(2, 1, count, 16)
        before, seen = seen.shape[2], torch.cat([seen, new], 2)
        length, offset = layer.get_mask_sizes(count)
        keys, values = layer.update(new, -new)
        assert keys.shape[2] == values.shape[2] == length and offset + length == seen.shape[2]
        assert offset <= max(0, before - window + 1), "the first query does not see its window"
        assert torch.equal(keys.clone(), seen[:, :, offset:]) and torch.equal(values.clone(), -seen[:, :, offset:])
        assert layer.get_seq_length() == seen.shape[2] and layer.get_max_length() == window
        if record and step % 3 == 2:
            dropped = min(count, step % 5)
            layer.crop(-dropped)
            seen = seen[:, :, : seen.shape[2] - dropped]
        if not record and step > len(lengths):
            check_bound(layer, window)


@pytest.mark.parametrize("prefill", ["exact", "quantized"])
@pytest.mark.parametrize("length", [1, WINDOW, 200])
def test_memory_is_that_of_the_window(length: int, prefill: str) -> None:
    model = tiny_windowed("gemma2", attention="kvquant")
    cache = paged(model, "int4", prefill=prefill)
    read(model, cache, prompt(3, length))
    for step in range(60):
        read(model, cache, prompt(3, 1, seed=step))
        for layer in windows(cache):
            check_bound(layer)
    full = [layer for layer in cache.paged_layers if layer not in windows(cache)]
    assert all(layer.store.sealed_pages == (length + 59) // PAGE for layer in full)


def test_memory_of_a_long_chunk_is_given_back() -> None:
    """While a chunk of 200 tokens is attended to it is held; the next step has the pool of the window again."""
    model = tiny_windowed("mistral", attention="kvquant")
    cache, twin = paged(model), DynamicCache(config=model.config)
    for part in (30, 200, 1, 1):
        check_close(read(model, cache, prompt(2, part)), read(model, twin, prompt(2, part)))
        if part == 200:
            assert all(layer.store.pool.capacity >= 2 * 200 // PAGE for layer in windows(cache))
    cache.reorder_cache(torch.tensor([1, 1]))  # both sequences share their pages
    twin.reorder_cache(torch.tensor([1, 1]))
    for part in (200, 1, 1):
        check_close(read(model, cache, prompt(2, part)), read(model, twin, prompt(2, part)))
    for layer in windows(cache):
        check_bound(layer)


def test_shared_pages_survive_when_the_pool_shrinks() -> None:
    keys = torch.randn(2, 1, 30 * PAGE - 3, 16)
    layer = make_layer(2 * PAGE)
    layer.update(keys[:, :, :1], keys[:, :, :1])
    layer.update(keys[:, :, 1:], keys[:, :, 1:])
    layer.reorder_cache(torch.tensor([1, 1, 0]))
    new = torch.randn(3, 1, 1, 16)
    ours, _ = layer.update(new, new)
    expected = torch.cat([keys[[1, 1, 0]], new], 2)
    assert torch.equal(ours.clone(), expected[:, :, -ours.shape[2] :])
    store = layer.store
    assert store.pool.used == store.pool.capacity == len(live_pages(store)) == 2 * store.sealed_pages
    assert store.pool.references(store.table.ids[:2]).tolist() == [[2] * store.sealed_pages] * 2
    pool = store.pool
    del store, ours, _  # keys and values that were returned keep the pages that they point at
    layer.reset()
    assert pool.used == pool.nbytes == 0


# -- taking tokens back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@pytest.mark.parametrize("length", [20, 100])
@pytest.mark.parametrize("count", [1, 5, 9])
def test_crop_of_the_last_step(name: str, length: int, count: int) -> None:
    """The tokens of the last step can always be taken back, recorded or not."""
    model = tiny_windowed(name, attention="kvquant")
    cache, twin, ids = paged(model), DynamicCache(config=model.config), prompt(1, length)
    for each in (cache, twin):
        read(model, each, ids)
    read(model, cache, prompt(1, 9, seed=3))
    cache.crop(-count)
    if count < 9:
        read(model, twin, prompt(1, 9, seed=3)[:, : 9 - count])
    assert cache.get_seq_length() == length + 9 - count
    more = prompt(1, 30, seed=4)
    check_close(read(model, cache, more, 5), read(model, twin, more, 5))


def test_crop_over_several_steps_needs_a_record() -> None:
    model = tiny_windowed("gemma3", attention="kvquant")
    cache, twin = paged(model), DynamicCache(config=model.config)
    cache.activate_past_recording()
    read(model, cache, prompt(1, 70), 1)
    cache.crop(-40)
    read(model, cache, prompt(1, 3), 1)
    for part in (prompt(1, 70)[:, :30], prompt(1, 3)):
        read(model, twin, part)
    more = prompt(1, 30, seed=4)
    check_close(read(model, cache, more, 5), read(model, twin, more, 5))
    cache.crop(0)  # nothing is taken back, and what was kept for it is given back
    for layer in windows(cache):
        check_bound(layer)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_crop_that_cannot_be_right_changes_nothing(name: str) -> None:
    model = tiny_windowed(name, attention="kvquant")
    cache = paged(model, "int4")
    read(model, cache, prompt(1, 100))
    read(model, cache, prompt(1, 1))
    before = cache.report().as_dict(), [layer.length for layer in cache.paged_layers]
    with pytest.raises(RollbackError, match=r"40 tokens.*window of 24.*activate_past_recording\(\).*cache\.reset\(\)"):
        cache.crop(-40)
    assert before == (cache.report().as_dict(), [layer.length for layer in cache.paged_layers])
    cache.crop(-101)
    assert cache.get_seq_length() == 0 and cache.report().packed_bytes == 0
    exact = QuantizedPagedCache(tiny_windowed("gemma3").config, "int4", page_size=PAGE, sliding="exact")
    read(tiny_windowed("gemma3"), exact, prompt(1, 100))
    with pytest.raises(RollbackError, match=r"DynamicSlidingWindowLayer.*activate_past_recording\(\)"):
        exact.crop(-3)
    assert {layer.get_seq_length() for layer in exact.layers} == {100}


def test_assisted_decoding() -> None:
    model, assistant = tiny_windowed("gemma3", attention="kvquant"), tiny_windowed("gemma3")
    for parameter in assistant.parameters():  # nearly the same model: some candidates are taken, some refused
        parameter.data += 0.004 * torch.randn(parameter.shape)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = generate(model, None, 60, input_ids=prompt(1, 60))
    plain, calls[:] = len(calls), []
    cache = paged(model)
    assert torch.equal(generate(model, cache, 60, input_ids=prompt(1, 60), assistant_model=assistant), expected)
    assert len(calls) < plain, "no candidate was taken"


def test_interrupted_step() -> None:
    model = tiny_windowed("gemma2", attention="kvquant")
    cache, calm = paged(model, "int4"), paged(model, "int4")
    for length in (100, 1):
        for each in (cache, calm):
            read(model, each, prompt(1, length))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for position in (3, 1):
        handle = model.model.layers[position].self_attn.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            read(model, cache, prompt(1, 2))
        handle.remove()
        with pytest.raises(InterruptedForwardError, match="103, 101 tokens"):
            read(model, cache, prompt(1, 2))
        assert cache.rollback() == 101
    more = prompt(1, 40, seed=2)
    check_close(read(model, cache, more, 5), read(model, calm, more, 5))


# -- copies, reset, options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["exact", "int4"])
def test_forks_and_saved_caches_go_on_alike(policy: str) -> None:
    model = tiny_windowed("gemma2", attention="kvquant")
    cache = paged(model, policy)
    read(model, cache, prompt(1, 100), 50)
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    fork, loaded = copy.deepcopy(cache), torch.load(file, weights_only=False)
    assert [a.store.pool is b.store.pool for a, b in zip(windows(cache), windows(fork), strict=True)] == [True, True]
    more = prompt(1, 60, seed=1)
    expected = read(model, cache, more, 3)
    for other in (fork, loaded):
        assert torch.equal(read(model, other, more, 3), expected)
    assert isinstance(windows(loaded)[0].store, SlidingStore)


@pytest.mark.parametrize("sliding", ["quantized", "exact"])
def test_reset_and_reuse_with_another_batch_size(sliding: str) -> None:
    model = tiny_windowed("gemma2", attention="kvquant")
    cache = paged(model, sliding=sliding)
    for inputs in (ragged_prompts((60, 11)), {"input_ids": prompt(1, 70)}, ragged_prompts((40, 3, 9))):
        expected = generate(model, DynamicCache(config=model.config), **inputs)
        assert torch.equal(generate(model, cache, **inputs), expected)
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.report().bytes == cache.report().other_bytes == 0


def test_sliding_exact_keeps_the_layers_of_transformers() -> None:
    model = tiny_windowed("gemma2")
    options = {"cache_implementation": "kvquant", "cache_config": {"sliding": "exact"}, "max_new_tokens": 3}
    cache = cache_in(model.generate(prompt(), **options, return_dict_in_generate=True))
    report = cache.report()
    assert cache.sliding == "exact" and report.paged_layers == 2 and report.sliding_layers == {}
    assert report.other_layers == {"DynamicSlidingWindowLayer": 2}
    with pytest.raises(UnsupportedModelError, match=r"'mistral'.*sliding_attention.*use sliding='quantized'"):
        QuantizedPagedCache(tiny_windowed("mistral").config, sliding="exact")


def test_report() -> None:
    model = tiny_windowed("gemma2").bfloat16()
    cache = QuantizedPagedCache(model.config, "int4", page_size=PAGE)
    read(model, cache, prompt(2, 100))
    read(model, cache, prompt(2, 1))
    report = cache.report()
    assert "4 paged, 2 of them the last 24 tokens" in str(report) and "keys 2 x 16, values 2 x 16" in str(report)
    token = 2 * 2 * 2 * 16 * 2  # batch, keys and values, heads, head_dim, bytes
    assert report.dense_bytes == 2 * 101 * token + 2 * (WINDOW - 1) * token
    held = [layer.length - layer.first for layer in windows(cache)]
    assert report.elements * 2 == (2 * 101 + sum(held)) * token and held == [29, 29]
