"""cache.report() against tensors that are found without its help."""

import json
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from models import prompt, tiny_gemma2, tiny_llama
from stores import ONLINE, chunks
from transformers import LlamaConfig, PreTrainedConfig

from kvquant_hf import KVPolicy, QuantizedPagedCache
from kvquant_hf.policies.cost import page_cost
from kvquant_hf.transformers_api.names import with_cache

policies = pytest.mark.parametrize("policy", ONLINE)


def config(layers: int = 2, heads: int = 2, head_dim: int = 64) -> PreTrainedConfig:
    return LlamaConfig(
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads, hidden_size=heads * head_dim
    )


def append(cache: QuantizedPagedCache, tokens: int, batch: int = 1, heads: int = 2, head_dim: int = 64) -> None:
    """Random bf16 keys and values in every layer, as a forward pass would."""
    x = torch.randn(batch, heads, tokens, head_dim, dtype=torch.bfloat16)
    for layer in range(len(cache.layers)):
        cache.update(x, x, layer)


def tensors(thing: object, seen: set[int]) -> Iterator[torch.Tensor | np.ndarray]:
    """Every tensor and page table that hangs on an object, each once."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, (torch.Tensor, np.ndarray)):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors(value, seen)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from tensors(value, seen)
    elif type(thing).__module__.startswith("kvquant_hf"):
        yield from tensors(vars(thing), seen)


def walked_bytes(cache: QuantizedPagedCache) -> int:
    """Bytes of all storages below the paged layers; reference counts of the pool (4 bytes per page) are not cache."""
    storages = {}
    for found in tensors(cache.paged_layers, set()):
        if isinstance(found, torch.Tensor):
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
        elif found.ndim == 2:
            storages[found.ctypes.data] = found.nbytes
    return sum(storages.values())


@policies
@pytest.mark.parametrize("tokens", [1, 64, 65, 1000])
def test_bytes_are_those_of_the_tensors(policy: str, tokens: int) -> None:
    cache = QuantizedPagedCache(config(), policy)
    for part in chunks(tokens, 100):
        append(cache, part.stop - part.start, batch=3)
    _ = [store.page_table for store in cache.stores]
    report = cache.report()
    assert report.bytes == walked_bytes(cache) > 0
    assert (report.tokens, report.batch_size, report.paged_layers, report.other_layers) == (tokens, 3, 2, {})
    tables = 2 * (2 * 3 * ((tokens - 1) // 64) * 4 + 3 * 2 * 4)  # and lengths, layer by layer
    assert report.bytes == report.packed_bytes + report.open_page_bytes + report.unused_bytes + tables
    assert report.dense_bytes == 2 * 3 * tokens * 2 * 2 * 64 * 2 and report.elements == report.dense_bytes // 2
    assert report.dtype == "bfloat16"
    assert report.ratio == report.dense_bytes / report.bytes
    assert report.bits_per_element == 8 * report.bytes / report.elements


@policies
@pytest.mark.parametrize("page_size", [32, 64, 128])
def test_full_pages_cost_what_the_table_says(policy: str, page_size: int) -> None:
    cache = QuantizedPagedCache(config(), policy, page_size=page_size)
    append(cache, 1000, batch=2)
    report = cache.report()
    sealed = (1000 - 1) // page_size * page_size
    cost = page_cost(policy, 64, heads=2, page_size=page_size)
    assert report.packed_bytes / (2 * 2 * sealed) == pytest.approx(cost.bytes_per_token, rel=0.03)
    assert report.packed_bytes == 2 * 2 * sealed * cost.bytes_per_token  # in fact to the byte
    assert report.page_bits_per_element == pytest.approx(cost.bits_per_element, rel=1e-12)
    assert report.sealed_elements == 2 * 2 * sealed * 2 * 2 * 64


@pytest.mark.parametrize(
    ("policy", "pages", "held"), [("int8", 1.85, 1.8), ("int4", 3.5, 3.3), ("turboquant", 4.4, 4.2)]
)
@pytest.mark.parametrize("chunk", [4000, 1], ids=["bulk", "token-by-token"])
def test_promised_ratios_at_4000_tokens(policy: str, pages: float, held: float, chunk: int) -> None:
    """head_dim 64, 16 bit, batch 1: the open page and the pool's slack are what keeps ``held`` below ``pages``."""
    cache = QuantizedPagedCache(config(layers=1), policy)
    for part in chunks(4000, chunk):
        append(cache, part.stop - part.start)
    report = cache.report()
    assert report.tokens == 4000
    assert page_cost(policy, 64).ratio >= pages and 16 / report.page_bits_per_element >= pages
    assert report.ratio >= held
    assert report.ratio < 16 / report.page_bits_per_element


