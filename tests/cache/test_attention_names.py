"""A model loaded with any attention implementation reads pages, and is right; what is not ours passes through."""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import stand_ins
import torch
from models import prompt, tiny_falcon, tiny_gemma2, tiny_llama, tiny_windowed
from stand_ins import NAMES, with_attention
from transformers import DynamicCache, StaticCache, masking_utils
from transformers.modeling_utils import AttentionInterface

import kvquant_hf
from kvquant_hf import QuantizedPagedCache
from kvquant_hf.errors import KVQuantFallbackWarning
from kvquant_hf.transformers_api import eager
from kvquant_hf.transformers_api.attention import ROUTED
from kvquant_hf.transformers_api.names import cache_in, with_cache

NEW = {"max_new_tokens": 20, "do_sample": False}


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "mistral, windows": lambda: tiny_windowed("mistral"),
    "gemma3, windows in turn": lambda: tiny_windowed("gemma3"),
    "gemma2, softcap": tiny_gemma2,
    "gpt-oss, sinks": lambda: tiny_windowed("gpt-oss"),
}
# transformers' sdpa computes neither; its flex attention no sinks on a CPU.
WITHOUT = {("gemma2, softcap", "sdpa"), ("gpt-oss, sinks", "sdpa")}


def padded(length: int = 40) -> dict[str, torch.Tensor]:
    """Two prompts, the second with 15 tokens of padding."""
    ids = prompt(length=length, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :15] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", MODELS)
def test_pages_are_read_and_right(kind: str, name: str) -> None:
    """``exact`` pages, with padding, equal ``DynamicCache``; nothing is multiplied out."""
    if (kind, name) in WITHOUT:
        return _refused_by_transformers(kind, name)
    model = with_attention(MODELS[kind](), name)
    wanted = model.generate(**padded(), **NEW)
    cache = QuantizedPagedCache(model.config, "exact", page_size=8)
    assert torch.equal(model.generate(**padded(), **with_cache(cache), **NEW), wanted)
    report = cache.report()
    assert report.paged_calls == len(model.model.layers) * (NEW["max_new_tokens"] - 1)
    assert report.fallback_calls == 0


def _refused_by_transformers(kind: str, name: str) -> None:
    model = with_attention(MODELS[kind](), name)
    with warnings.catch_warnings(), pytest.raises((ValueError, AssertionError)):
        warnings.simplefilter("ignore")
        output = model.generate(**padded(), **NEW)
        wanted = with_attention(model, "eager").generate(**padded(), **NEW)
        assert torch.equal(output, wanted), "older versions leave it out"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["llama", "gemma3, windows in turn"])
def test_chunks_over_pages(kind: str, name: str) -> None:
    """Several queries over pages: the causal rule and windows of a FlashAttention call are arguments, no mask."""
    model = with_attention(MODELS[kind](), name)
    wanted = model.generate(**padded(), **NEW)
    cache = QuantizedPagedCache(model.config, "exact", page_size=8)
    got = model.generate(**padded(), **with_cache(cache), prefill_chunk_size=7, **NEW)
    assert torch.equal(got, wanted)
    assert cache.report().fallback_calls == 0


@pytest.mark.parametrize("name", NAMES)
def test_static(name: str) -> None:
    model = with_attention(tiny_llama(), name)
    wanted = model.generate(**padded(), **NEW)
    static = QuantizedPagedCache(model.config, "exact", page_size=8, static=True, max_length=64)
    if name == "flex_attention":
        try:
            theirs = StaticCache(config=model.config, max_cache_len=64)
            model.generate(**padded(), **with_cache(theirs), disable_compile=True, **NEW)
        except AttributeError:  # between 5.17 and 5.24 no static cache goes with a BlockMask
            with pytest.raises(AttributeError, match="contiguous"):
                model.generate(**padded(), **with_cache(static), disable_compile=True, **NEW)
            return
    assert torch.equal(model.generate(**padded(), **with_cache(static), disable_compile=True, **NEW), wanted)
    assert static.report().fallback_calls == 0


def test_disable_restores_every_name() -> None:
    kvquant_hf.disable()
    before = dict(AttentionInterface._global_mapping), AttentionInterface.get_interface
    kvquant_hf.enable()
    assert all(AttentionInterface._global_mapping[name] is not before[0][name] for name in ROUTED)
    assert AttentionInterface.get_interface is not before[1]
    kvquant_hf.disable()
    assert (dict(AttentionInterface._global_mapping), AttentionInterface.get_interface) == before
    kvquant_hf.enable()


def test_other_caches_meet_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    """``DynamicCache`` under eager never asks anything."""
    monkeypatch.setattr(eager, "_compare", lambda *_: pytest.fail("asked"))
    model = tiny_llama(attention="eager")
    model.generate(prompt(), **with_cache(DynamicCache(config=model.config)), **NEW)


