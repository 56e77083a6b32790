"""Models whose layers are not all alike: linear attention, shared keys, latents, cross attention, images."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from budgets import attention_budget
from models import (
    HYBRIDS,
    VOCAB,
    prompt,
    ragged_prompts,
    tiny_bart,
    tiny_hybrid,
    tiny_llama,
    tiny_llava,
    tiny_t5,
    tiny_t5gemma,
    tiny_whisper,
)
from stores import ONLINE
from ties import Margins
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.errors import InterruptedForwardError, KVQuantFallbackWarning, RollbackError
from kvquant_hf.layers.attention import attend
from kvquant_hf.transformers_api.names import cache_in, with_cache

PAGE, NEW = 8, 25
EXACT = {"policy": "exact", "page_size": PAGE}


@pytest.fixture(autouse=True)
def _without_warnings() -> Iterator[None]:
    """MLA multiplies its latents out, which is said aloud; the tests count it instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KVQuantFallbackWarning)
        yield


def paged(model: PreTrainedModel, policy: str = "exact", **options: Any) -> QuantizedPagedCache:
    return QuantizedPagedCache(model.config, policy, page_size=PAGE, **options)


def generate(model: PreTrainedModel, seed: int = 7, **options: Any) -> Any:
    torch.manual_seed(seed)
    return model.generate(**{"max_new_tokens": NEW, "do_sample": False} | options)


def read(model: PreTrainedModel, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **with_cache(cache)).logits


# -- decoders ----------------------------------------------------------------------------------------------------------

STRATEGIES: dict[str, dict[str, Any]] = {
    "left-padded": ragged_prompts((60, 40, 3)),
    "chunks": {"input_ids": prompt(1, 90), "prefill_chunk_size": 37},
    "beams": {**ragged_prompts((40, 31)), "num_beams": 2},
    "prompt lookup": {"input_ids": prompt(1, 20).repeat(1, 3), "prompt_lookup_num_tokens": 4},
}


