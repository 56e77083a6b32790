"""Keys and values of another floating dtype than those held, as ``torch.autocast`` around some calls makes them."""

import warnings
from typing import Any

import pytest
import torch
from models import OWN, prompt, tiny_falcon, tiny_gemma2, tiny_gpt2, tiny_llama
from stores import CPU_POLICIES, fill, make_store, vectors
from transformers import DynamicCache, PreTrainedModel

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.errors import CacheMismatchError, KVQuantFallbackWarning
from kvquant_hf.transformers_api.names import with_cache
from kvquant_hf.triton_kernels.ops import paged_attention

GREEDY = {"max_new_tokens": 5, "do_sample": False}
LAYOUTS: dict[str, dict[str, Any]] = {"paged": {}, "static": {"static": True, "max_length": 120}}
BUILDERS = {
    "llama": tiny_llama,
    "llama-own": lambda: tiny_llama(attention=OWN),
    "gemma2-own": lambda: tiny_gemma2(attention=OWN),
    "falcon-eager": lambda: tiny_falcon(attention="eager"),
    "gpt2": tiny_gpt2,
    "gpt2-own": lambda: tiny_gpt2(attention=OWN),
}
# Whose attention is multiplied out for, and rounds as it does with transformers.
OWN_ATTENTION = [name for name in BUILDERS if name not in ("llama", "gpt2")]