def test_attention_weights_are_those_of_eager() -> None:
    """Only eager gives weights; where they are asked for, pages are multiplied out, and the report says why."""
    model = tiny_llama(attention="eager")
    options = NEW | {"return_dict_in_generate": True, "output_attentions": True, "max_new_tokens": 4}
    wanted = model.generate(prompt(), **options).attentions
    cache = QuantizedPagedCache(model.config, "exact", page_size=8)
    with pytest.warns(KVQuantFallbackWarning, match="attention weights"):
        got = model.generate(prompt(), **with_cache(cache), **options).attentions
    for step, other in zip(wanted, got, strict=True):
        for x, y in zip(step, other, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    assert cache.report().fallback_reasons == {"attention weights are asked for": 9}


@pytest.mark.filterwarnings("ignore::kvquant_hf.errors.KVQuantFallbackWarning")
def test_an_eager_function_of_another_kind_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does more than its arguments say, here by a scale that the module knows."""
    module = sys.modules[type(tiny_llama()).__module__]
    plain = module.eager_attention_forward

    def sharpened(module: torch.nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return plain(module, query * (1.1 + 0.1 * module.layer_idx), *args, **kwargs)

    monkeypatch.setattr(module, "eager_attention_forward", sharpened)
    model = tiny_llama(attention="eager")
    wanted = model.generate(prompt(), **NEW)
    cache = QuantizedPagedCache(model.config, "exact", page_size=8)
    assert torch.equal(model.generate(prompt(), **with_cache(cache), **NEW), wanted)
    report = cache.report()
    assert report.paged_calls == 0
    assert all("sharpened is no plain softmax attention" in reason for reason in report.fallback_reasons)


def test_int8_under_eager_is_what_it_is_under_sdpa() -> None:
    models = [tiny_llama(attention=name) for name in ("sdpa", "eager")]
    outputs = [
        model.generate(
            prompt(length=70), cache_implementation="kvquant", cache_config={"policy": "int8"},
            return_dict_in_generate=True, output_logits=True, **NEW
        )
        for model in models
    ]  # fmt: skip
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert cache_in(outputs[1]).report().paged_calls == cache_in(outputs[0]).report().paged_calls > 0


@pytest.mark.full
def test_the_real_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled by Inductor: minutes."""
    make_mask, function = stand_ins.REAL_FLEX
    monkeypatch.setattr(masking_utils, "create_block_mask", make_mask)
    stand_ins.register(flex_attention=function)
    try:
        model = with_attention(tiny_llama(), "flex_attention")
        wanted = model.generate(**padded(), **NEW)
        cache = QuantizedPagedCache(model.config, "exact", page_size=8)
        assert torch.equal(model.generate(**padded(), **with_cache(cache), **NEW), wanted)
        assert cache.report().fallback_calls == 0
    finally:
        stand_ins.register(flex_attention=stand_ins.flex)


# -- torch's own attention, called by a model itself -------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_falcon_reads_pages(static: bool) -> None:
    """Its attention knows no interface, and calls torch's; one key/value head for all query heads."""
    model = tiny_falcon()
    wanted = model.generate(**padded(), **NEW)
    options = {"static": True, "max_length": 64} if static else {}
    cache = QuantizedPagedCache(model.config, "exact", page_size=8, **options)
    assert torch.equal(model.generate(**padded(), **with_cache(cache), disable_compile=True, **NEW), wanted)
    report = cache.report()
    assert report.paged_calls == 3 * (NEW["max_new_tokens"] - 1)
    assert report.fallback_calls == 0


CALLS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "one query": (1, {}, True),
    "no mask": (5, {}, True),
    "scale": (5, {"scale": 0.3}, True),
    "mask": (5, {"attn_mask": (torch.arange(40) > 3).expand(1, 1, 5, 40)}, True),
    "the same number of queries": (40, {"is_causal": True}, True),
    "causal from the first key": (5, {"is_causal": True}, False),
    "a mask of two dimensions": (5, {"attn_mask": torch.arange(40).expand(5, 40) > 3}, False),
    "dropout": (5, {"dropout_p": 1e-9}, False),
}


@pytest.mark.filterwarnings("ignore::kvquant_hf.errors.KVQuantFallbackWarning")
@pytest.mark.parametrize("call", CALLS)
def test_torchs_own_attention(call: str) -> None:
    """Fused where pages can give it, dense where they cannot, and the same either way."""
    queries, options, fused = CALLS[call]
    cache = QuantizedPagedCache(tiny_llama().config, "exact", page_size=8, prefill="quantized")
    keys, values = torch.randn(2, 1, 2, 40, 32)
    packed = cache.update(keys, values, 0)
    query = torch.randn(1, 4, queries, 32)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    got = sdpa(query, *packed, enable_gqa=True, **options)
    torch.testing.assert_close(got, sdpa(query, keys, values, enable_gqa=True, **options), rtol=0, atol=1e-5)
    assert (cache.report().paged_calls, cache.report().fallback_calls) == ((1, 0) if fused else (0, 1))