@pytest.fixture(scope="module", params=list(HYBRIDS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_hybrid(request.param)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_exact_is_dynamic_cache(strategy: str, model: PreTrainedModel) -> None:
    options, margins = STRATEGIES[strategy], Margins()
    cache = paged(model)
    if strategy == "prompt lookup" and model.config.model_type == "qwen3_next":
        for past in (
            None,
            cache,
        ):  # transformers refuses speculation for models with a recurrent state, whatever the cache
            with pytest.raises(ValueError, match="stateful"):
                generate(model, **with_cache(past), **options)
        return
    expected = generate(model, **options, **margins.options)
    if "num_beams" not in options:
        margins.check()
    assert torch.equal(generate(model, **with_cache(cache), **options), expected)
    assert len(expected[:, options["input_ids"].shape[1] :].unique()) > 5
    report = cache.report()
    assert report.paged_calls > 0 and report.fallback_calls == 0


def test_multi_turn_reset_and_another_batch_size(model: PreTrainedModel) -> None:
    ours = paged(model)
    for batch in (1, 3):
        theirs, ids = DynamicCache(config=model.config), prompt(batch, 40)
        for turn, new in enumerate((9, 20)):
            output = generate(model, input_ids=ids, **with_cache(ours), max_new_tokens=new)
            ids = generate(model, input_ids=ids, **with_cache(theirs), max_new_tokens=new)
            assert torch.equal(output, ids), f"turn {turn}"
            ids = torch.cat([ids, prompt(batch, 19, seed=turn + 1)], 1)
        ours.reset()
        assert ours.get_seq_length() == 0 and ours.report().bytes == ours.report().other_bytes == 0


@pytest.mark.parametrize("policy", ONLINE)
def test_every_policy_runs(policy: str, model: PreTrainedModel) -> None:
    cache = paged(model, policy)
    ids = prompt(2, 60)
    read(model, cache, ids[:, :50])
    logits, exact = read(model, cache, ids[:, 50:]), read(model, DynamicCache(config=model.config), ids)[:, 50:]
    error = (logits - exact).norm() / exact.norm()
    assert logits.isfinite().all() and error < (1e-4 if policy == "exact" else 1.0)
    assert policy == "exact" or error > 1e-4, "nothing was quantized"


def test_reorder_and_fork(model: PreTrainedModel) -> None:
    ours, theirs = paged(model), DynamicCache(config=model.config)
    for cache in (ours, theirs):
        read(model, cache, prompt(3, 40))
        cache.reorder_cache(torch.tensor([2, 0, 0]))
    fork = copy.deepcopy(ours)
    more = prompt(3, 12, seed=1)
    expected = read(model, theirs, more)
    for cache in (ours, fork):
        assert (read(model, cache, more) - expected).abs().max() <= 2e-5 * expected.abs().max()


# -- linear attention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize(
    ("name", "remedies"), [("qwen3-next", ("reset()", "reset()")), ("lfm2", ("activate_past_recording()", ""))]
)
def test_crop(name: str, remedies: tuple[str, str], record: bool) -> None:
    """A recurrent state cannot go back at all, a convolution only if asked before; the pages then stay as they are."""
    model = tiny_hybrid(name)
    cache, theirs, ids = paged(model), DynamicCache(config=model.config), prompt(1, 50)
    if record:
        cache.activate_past_recording()
    read(model, cache, ids)
    before = cache.report().as_dict()
    if remedies[record]:
        with pytest.raises(RollbackError) as caught:
            cache.crop(-3)
        assert remedies[record] in str(caught.value) and "LinearAttentionLayer" in str(caught.value)
        assert cache.report().as_dict() == before and cache.get_seq_length() == 50
    else:
        cache.crop(-3)
        read(model, theirs, ids[:, :47])
        ours, expected = (read(model, each, ids[:, 47:]) for each in (cache, theirs))
        assert (ours - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["qwen3-next", "lfm2"])
def test_rollback_says_that_a_state_cannot_go_back(name: str) -> None:
    model = tiny_hybrid(name)
    cache, ids = paged(model), prompt(1, 50)
    assert cache.rollback() == 0
    read(model, cache, ids)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[2].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        read(model, cache, ids[:, :1])
    handle.remove()
    with pytest.raises(InterruptedForwardError, match=r"51, 50 tokens"):
        read(model, cache, ids[:, :1])
    with pytest.raises(InterruptedForwardError, match=r"LinearAttentionLayer.*cache\.reset\(\)"):
        cache.rollback()
    cache.reset()
    assert torch.equal(read(model, cache, ids), read(model, paged(model), ids))


# -- shared keys and values, latents -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sliding", ["quantized", "exact"])
def test_layers_that_share_keys_hold_none(sliding: str) -> None:
    model = tiny_hybrid("gemma4")
    cache = paged(model, sliding=sliding)
    output = generate(model, **with_cache(cache), input_ids=prompt(2, 60))
    assert torch.equal(output, generate(model, input_ids=prompt(2, 60)))
    report = cache.report()
    assert report.paged_layers == (4 if sliding == "quantized" else 2)
    assert report.other_bytes > 0 if sliding == "exact" else report.other_bytes == 0
    layers = 6 if sliding == "quantized" else 3  # those without pages of their own read them too
    assert (report.paged_calls, report.fallback_calls) == (layers * (NEW - 1), 0)
    assert report.vectors["keys 2 x 32, values 2 x 32"] == 2


def test_latents_are_stored_as_they_come() -> None:
    model = tiny_hybrid("deepseek-v3").bfloat16()
    cache = QuantizedPagedCache(model.config, "int4", page_size=64)
    read(model, cache, prompt(1, 300))
    report = cache.report()
    assert report.vectors == {"latents 1 x 32, rotary keys 1 x 8": 2}
    assert "latents 1 x 32, rotary keys 1 x 8" in str(report)
    assert report.dense_bytes == 2 * 300 * (32 + 8) * 2 and report.packed_bytes < 0.45 * 2 * 256 * (32 + 8) * 2


@pytest.mark.parametrize("dims", [(192, 128), (96, 64), (40, 24), (64, 192)], ids=lambda d: f"{d[0]}-{d[1]}")
@pytest.mark.parametrize("policy", ONLINE)
def test_keys_and_values_of_different_sizes(policy: str, dims: tuple[int, int]) -> None:
    """As MLA would have them if its latents were expanded before they are stored."""
    # Nobody has seen a query when these pages are sealed, so the bounds of codecs hold.
    cache = QuantizedPagedCache(tiny_llama().config, policy, page_size=16, prefill="quantized")
    keys, values = (torch.randn(2, 2, 60, dim) for dim in dims)
    query = torch.randn(2, 4, 1, dims[0])
    packed = cache.update(keys, values, 0)
    assert packed[0].shape == keys.shape and packed[1].shape == values.shape
    output = attend(query, *packed, mask=None, scale=None, causal=True)
    k, v = (x.clone().double().repeat_interleave(2, 1) for x in packed)
    weights = (query.double() @ k.transpose(-1, -2) * dims[0] ** -0.5).softmax(-1)
    view = cache.stores[0].view()
    sides = [side._replace(tail=side.tail[:, :, : view.tail_length]) for side in view[:2]]
    budget = attention_budget(query, *sides, view.page_table, weights, weights @ v, scale=dims[0] ** -0.5)
    assert ((output.double() - weights @ v).norm(dim=-1) <= budget).all()


# -- encoder and decoder -----------------------------------------------------------------------------------------------

ENCODER_DECODERS: dict[str, Callable[..., PreTrainedModel]] = {
    "t5": tiny_t5,
    "bart": tiny_bart,
    "whisper": tiny_whisper,
    "t5gemma": tiny_t5gemma,
}
SEARCHES: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 3.0},
    "beams": {"num_beams": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


def encoder_inputs(name: str, batch: int = 2) -> dict[str, torch.Tensor]:
    if name == "whisper":
        return {"input_features": torch.randn(batch, 8, 80, generator=torch.Generator().manual_seed(0))}
    return ragged_prompts((60, 11)[:batch])


def seen_caches(model: PreTrainedModel) -> list[EncoderDecoderCache]:
    """The cache of each forward pass; some models return something else from ``generate``."""
    caches: list[EncoderDecoderCache] = []

    def remember(_: object, __: object, arguments: dict[str, Any]) -> None:
        caches.append(cache_in(arguments))

    model.register_forward_pre_hook(remember, with_kwargs=True)
    return caches


@pytest.mark.parametrize("attention", ["eager", "kvquant"])
@pytest.mark.parametrize("search", list(SEARCHES))
@pytest.mark.parametrize("name", list(ENCODER_DECODERS))
def test_encoder_decoder(name: str, search: str, attention: str) -> None:
    model = ENCODER_DECODERS[name](attention=attention)
    inputs = encoder_inputs(name, 1 if search == "prompt lookup" else 2)
    expected = generate(model, **inputs, **SEARCHES[search])
    caches = seen_caches(model)
    output = generate(model, **inputs, **SEARCHES[search], cache_implementation="kvquant", cache_config=EXACT)
    assert torch.equal(output, expected)
    assert search != "sampling" or len(expected.unique()) > 12
    own, cross = caches[-1].self_attention_cache, caches[-1].cross_attention_cache
    assert isinstance(own, QuantizedPagedCache) and len(own.layers) == len(cross.layers)
    assert isinstance(cross, QuantizedPagedCache) == (name != "t5gemma")
    assert cross.get_seq_length() == (40 if name == "whisper" else 60)
    for report in [half.report() for half in (own, cross) if isinstance(half, QuantizedPagedCache)]:
        assert report.fallback_calls == 0 < report.paged_calls
        assert report.policy == "exact" and report.page_size == PAGE


def test_cross_attention_is_quantized_and_its_first_step_exact() -> None:
    model = tiny_bart()
    model.config._attn_implementation = "kvquant"
    inputs = encoder_inputs("bart")
    options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 3}
    exact = generate(model, **inputs, **options)
    output = generate(model, **inputs, **options, cache_implementation="kvquant", cache_config={"policy": "int4"})
    first, second = ((a - b).abs().max() / b.abs().max() for a, b in zip(output.logits, exact.logits[:2], strict=False))
    assert first < 1e-5, "the first step attends to the encoder's output as it came"
    assert second < 1e-5, "60 tokens are less than a page, which stays exact"
    options["cache_config"] = {"policy": "int4", "page_size": PAGE}
    output = generate(model, **inputs, **options, cache_implementation="kvquant")
    first, second = ((a - b).abs().max() / b.abs().max() for a, b in zip(output.logits, exact.logits[:2], strict=False))
    assert first < 1e-5 and second > 1e-4
    own, cross = cache_in(output).self_attention_cache, cache_in(output).cross_attention_cache
    assert cross.report().policy == "int4" and cross.report().tokens == 60 and own.report().tokens == 3
    assert cross.report().packed_bytes == 3 * cross.stores[0].footprint().packed > 0
    assert cross.stores[0].sealed_pages == 7 and cross._log is not own._log


