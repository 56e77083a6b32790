"""A policy of its own for each layer: what is stored where, pools, files, windows, and both halves of a cache."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from models import prompt, tiny_gemma2, tiny_hybrid, tiny_llama, tiny_t5
from stores import same_bytes
from transformers import PreTrainedModel

from kvquant_hf import Int8PagedCache, LayerwisePolicy, PagePools, QuantizedPagedCache
from kvquant_hf.errors import PoolMismatchError, SavedCacheError, WrongModelError
from kvquant_hf.policies.cost import page_cost
from kvquant_hf.policies.file import write_layers
from kvquant_hf.policies.fingerprint import fingerprint
from kvquant_hf.transformers_api.names import cache_in, with_cache

PAGE = 16
MIXED = LayerwisePolicy(["int8", "lloyd3-channel/lloyd3", "int4/turboquant"])


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_llama()


def generate(model: PreTrainedModel, cache: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    ids = prompt(batch=2) if ids is None else ids
    return model.generate(ids, **with_cache(cache), max_new_tokens=20, do_sample=False)


def codecs(cache: QuantizedPagedCache) -> list[tuple[str, str]]:
    """What the stores have really been made with."""
    return [(store.codecs[0].name, store.codecs[1].name) for store in cache.stores]


def test_each_layer_has_its_own(llama: PreTrainedModel) -> None:
    cache = QuantizedPagedCache(llama.config, MIXED, page_size=PAGE)
    generate(llama, cache)
    report = cache.report()
    assert codecs(cache) == [(policy.keys, policy.values) for policy in MIXED.layers]
    assert report.policy == "mixed" and "policy            mixed, pages of 16" in str(report)
    sealed = 2 * ((report.tokens - 1) // PAGE * PAGE)
    costs = [page_cost(policy, 32, heads=2, page_size=PAGE).bytes_per_token for policy in MIXED.layers]
    assert report.packed_bytes == sealed * sum(costs)
    assert report.page_bits_per_element == pytest.approx(
        page_cost(MIXED, 32, heads=2, page_size=PAGE).bits_per_element, rel=1e-12
    )


def test_the_same_in_all_layers_is_the_plain_policy(llama: PreTrainedModel) -> None:
    one, other = (
        QuantizedPagedCache(llama.config, policy, page_size=PAGE) for policy in ("int4", LayerwisePolicy(["int4"] * 3))
    )
    assert torch.equal(generate(llama, one), generate(llama, other))
    assert all(map(same_bytes, one.stores, other.stores))


def test_by_name_and_from_a_file(llama: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    write_layers(path, MIXED.as_dict()["layers"], fingerprint(llama.config), {})
    options: dict[str, Any] = {"cache_implementation": "kvquant", "return_dict_in_generate": True, "max_new_tokens": 3}
    for policy in (str(path), path, MIXED):
        output = llama.generate(prompt(), cache_config={"policy": policy, "page_size": PAGE}, **options)
        assert codecs(cache_in(output)) == [(layer.keys, layer.values) for layer in MIXED.layers]


def test_another_model_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    write_layers(path, MIXED.as_dict()["layers"], fingerprint(llama.config), {})
    other, deeper = tiny_llama(vocab_size=99), tiny_llama(num_hidden_layers=4)
    for make in (QuantizedPagedCache, PagePools):
        with pytest.raises(WrongModelError, match=r"tuned for the model .*99.*; make one with `kvquant tune`"):
            make(other.config, str(path))
    for count, model in ((4, deeper), (2, tiny_llama(num_hidden_layers=2))):
        with pytest.raises(WrongModelError, match=f"for 3 layers and the cache has {count} in pages"):
            QuantizedPagedCache(model.config, MIXED)


def test_forks_and_shared_pools(llama: PreTrainedModel) -> None:
    pools = PagePools(llama.config, MIXED, page_size=PAGE, max_bytes=10_000_000)
    first, second = (QuantizedPagedCache(llama.config, pool=pools) for _ in range(2))
    expected = generate(llama, QuantizedPagedCache(llama.config, MIXED, page_size=PAGE))
    assert torch.equal(generate(llama, first), expected) and torch.equal(generate(llama, second), expected)
    report = pools.report()
    assert report.policy == "mixed" and report.used_bytes == first.report().packed_bytes + second.report().packed_bytes
    assert QuantizedPagedCache(llama.config, LayerwisePolicy(MIXED.layers), pool=pools).policy == MIXED
    with pytest.raises(PoolMismatchError, match="policy='mixed', the cache asks for 'int4'"):
        QuantizedPagedCache(llama.config, "int4", pool=pools)
    fork = copy.deepcopy(first)
    assert codecs(fork) == codecs(first) and all(map(same_bytes, fork.stores, first.stores))
    first.reset()
    assert torch.equal(generate(llama, first), expected)


def test_save_and_load(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache = QuantizedPagedCache(llama.config, MIXED, page_size=PAGE)
    generate(llama, cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = QuantizedPagedCache.load(tmp_path / "cache.safetensors", llama.config)
    assert loaded.policy == MIXED and codecs(loaded) == codecs(cache)
    assert all(map(same_bytes, loaded.stores, cache.stores))
    assert torch.equal(*(generate(llama, each, prompt(batch=2, length=100)) for each in (cache, loaded)))
    with pytest.raises(SavedCacheError, match="'mixed' and Int8PagedCache is 'int8'"):
        Int8PagedCache.load(tmp_path / "cache.safetensors", llama.config)


def test_layers_with_windows_have_theirs() -> None:
    model = tiny_gemma2(attention="kvquant")
    count = len(QuantizedPagedCache(model.config).paged_layers)
    mixed = LayerwisePolicy(list(itertools.islice(itertools.cycle(["int8", "int4"]), count)))
    cache = QuantizedPagedCache(model.config, mixed, page_size=PAGE)
    assert cache.report().sliding_layers
    generate(model, cache)
    assert codecs(cache) == [(policy.keys, policy.values) for policy in mixed.layers]


def test_layers_of_other_kinds_have_none() -> None:
    model = tiny_hybrid("qwen3-next")
    count = len(QuantizedPagedCache(model.config).paged_layers)
    assert count < model.config.num_hidden_layers
    cache = QuantizedPagedCache(model.config, LayerwisePolicy(["int8"] * count), page_size=PAGE)
    generate(model, cache)
    assert codecs(cache) == [("int8-channel", "int8-affine")] * count
    with pytest.raises(WrongModelError, match=f"the cache has {count} in pages"):
        QuantizedPagedCache(model.config, LayerwisePolicy(["int8"] * (count + 1)))


def test_both_halves_of_an_encoder_decoder() -> None:
    model = tiny_t5()
    mixed = LayerwisePolicy(["int8", *["int4"] * (model.config.num_decoder_layers - 1)])
    output = model.generate(
        prompt(length=40),
        cache_implementation="kvquant",
        cache_config={"policy": mixed, "page_size": PAGE},
        return_dict_in_generate=True,
        max_new_tokens=5,
        do_sample=False,
    )
    for half in (cache_in(output).self_attention_cache, cache_in(output).cross_attention_cache):
        assert codecs(half) == [(policy.keys, policy.values) for policy in mixed.layers]