@pytest.mark.parametrize(("prompt_length", "batch"), [(1, 1), (1, 3), (1999, 1)])
def test_unused_bytes_stay_small_beyond_2000_tokens(prompt_length: int, batch: int) -> None:
    cache = QuantizedPagedCache(config(layers=1, heads=1), "turboquant")
    append(cache, prompt_length, batch, heads=1)
    worst = 0.0
    while cache.get_seq_length() < 6000:
        append(cache, 16, batch, heads=1)
        report = cache.report()
        if report.tokens > 2000:
            worst = max(worst, report.unused_bytes / report.bytes)
    assert 0 < worst < 0.10


def test_sequences_that_share_pages_are_counted_once() -> None:
    cache = QuantizedPagedCache(config(), "int4")
    append(cache, 200)
    alone = cache.report()
    cache.batch_repeat_interleave(4)
    report = cache.report()
    assert report.batch_size == 4 and report.packed_bytes == alone.packed_bytes
    assert report.open_page_bytes == 4 * alone.open_page_bytes
    assert report.elements == 4 * alone.elements and report.ratio > alone.ratio


def test_empty_cache_reports_zeros() -> None:
    report = QuantizedPagedCache(config(), "int4").report()
    assert (report.bytes, report.tokens, report.ratio, report.bits_per_element, report.page_bits_per_element) == (
        0,
    ) * 5
    assert str(report) and report.dtype == "" and json.dumps(report.as_dict())


def test_reset_gives_everything_back() -> None:
    cache = QuantizedPagedCache(config(), "int4")
    append(cache, 1000)
    cache.reset()
    assert cache.report().bytes == walked_bytes(cache) == 0 and cache.get_seq_length() == 0


def test_other_layers_are_listed_and_weighed() -> None:
    model = tiny_gemma2()
    cache = QuantizedPagedCache(model.config, "int8", sliding="exact")
    with torch.no_grad():
        model(prompt(2, 70), **with_cache(cache))
    report = cache.report()
    assert report.paged_layers == 2 and report.other_layers == {"DynamicSlidingWindowLayer": 2}
    sliding = [layer for layer in cache.layers if layer.is_sliding]
    assert report.other_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in sliding) > 0
    assert report.bytes == walked_bytes(cache)
    assert "2 paged, 2 DynamicSlidingWindowLayer" in str(report)


def test_calls_are_counted_by_path() -> None:
    model = tiny_llama()
    cache = QuantizedPagedCache(model.config, "int8")
    with torch.no_grad():
        model(prompt(1, 70), **with_cache(cache))
        model(prompt(1, 1), **with_cache(cache))
        model(prompt(1, 5), **with_cache(cache))
    report = cache.report()
    assert (report.prefill_calls, report.paged_calls, report.fallback_calls) == (3, 6, 0)  # three layers
    assert report.fallback_reasons == {}
    assert report.implementation == "cpu" and "6 in pages (cpu)" in str(report)
    assert report.implementation_reason == "" and "not used" not in str(report)


def test_json_and_text() -> None:
    cache = QuantizedPagedCache(config(), "int4")
    append(cache, 1000)
    report = cache.report()
    again = json.loads(json.dumps(report.as_dict()))
    assert again == report.as_dict()
    assert again["ratio"] == report.ratio and again["policy"] == "int4" and again["tokens"] == 1000
    lines = str(report).splitlines()
    assert len(lines) == len(report.rows()) and all(len(line) < 120 for line in lines)
    assert "int4, pages of 64 tokens" in lines[0]
    held = re.search(r"held +(\S+) kB against (\S+) MB in bfloat16: ratio (\S+)", str(report))
    assert held is not None
    assert float(held[1]) == pytest.approx(report.bytes / 1e3, rel=1e-3)
    assert float(held[2]) == pytest.approx(report.dense_bytes / 1e6, rel=1e-3)
    assert float(held[3]) == pytest.approx(report.ratio, abs=0.005)
    assert repr(cache) == f"QuantizedPagedCache(policy='int4', tokens=1000, bytes={report.bytes})"


def test_html_shows_the_policy_and_is_escaped() -> None:
    cache = QuantizedPagedCache(config(), KVPolicy("exact", "lloyd2"))
    cache._log.fallbacks["read by <script>alert('1')</script> & co"] = 1
    page = cache._repr_html_()
    assert "exact/lloyd2" in page and page == cache.report()._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page and "&amp; co" in page
    assert page.startswith("<table>") and page.count("<tr>") == page.count("</tr>") == len(cache.report().rows())