class RoundedCache(DynamicCache):
    """What is documented: new tokens are rounded to the dtype of the first, and readers get that of ``torch.cat``."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        layer = self.layers[layer_idx]
        new = [keys, values]
        if layer.is_initialized:
            new = [x.to(held.dtype) for x, held in zip(new, (layer.keys, layer.values), strict=True)]
        held = super().update(*new, layer_idx, *args, **kwargs)
        return tuple(x.to(torch.promote_types(x.dtype, y.dtype)) for x, y in zip(held, (keys, values), strict=True))


def run(model: PreTrainedModel, cache: Any, autocast: tuple[bool, ...]) -> torch.Tensor:
    """Logits of a prompt and of steps after it, each with autocast to bfloat16 or without."""
    logits = []
    for i, enabled in enumerate(autocast):
        ids = prompt(1, 40 if i == 0 else 1 + i % 3, seed=i)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits.append(model(ids, **with_cache(cache)).logits.float())
    return torch.cat(logits, 1)


@pytest.fixture(autouse=True)
def no_fallback_warning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KVQuantFallbackWarning)
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OWN_ATTENTION)
@pytest.mark.parametrize("first", [True, False], ids=["autocast-first", "autocast-later"])
def test_exact_is_the_dynamic_cache_that_is_documented(first: bool, name: str, layout: str) -> None:
    model = BUILDERS[name]()
    calls = (first, not first, not first, first, not first)
    cache = QuantizedPagedCache(model.config, "exact", page_size=16, **LAYOUTS[layout])
    # GPT-2 has no rotary keys: under autocast the first ones are bfloat16.
    theirs = (RoundedCache if first and name == "gpt2-own" else DynamicCache)(config=model.config)
    found, wanted = run(model, cache, calls), run(model, theirs, calls)
    # Sums over as many tokens are equal; static caches read to max_length, and windows end at a page.  There bfloat16
    # may be added up in another order: twice half the step of a number as large as the largest logit.
    equal = layout == "paged" and "gemma" not in name
    torch.testing.assert_close(found, wanted, rtol=0, atol=0 if equal else 2**-8 * float(wanted.abs().max()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", ["exact", "int4"])
@pytest.mark.parametrize("name", BUILDERS)
def test_generate_under_autocast_in_one_of_two_calls(name: str, policy: str, layout: str) -> None:
    model = BUILDERS[name]()
    for first in (True, False):
        cache = QuantizedPagedCache(model.config, policy, page_size=16, **LAYOUTS[layout])
        ids = prompt(1, 40)
        for enabled in (first, not first, first):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                ids = model.generate(torch.cat([ids, prompt(1, 3)], 1), **with_cache(cache), **GREEDY)
        assert cache.get_seq_length() == ids.shape[1] - 1
        held = torch.bfloat16 if first and "gpt2" in name else torch.float32
        assert cache.layers[0].store.dtypes == (held, held)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("policy", CPU_POLICIES)
@pytest.mark.parametrize("dtypes", ["bf16 over fp32", "fp16 over fp32", "fp32 over bf16", "fp32 over fp32 and bf16"])
def test_a_query_of_another_dtype(dtypes: str, policy: str, impl: Any) -> None:
    """The result is that of the same query in float32, rounded once."""
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    query_dtype, *held = (named[word] for word in dtypes.split() if word in named)
    keys, values = vectors(2, 2, 70, 64).to(held[0]), vectors(2, 2, 70, 64, seed=1).to(held[-1])
    view = fill(make_store(policy, keys, values, 16), keys, values).view()
    query = vectors(2, 4, 3, 64, seed=2).to(query_dtype)
    pages = (view.keys, view.values, view.page_table, view.lengths)
    out, wide = (paged_attention(q, *pages, scale=0.1, impl=impl) for q in (query, query.float()))
    assert out.dtype == query_dtype and wide.isfinite().all()
    assert torch.equal(out, wide.to(query_dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_returned_and_held(layout: str) -> None:
    config = tiny_llama().config
    new = {dtype: torch.randn(1, 2, 5, 32).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    for first in new:
        for then in new:
            cache = QuantizedPagedCache(config, "exact", prefill="quantized", **LAYOUTS[layout])
            theirs = DynamicCache(config=config)
            for dtype in (first, then):
                returned = cache.update(new[dtype], new[dtype], 0)
                expected = theirs.update(new[dtype], new[dtype], 0)
                assert [x.dtype for x in returned] == [x.dtype for x in expected]
                assert [x.clone().dtype for x in returned] == [x.dtype for x in expected]
            assert cache.layers[0].keys.dtype == first
            held = torch.cat([new[first], new[then].to(first)], 2)
            assert torch.equal(cache.layers[0].values[:, :, :10], held)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_beyond_the_range_of_what_is_held(layout: str) -> None:
    cache = QuantizedPagedCache(tiny_llama().config, "exact", **LAYOUTS[layout])
    x = torch.ones(1, 2, 4, 32)
    cache.update(x.half(), x.half(), 0)
    cache.update(1e6 * x, -1e6 * x, 0)
    assert cache.layers[0].keys.max() == 65504 and cache.layers[0].values.min() == -65504


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_no_matter_of_dtype_is_refused(layout: str) -> None:
    cache = QuantizedPagedCache(tiny_llama().config, "int4", **LAYOUTS[layout])
    x = torch.ones(1, 2, 4, 32)
    cache.update(x, x, 0)
    for other in (x.long(), x[..., :16].bfloat16(), x[:, :1].bfloat16(), x.to("meta").bfloat16()):
        for pair in ((other, x), (x, other)):
            with pytest.raises(CacheMismatchError, match=r"another model\?.*reset\(\)"):
                cache.update(*pair, 0)
    assert cache.layers[0].length == 4


def test_an_emptied_cache_takes_another_dtype_within_its_budget() -> None:
    model = tiny_llama()
    for empty in (lambda cache: cache.reset(), lambda cache: cache.crop(-40)):
        cache = QuantizedPagedCache(model.config, "exact", page_size=16, max_pages=4)
        run(model, cache, (False,))
        empty(cache)
        half = tiny_llama().bfloat16()
        with torch.no_grad():
            half(prompt(1, 40), **with_cache(cache))
        assert cache.report().dtype == "bfloat16" and cache.layers[0].keys.dtype == torch.bfloat16


def test_keys_and_values_of_two_dtypes_are_saved(tmp_path: Any) -> None:
    model = tiny_llama(num_hidden_layers=1)
    cache = QuantizedPagedCache(model.config, "exact", page_size=16)
    x = torch.randn(1, 2, 40, 32)
    cache.update(x.bfloat16(), x, 0)
    assert cache.layers[0].store.dtypes == (torch.bfloat16, torch.float32)
    cache.save(tmp_path / "cache")
    loaded = QuantizedPagedCache.load(tmp_path / "cache", model.config)
    assert torch.equal(run(model, loaded, (False,)), run(model, cache, (False,)))
    assert cache.report().dense_bytes == 2 * 32 * (40 + 40) * (2 + 4)


def test_in_a_graph() -> None:
    model = tiny_llama()
    caches = [QuantizedPagedCache(model.config, "int8", page_size=16, static=True, max_length=80) for _ in range(2)]
    for cache in caches:
        run(model, cache, (False,))
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = [
            step(prompt(1, 1), **with_cache(cache)).logits
            for step, cache in zip((model, compiled), caches, strict=True)
        ]
    assert torch.equal(*logits)
