"""What a static cache refuses, and that it says so before anything has changed; padding, which only the host knows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import prompt, ragged_prompts, tiny_llama, tiny_t5
from stores import raw
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import utils as generation_utils

from kvquant_hf import Int4PagedCache, PagePools, QuantizedPagedCache
from kvquant_hf.errors import (
    CacheFullError,
    GradientError,
    InterruptedForwardError,
    SavedCacheError,
    StaticCacheError,
    UnknownPolicyError,
    UnsupportedModelError,
)
from kvquant_hf.transformers_api.names import cache_in, with_cache

PAGE = 16
STATIC = {"page_size": PAGE, "static": True}


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_llama(num_hidden_layers=2)


def test_options_that_do_not_go_together(llama: PreTrainedModel) -> None:
    config = llama.config
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"static": True}, "max_length tokens, got None; give"),
        ({"static": True, "max_length": 0}, "got 0; give"),
        ({"static": True, "max_length": True}, "got True; give"),
        ({"static": 1, "max_length": 64}, "static must be True or False, got 1"),
        ({"max_length": 64}, "add static=True"),
        ({"static": True, "max_length": 64, "max_pages": 9}, "leave max_pages out"),
        ({"static": True, "max_length": 64, "max_bytes": 9}, "leave max_bytes out"),
        ({"static": True, "max_length": 64, "offload": True}, "leave offload out"),
        ({"static": True, "max_length": 64, "pool": PagePools(config)}, "leave pool out"),
    ]
    for options, message in wrong:
        with pytest.raises(UnknownPolicyError, match=message):
            QuantizedPagedCache(config, **options)
    cache = Int4PagedCache(config, static=True, max_length=64)
    assert cache.max_length == 64 and cache.is_compileable


def test_full_is_said_before_generation_starts(llama: PreTrainedModel) -> None:
    cache = QuantizedPagedCache(llama.config, max_length=50, **STATIC)
    with pytest.raises(CacheFullError, match=r"takes 50 tokens and is to hold 51; .*larger max_length"):
        llama.generate(prompt(1, 32), **with_cache(cache), max_new_tokens=20)
    assert cache.report().tokens == 0
    llama.generate(prompt(1, 32), **with_cache(cache), max_new_tokens=19, do_sample=False)
    assert cache.report().tokens == 50  # the last token that is generated is not read


def test_full_is_said_by_a_step(llama: PreTrainedModel) -> None:
    """By the first layer, so that all stay level; in a graph as well."""
    cache = QuantizedPagedCache(llama.config, max_length=32, **STATIC)
    with torch.no_grad():
        llama(prompt(1, 32), **with_cache(cache))
        with pytest.raises(CacheFullError, match="takes 32 tokens and is to hold 33"):
            llama(prompt(1, 1), **with_cache(cache))
        step = torch.compile(llama.forward, fullgraph=True, backend="eager", dynamic=False)
        with pytest.raises(CacheFullError, match="takes 32 tokens and is to hold 33"):
            step(prompt(1, 1), **with_cache(cache))
    assert [store.length for store in cache.stores] == [32, 32]


def test_by_name_there_is_always_room(llama: PreTrainedModel) -> None:
    """``generate`` says how many tokens may come; never fewer than before, or as many as are asked for."""
    for backend in ({"cache_implementation": "kvquant"}, {"cache_implementation": "quantized"}):
        model = tiny_llama(num_hidden_layers=1)
        options: dict[str, Any] = {"policy": "int8"} | STATIC
        if backend["cache_implementation"] == "quantized":
            options["backend"] = "kvquant"
        held = []
        for new, more in ((20, {}), (5, {}), (30, {}), (5, {"max_length": 100})):
            output = model.generate(
                prompt(1, 30),
                generation_config=GenerationConfig(
                    max_new_tokens=new, cache_config=options | more, return_dict_in_generate=True, **backend
                ),
            )
            held.append(cache_in(output).max_length)
        assert held == [49, 49, 59, 100] and "max_length" not in options
    with pytest.raises(CacheFullError, match="takes 40 tokens and is to hold 49"):
        config = STATIC | {"policy": "int8", "max_length": 40}
        llama.generate(prompt(1, 30), max_new_tokens=20, cache_implementation="kvquant", cache_config=config)


def test_both_halves_of_an_encoder_decoder_are_static() -> None:
    model = tiny_t5()
    inputs = {"input_ids": prompt(2, 19), "max_new_tokens": 20, "do_sample": False}
    config = STATIC | {"policy": "exact"}
    output = model.generate(**inputs, cache_implementation="kvquant", cache_config=config, return_dict_in_generate=True)
    assert torch.equal(output.sequences, model.generate(**inputs))
    halves = cache_in(output).self_attention_cache, cache_in(output).cross_attention_cache
    assert [half.report().tokens for half in halves] == [20, 19]
    assert [[half.max_length, *(layer.max_length for layer in half.layers)] for half in halves] == [[20] * 4, [19] * 4]


def test_an_interrupted_step_is_noticed(llama: PreTrainedModel) -> None:
    cache = QuantizedPagedCache(llama.config, "exact", max_length=60, **STATIC)
    ids = prompt(1, 20)
    expected = llama.generate(ids, max_new_tokens=9, do_sample=False)
    llama.generate(ids[:, :15], **with_cache(cache), max_new_tokens=1)
    new = torch.randn(1, 2, 3, 32)
    cache.update(new, new, 0)  # and no other layer
    with pytest.raises(InterruptedForwardError, match=r"hold 18, 15 tokens; call cache.rollback\(\)"):
        llama.generate(ids, **with_cache(cache), max_new_tokens=9)
    assert cache.rollback() == 15
    assert torch.equal(llama.generate(ids, **with_cache(cache), max_new_tokens=9, do_sample=False), expected)


def test_what_would_change_the_memory_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache = QuantizedPagedCache(llama.config, max_length=40, **STATIC)
    llama.generate(prompt(2, 20), **with_cache(cache), max_new_tokens=5)
    with pytest.raises(StaticCacheError, match="without static=True"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(SavedCacheError, match="without static=True"):
        cache.save(tmp_path / "cache.safetensors")
    new = torch.randn(2, 2, 1, 32, requires_grad=True)
    with pytest.raises(GradientError):
        cache.update(new, new, 0)
    assert cache.report().tokens == 24 and not list(tmp_path.iterdir())


def test_a_model_that_looks_for_transformers_own_class(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    original = type(llama).prepare_inputs_for_generation

    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert not isinstance(cache_in(kwargs), generation_utils.StaticCache)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(llama), "prepare_inputs_for_generation", prepare)
    llama.generate(prompt(1, 9), **with_cache(QuantizedPagedCache(llama.config)), max_new_tokens=2)
    cache = QuantizedPagedCache(llama.config, max_length=40, **STATIC)
    with pytest.raises(UnsupportedModelError, match="StaticCache alone; leave static=True out"):
        llama.generate(prompt(1, 9), **with_cache(cache), max_new_tokens=2)


@pytest.mark.parametrize("policy", ["int4-channel/int4-hadamard", "int4-channel/octet2"])
@pytest.mark.parametrize("longest", [21, 49])
def test_padding_is_in_no_scale(llama: PreTrainedModel, policy: str, longest: int) -> None:
    """Sealed pages have the bytes of a cache that grows, those of padding alone apart; also pages that were open when
    the prompt ended, which are sealed when nobody looks at the padding any more."""
    lengths = (longest, longest - 13, 3)
    inputs = ragged_prompts(lengths)
    caches = [
        QuantizedPagedCache(llama.config, policy, page_size=PAGE),
        QuantizedPagedCache(llama.config, policy, max_length=longest + 40, **STATIC),
    ]
    outputs = [llama.generate(**inputs, **with_cache(c), max_new_tokens=40, do_sample=False) for c in caches]
    assert torch.equal(*outputs)
    assert all(layer.padding is None for layer in caches[1].paged_layers)
    compared = 0
    for paged, static in zip(*(cache.stores for cache in caches), strict=True):
        assert paged.sealed_pages == static.sealed_pages >= 3
        for row, length in enumerate(lengths):
            first = (longest - length) // PAGE  # the page in which the row begins
            for name in ("keys", "values"):
                sides = getattr(paged.view(), name), getattr(static.view(), name)
                tables = paged.page_table[row, first:], static.page_table[row, first : static.sealed_pages]
                for planes in zip(*(side.planes for side in sides), strict=True):
                    a, b = (raw(plane[table.long()]) for plane, table in zip(planes, tables, strict=True))
                    compared += a.numel()
                    assert torch.equal(a, b), (name, row)
    assert compared > 10_000
