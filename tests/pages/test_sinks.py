"""First tokens that are kept exact: where they lie through all that happens to a store, and what their page holds."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import prompt, ragged_prompts, tiny_llama, tiny_windowed
from stores import raw, vectors

from kvquant_hf import LayerwisePolicy, QuantizedPagedCache
from kvquant_hf.errors import SavedCacheError
from kvquant_hf.files.cache import read_file, write_file
from kvquant_hf.pages.static_store import StaticStore
from kvquant_hf.pages.store import PagedStore
from kvquant_hf.policies.table import POLICIES, parse_policy
from kvquant_hf.transformers_api.names import with_cache
from kvquant_hf.triton_kernels.codecs import CODECS

PAGE = 16
INT4 = CODECS["int4-channel"], CODECS["int4-hadamard"]


def store_of(x: torch.Tensor, sinks: int = 2, **options: Any) -> PagedStore:
    return PagedStore(*INT4, PAGE, x, x, sinks=sinks, **options)


def filled(x: torch.Tensor, sinks: int = 2, chunk: int = 1 << 30, padding: np.ndarray | None = None) -> PagedStore:
    store = store_of(x, sinks)
    for start in range(0, x.shape[2], chunk):
        part, first = x[:, :, start : start + chunk], store.sealed_pages * PAGE
        store.append(part, 2 * part, None if padding is None else padding[:, first : start + part.shape[2]])
    return store


def exact_rows(store: PagedStore, x: torch.Tensor) -> list[list[int]]:
    """Positions of each sequence in sealed pages at which keys and values are those of ``x``."""
    sealed, view = store.sealed_pages * PAGE, store.view()
    same = (view.dense("keys") == x).all(-1).all(1) & (view.dense("values") == 2 * x).all(-1).all(1)
    return [torch.arange(sealed)[row[:sealed]].tolist() for row in same]


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_first_tokens_are_exact_and_out_of_the_ranges(chunk: int, impl: str) -> None:
    """However the tokens arrive; what stands in the first ones changes no byte of their page."""
    x = vectors(2, 2, 3 * PAGE + 5, 32)
    store = filled(x, chunk=chunk)
    store.impl = impl
    assert exact_rows(store, x) == [[0, 1]] * 2 and store.first.at.tolist() == [0, 0]
    loud = x.clone()
    loud[:, :, :2] = 1e4
    loud = filled(loud, chunk=chunk)
    pages = [[raw(plane[s.page_table.long()]) for plane in s.pool.planes] for s in (store, loud)]
    assert all(map(torch.equal, *pages)) and loud.saturated_pages() == 0
    assert not all(map(torch.equal, pages[0], [raw(p[store.page_table.long()]) for p in filled(x, 0).pool.planes]))
    assert loud.view().dense("values")[0, 0, 1, 0] == 2e4


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_with_left_padding_each_sequence_has_its_own(chunk: int) -> None:
    """Those of the third end with its page, those of the fourth are still in the open page."""
    counts, tokens = (0, 5, 2 * PAGE - 1, 3 * PAGE + 1), 3 * PAGE + 5
    padding = np.arange(tokens) < np.array(counts)[:, None]
    x = vectors(4, 2, tokens, 32)
    store = filled(x, chunk=chunk, padding=padding)
    assert store.first.at.tolist() == [0, 5, 31, -1]
    rows = [
        sorted(set(row) & set(range(count, tokens))) for row, count in zip(exact_rows(store, x), counts, strict=True)
    ]
    assert rows == [[0, 1], [5, 6], [31], []]
    loud = x.masked_fill(torch.from_numpy(padding)[:, None, :, None], 1e4)
    loud[torch.arange(4), :, torch.tensor(counts)] = 1e4
    assert filled(loud, chunk=chunk, padding=padding).saturated_pages() == 0
    store.append(x[:, :, :PAGE], 2 * x[:, :, :PAGE], np.pad(padding[:, 3 * PAGE :], ((0, 0), (0, PAGE))))
    assert store.first.at.tolist() == [0, 5, 31, 3 * PAGE + 1]


def test_forks_selections_and_crops() -> None:
    x = vectors(3, 2, 3 * PAGE + 5, 32)
    padding = np.arange(x.shape[2]) < np.array((0, PAGE + 3, 0))[:, None]
    store = filled(x, padding=padding)
    twin, version = store.fork(), store.version
    assert twin.first is store.first
    store.crop(2 * PAGE)  # reopens the second page: there the second sequence begins
    assert store.first.at.tolist() == [0, -1, 0] and store.version > version
    assert torch.equal(store.view().dense("keys")[1, :, PAGE + 3 : PAGE + 5], x[1, :, PAGE + 3 : PAGE + 5])
    assert store.view().keys.first_at.tolist() == [0, -1, 0]
    assert twin.first.at.tolist() == [0, PAGE + 3, 0] and exact_rows(twin, x)[0] == [0, 1]
    twin.select(torch.tensor([1, 1, 2, 0]))
    assert twin.first.at.tolist() == [PAGE + 3, PAGE + 3, 0, 0]
    assert set(exact_rows(twin, x[[1, 1, 2, 0]])[0]) >= {PAGE + 3, PAGE + 4}
    store.crop(PAGE + 5 - 1)  # leaves one of two first tokens, in the open page
    assert store.first.tensors == (None, None, None) and torch.equal(store.view().dense("keys")[0, :, 0], x[0, :, 0])
    store.append(x[:, :, 1 : PAGE + 1], 2 * x[:, :, 1 : PAGE + 1], padding[:, : PAGE + 1])
    assert store.first.at.tolist() == [0, -1, 0] and exact_rows(store, x[:, :, : PAGE + 1])[0] == [0, 1]
    twin.crop(3 * PAGE + 5 - PAGE)  # to the end of a page: nothing is reopened, the second page's are gone
    assert twin.first.at.tolist() == [-1, -1, 0, 0] and twin.reopened_pages == 0
    twin.clear()
    assert twin.first.at.tolist() == [-1] * 4 and twin.footprint().open_page == sum(t.nbytes for t in twin._tail)


def test_bytes_are_counted() -> None:
    x = vectors(2, 2, 2 * PAGE, 32)
    with_them, without = filled(x), filled(x, 0)
    held = 2 * 2 * 2 * 2 * 32 * 4 + 2 * 4  # keys and values, sequences, heads, tokens, head_dim; positions
    assert with_them.footprint().open_page - without.footprint().open_page == held
    assert sum(with_them.devices().values()) - sum(without.devices().values()) == held


def test_default_of_each_policy() -> None:
    expected = dict.fromkeys(("int8", "int4", "kv3", "kv2.9", "kv2.4", "turboquant"), 1)
    assert {name: policy.sinks for name, policy in POLICIES.items()} == dict.fromkeys(POLICIES, 0) | expected
    assert parse_policy("exact/int4").sinks == 1 and parse_policy("int4/int8-token").sinks == 0
    config = tiny_llama().config
    mixed = QuantizedPagedCache(config, LayerwisePolicy(["exact", "int4", "int8-token"]))
    assert [layer.sinks for layer in mixed.paged_layers] == [0, 1, 0] and mixed.report().sinks == 1
    assert QuantizedPagedCache(config, "exact", sinks=3).report().sinks == 3
    assert "the first one exact" in str(QuantizedPagedCache(config).report())
    assert "the first 3 exact" in str(QuantizedPagedCache(config, sinks=3).report())
    assert "exact" not in str(QuantizedPagedCache(config, sinks=0).report()).split("\n")[0]


def test_attention_reads_them_exactly() -> None:
    """With sinks that are all but one token of each page, the first page is as good as exact."""
    model, ids = tiny_llama(), prompt(2, PAGE + 8)
    errors = []
    for sinks in (0, 1, PAGE - 1):
        cache = QuantizedPagedCache(model.config, "turboquant", page_size=PAGE, prefill="quantized", sinks=sinks)
        with torch.no_grad():
            errors.append(float((model(ids, **with_cache(cache)).logits - model(ids).logits).abs().mean()))
    assert errors[2] < errors[1] < errors[0] and errors[2] < errors[0] / 3


def test_windows_give_them_back() -> None:
    """With the page in which they lie; a first prompt that is longer than its window never holds them."""
    model = tiny_windowed("mistral", sliding_window=24)
    long, short = (QuantizedPagedCache(model.config, "int4", page_size=PAGE) for _ in range(2))
    with torch.no_grad():
        model(prompt(2, 100), **with_cache(long))
        model(prompt(2, 20), **with_cache(short))
    assert long.stores[0].first.at.tolist() == [-2, -2] and long.stores[0].view().keys.first is None
    assert short.stores[0].first.at.tolist() == [0, 0]
    with torch.no_grad():
        for _ in range(30):
            model(prompt(2, 1), **with_cache(short))
    assert short.stores[0].dropped_pages > 0 and short.stores[0].first.at.tolist() == [-2, -2]
    padded = QuantizedPagedCache(model.config, "int4", page_size=PAGE)
    inputs = ragged_prompts((60, 10))
    padded.set_padding(inputs["attention_mask"])
    with torch.no_grad():
        model(**inputs, **with_cache(padded))
        for _ in range(16):
            model(prompt(2, 1), **with_cache(padded))
    store = padded.stores[0]
    assert store.first.at.tolist() == [-2, 50 - store.dropped_pages * PAGE], "the second begins inside of the window"


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, path = tiny_llama(), tmp_path / "cache.safetensors"
    caches = {sinks: QuantizedPagedCache(model.config, "int4", page_size=PAGE, sinks=sinks) for sinks in (None, 0, 2)}
    for sinks, cache in caches.items():
        with torch.no_grad():
            model(prompt(2, 40), **with_cache(cache))
        cache.save(path)
        loaded = QuantizedPagedCache.load(path, model.config)
        assert loaded.sinks == sinks and loaded.report().sinks == cache.report().sinks
        for mine, theirs in zip(cache.stores, loaded.stores, strict=True):
            assert mine.first.at.tolist() == theirs.first.at.tolist()
            assert all(torch.equal(mine.view().dense(side), theirs.view().dense(side)) for side in ("keys", "values"))
    # As a file was written when there were none: it goes on without.
    text, tensors = read_file(path)
    header = json.loads(text)
    del header["options"]["sinks"]
    write_file(path, header, {name: x for name, x in tensors.items() if "first" not in name})
    loaded = QuantizedPagedCache.load(path, model.config)
    assert loaded.report().sinks == 0 and loaded.stores[0].view().keys.first is None


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({"layers.0.first_at": torch.tensor([0, 3 * PAGE], dtype=torch.int32)}),
        lambda t: t.update({"layers.0.first_at": torch.tensor([0, -3], dtype=torch.int32)}),
        lambda t: t.update({"layers.0.first_at": torch.tensor([0], dtype=torch.int32)}),
        lambda t: t.update({"layers.0.first_at": torch.tensor([-1, -1], dtype=torch.int32)}),
        lambda t: t.update({"layers.0.keys.first": t["layers.0.keys.first"][:, :, :1].clone()}),
        lambda t: t.update({"layers.0.keys.first": t["layers.0.keys.first"].half()}),
        lambda t: t.pop("layers.0.values.first"),
        lambda t: t.pop("layers.0.first_at"),
    ],
    ids=["beyond the pages", "below", "another batch", "none of them", "too few", "dtype", "values missing", "missing"],
)
def test_files_that_contradict_themselves(change: Any, tmp_path: Path) -> None:
    model, path = tiny_llama(), tmp_path / "cache.safetensors"
    cache = QuantizedPagedCache(model.config, "int4", page_size=PAGE, sinks=2)
    with torch.no_grad():
        model(prompt(2, 40), **with_cache(cache))
    cache.save(path)
    text, tensors = read_file(path)
    change(tensors)
    write_file(path, json.loads(text), tensors)
    with pytest.raises(SavedCacheError, match="inconsistent"):
        QuantizedPagedCache.load(path, model.config)


# -- static caches -----------------------------------------------------------------------------------------------------


def static_of(x: torch.Tensor, sinks: int = 2) -> StaticStore:
    return StaticStore(*INT4, PAGE, x, x, "auto", 100, sinks)


def test_static_stores_keep_them_with_the_first_prompt() -> None:
    """The same pages as of a store that grows, whether the prompt fills a page or not; nothing is ever replaced."""
    x = vectors(2, 2, 3 * PAGE + 5, 32)
    grown = filled(x)
    for first in (3, PAGE, 2 * PAGE + 1):
        static = static_of(x)
        address = static.view().keys.first.data_ptr()
        static.append(*static.keep_first(x[:, :, :first], 2 * x[:, :, :first]))
        for t in range(first, x.shape[2]):
            static.append(x[:, :, t : t + 1], 2 * x[:, :, t : t + 1])
        view, other = static.view(), grown.view()
        for side, theirs in zip(view[:2], other[:2], strict=True):
            for plane, expected in zip(side.planes, theirs.planes, strict=True):
                assert torch.equal(raw(plane[view.page_table[:, :3].long()]), raw(expected[other.page_table.long()]))
            assert torch.equal(side.first, theirs.first) and torch.equal(side.first_at, theirs.first_at)
        assert static.view().keys.first.data_ptr() == address
        static.select(torch.tensor([1, 1]))
        assert torch.equal(view.keys.first[0], x[1, :, :2])
        static.crop(x.shape[2] - 1)
        assert view.keys.first_at.tolist() == [-1, -1] and torch.equal(view.keys.tail[0, :, 0], x[1, :, 0])
        static.clear()
        static.append(*static.keep_first(x[:, :, :1], x[:, :, :1]))  # fewer than are to be kept
        assert view.keys.first_at.tolist() == [-1, -1]


@pytest.mark.parametrize("lengths", [(70, 33), (40, 2), (17, 16)], ids=str)
def test_static_caches_equal_those_that_grow(lengths: tuple[int, int]) -> None:
    """With padding, multiplied out and in attention: the same tokens, and what they are generated from."""
    model, inputs = tiny_llama(), ragged_prompts(lengths)
    results = []
    for options in ({}, {"static": True, "max_length": 128}):
        policy = "int4-channel/int4-hadamard"  # a static cache sees no queries to round keys by
        cache = QuantizedPagedCache(model.config, policy, page_size=PAGE, prefill="quantized", **options)
        output = model.generate(**inputs, **with_cache(cache), max_new_tokens=30, do_sample=False, disable_compile=True)
        view = cache.stores[0].view()
        results.append((output, view.keys.first_at, view.keys.first))
    for grown, static in zip(*results, strict=True):
        assert torch.equal(grown, static)
    keys = cache.paged_layers[0].keys
    at = int(cache.stores[0].view().keys.first_at[1])
    assert torch.equal(keys.dense("test")[1, :, at], results[1][2][1, :, 0])


def test_a_copy_has_its_own() -> None:
    model = tiny_llama()
    cache = QuantizedPagedCache(model.config, "int4", page_size=PAGE, static=True, max_length=64)
    with torch.no_grad():
        model(prompt(2, 40), **with_cache(cache))
    twin = copy.deepcopy(cache)
    twin.reset()
    assert cache.stores[0].view().keys.first_at.tolist() == [0, 0]
    assert twin.stores[0].view().keys.first_at.tolist() == [-1, -1]