def test_encoder_decoder_crop_reset_and_reuse() -> None:
    model = tiny_bart(attention="kvquant")
    ids = prompt(2, 30)
    encoded = model.get_encoder()(ids)

    def decode(cache: Any, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(encoder_outputs=encoded, decoder_input_ids=tokens, **with_cache(cache)).logits

    ours = EncoderDecoderCache(paged(model), paged(model))
    tokens = prompt(2, 20, seed=1)
    for _ in range(2):
        theirs = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
        for cache in (ours, theirs):
            decode(cache, tokens[:, :12])
            cache.crop(-4)
            cache.reorder_cache(torch.tensor([1, 1]))
        assert ours.get_seq_length() == 8 and ours.cross_attention_cache.get_seq_length() == 30
        a, b = (decode(cache, tokens[:, 8:]) for cache in (ours, theirs))
        assert (a - b).abs().max() <= 2e-5 * b.abs().max()
        ours.reset()
        assert not any(ours.is_updated.values()) and ours.cross_attention_cache.get_seq_length() == 0


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "kvquant"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_images_in_the_prompt(attention: str, options: dict[str, Any]) -> None:
    model = tiny_llava()
    model.set_attn_implementation({"text_config": attention})
    inputs: dict[str, Any] = ragged_prompts((40, 11))
    inputs["input_ids"].clamp_(max=VOCAB - 2)
    inputs["input_ids"][:, -6:-2] = VOCAB - 1
    inputs["pixel_values"] = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected, cache = generate(model, **inputs, **options), paged(model)
    assert torch.equal(generate(model, **inputs, **options, **with_cache(cache)), expected)
    without = inputs | {"pixel_values": inputs["pixel_values"].flip(0)}
    assert not torch.equal(generate(model, **without, **options), expected), "the images do not matter"
    assert cache.report().fallback_calls == 0 < cache.report().paged_calls
