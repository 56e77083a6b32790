"""generate() with a paged cache: "exact" is token for token DynamicCache, whatever the model and the decoding."""

import copy
import gc
import io
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from budgets import RELATIVE_NOISE
from models import DECODERS, OWN, prompt, ragged_prompts, tiny_gemma2, tiny_llama, tiny_t5
from stores import ONLINE, chunks, same_bytes
from ties import Margins
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, PreTrainedModel

from kvquant_hf import Int4PagedCache, Int8PagedCache, QuantizedPagedCache, TurboQuantPagedCache
from kvquant_hf.errors import KVQuantFallbackWarning
from kvquant_hf.reports.report import CacheReport
from kvquant_hf.transformers_api.names import cache_in, with_cache

PAGE, NEW = 16, 24  # every run seals pages while it generates
EXACT = {"policy": "exact", "page_size": PAGE}


def paged(model: PreTrainedModel, policy: str = "exact", **options: Any) -> QuantizedPagedCache:
    return QuantizedPagedCache(model.config, policy, page_size=PAGE, **options)


def generate(model: PreTrainedModel, cache: Any = None, seed: int = 7, **options: Any) -> torch.Tensor:
    """Token ids; ``cache`` None is transformers' default."""
    torch.manual_seed(seed)
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    if cache is not None:
        options |= with_cache(cache)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KVQuantFallbackWarning)
        return model.generate(**options)


def check_same(model: PreTrainedModel, page_size: int = PAGE, **options: Any) -> CacheReport:
    """Assert that the "exact" cache generates what DynamicCache does; the report of its cache.

    Greedy choices in float32 are none that rounding decides.  Below float32 attention is the model's own, on the same
    bits.  Beams and samples are compared as they are: a tie matters there only if it reaches the best beam, and where a
    random number falls between two sums that differ by 1e-6.
    """
    margins = Margins()
    greedy = not options.get("do_sample") and options.get("num_beams", 1) == 1
    expected = generate(model, **options, **margins.options)
    if greedy and model.dtype == torch.float32:
        margins.check()
    cache = QuantizedPagedCache(model.config, "exact", page_size=page_size)
    output = generate(model, cache, **options)
    assert output.shape == expected.shape and torch.equal(output, expected)
    new = expected[:, options["input_ids"].shape[1] :]
    assert len(new.unique()) > 5, "the model repeats itself; this comparison would not notice a wrong token"
    return cache.report()


def logits_through(model: PreTrainedModel, ids: torch.Tensor, cache: Any, chunk: int) -> torch.Tensor:
    """Logits of all tokens, ``chunk`` tokens per forward pass."""
    with torch.no_grad():
        parts = [model(ids[:, part], **with_cache(cache)).logits for part in chunks(ids.shape[1], chunk)]
    return torch.cat(parts, 1)


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_llama()


# -- decoding strategies -----------------------------------------------------------------------------------------------

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"input_ids": prompt(1, 70)},
    "greedy from one token": {"input_ids": prompt(2, 1), "max_new_tokens": 40},
    "left-padded": ragged_prompts(),
    "sampling": {**ragged_prompts(), "do_sample": True, "top_k": 20, "temperature": 1.5},
    "beams": {"input_ids": prompt(2, 100), "num_beams": 3},
    "beams, left-padded": {**ragged_prompts((70, 10)), "num_beams": 2, "length_penalty": 0.5},
    "beam sampling": {"input_ids": prompt(1, 60), "num_beams": 3, "do_sample": True},
    "several per prompt": {**ragged_prompts((70, 10)), "num_return_sequences": 3, "do_sample": True, "top_k": 0},
    "several beams back": {"input_ids": prompt(1, 100), "num_beams": 4, "num_return_sequences": 4},
    "prompt lookup": {"input_ids": prompt(1, 20).repeat(1, 5), "prompt_lookup_num_tokens": 4},
    "prefill in chunks": {"input_ids": prompt(1, 90), "prefill_chunk_size": 37},
    "prefill in chunks of a page": {**ragged_prompts((64, 35)), "prefill_chunk_size": PAGE},
}


@pytest.mark.parametrize("attention", ["sdpa", "kvquant", OWN])
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_exact_is_dynamic_cache(strategy: str, attention: str, llama: PreTrainedModel) -> None:
    llama.set_attn_implementation(attention)
    try:
        report = check_same(llama, **STRATEGIES[strategy])
    finally:
        llama.set_attn_implementation("sdpa")
    if attention == OWN:
        assert report.paged_calls == 0 and report.fallback_calls + report.open_calls > 0
    else:
        assert report.paged_calls >= 3 and report.fallback_calls == 0, report.fallback_reasons
    # A prompt of one token needs no exact prefill; in chunks, only the first of them is one.
    assert report.prefill_calls == (0 if strategy == "greedy from one token" else 3)


def test_assisted_decoding() -> None:
    model, assistant = tiny_llama(), tiny_llama()
    for parameter in assistant.parameters():  # nearly the same model: some candidates are taken, some refused
        parameter.data += 0.004 * torch.randn(parameter.shape)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = generate(model, input_ids=prompt(1, 60))
    plain, calls[:] = len(calls), []
    cache = paged(model)
    output = generate(model, cache, input_ids=prompt(1, 60), assistant_model=assistant)
    assert torch.equal(output, expected) and 8 < len(calls) < plain, "no candidate was taken, or none refused"
    report = cache.report()
    assert report.paged_calls > 0 and report.fallback_calls == 0


def test_multi_turn_reuse(llama: PreTrainedModel) -> None:
    cache = paged(llama)
    expected = DynamicCache(config=llama.config)
    ids = prompt(1, 40)
    for turn, new in enumerate((20, 3, 36)):
        ours = generate(llama, cache, input_ids=ids, max_new_tokens=new)
        ids = generate(llama, expected, input_ids=ids, max_new_tokens=new)
        assert torch.equal(ours, ids), f"turn {turn}"
        ids = torch.cat([ids, prompt(1, 17, seed=turn + 1)], 1)
    assert cache.get_seq_length() == 40 + 20 + 17 + 3 + 17 + 36 - 1
    assert cache.report().prefill_calls == 3  # the first turn only; later ones attend to what is stored


def test_reset_and_reuse_with_another_batch_size(llama: PreTrainedModel) -> None:
    cache = paged(llama)
    for inputs in (ragged_prompts(), {"input_ids": prompt(1, 80)}, ragged_prompts((90, 3))):
        assert torch.equal(generate(llama, cache, **inputs), generate(llama, **inputs))
        cache.reset()
    assert cache.report().bytes == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"])
def test_other_dtypes_multiplied_out(dtype: torch.dtype) -> None:
    """The model computes attention itself, on the very same keys and values: every bit is equal."""
    model = tiny_llama(attention=OWN).to(dtype)
    # The exact codec goes through float32, so in float64 no page may be sealed.
    page_size = 64 if dtype == torch.float64 else PAGE
    report = check_same(model, page_size, **ragged_prompts((40, 39, 30, 1)), output_logits=True)
    assert report.dtype == str(dtype).removeprefix("torch.") and report.fallback_calls + report.open_calls > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_other_dtypes_in_pages(dtype: torch.dtype) -> None:
    """Measured against the same weights in float32, pages are not further off than 1.5 times eager attention is."""
    model = tiny_llama(attention="eager").to(dtype)
    ids = prompt(2, 300)
    eager = logits_through(model, ids, DynamicCache(config=model.config), 30).double()
    model.set_attn_implementation("kvquant")
    cache = QuantizedPagedCache(model.config, "exact")
    paged = logits_through(model, ids, cache, 30).double()
    report = cache.report()
    assert report.fallback_calls == 0 and report.paged_calls + report.open_calls == 3 * 9
    reference = logits_through(model.float(), ids, DynamicCache(config=model.config), 30).double()
    assert rms(paged - reference) <= 1.5 * rms(eager - reference)


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "attention", "path"),
    [
        ("llama", "sdpa", "paged"),
        ("qwen2", "sdpa", "paged"),
        ("qwen2", "kvquant", "paged"),
        ("qwen2", "eager", "paged"),
        ("qwen2", OWN, "fallback"),
        ("gemma2", "eager", "paged"),
        ("gemma2", OWN, "fallback"),
        ("gemma2", "kvquant", "paged"),
        ("gpt2", "sdpa", "paged"),
        ("gpt2", "eager", "paged"),
        ("falcon", None, "paged"),
    ],
)
def test_models(name: str, attention: str | None, path: str) -> None:
    model = DECODERS[name](attention=attention)
    report = check_same(model, **ragged_prompts())
    layers = report.paged_layers
    assert layers + sum(report.other_layers.values()) == len(paged(model).layers)
    assert report.other_layers == {} and report.sliding_layers == ({"24": 2} if name == "gemma2" else {})
    assert report.prefill_calls == layers
    steps = layers * (NEW - 1)
    assert (report.paged_calls, report.fallback_calls) == ((steps, 0) if path == "paged" else (0, steps))
    # The reason names the first operation that touched the packed keys.
    assert bool(report.fallback_reasons) == (path == "fallback")
    assert all(reason.startswith("read by aten.") for reason in report.fallback_reasons)


def test_gemma2_needs_the_mask_and_the_softcap_of_every_layer() -> None:
    """The comparisons with Gemma2 above would notice if either was dropped: both change its tokens."""
    expected = generate(tiny_gemma2(attention="eager"), **ragged_prompts())
    for change in ({"attn_logit_softcapping": None}, {"sliding_window": 4096}):
        assert not torch.equal(generate(tiny_gemma2(attention="eager", **change), **ragged_prompts()), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("beams", [1, 2])
def test_encoder_decoder(attention: str, beams: int) -> None:
    model = tiny_t5(attention=attention)
    options = {**ragged_prompts((40, 11)), "num_beams": beams, "max_new_tokens": 90}
    # Greedily it repeats one token; so that sampled tokens depend on attention, compare logits as well.
    options |= {"do_sample": True, "temperature": 3.0, "output_logits": True, "return_dict_in_generate": True}
    expected = generate(model, **options)
    assert len(expected.sequences.unique()) > 20
    output = generate(model, **options, cache_implementation="kvquant", cache_config=EXACT)
    assert torch.equal(output.sequences, expected.sequences)
    # float32 rounding over three layers; leaving out the position bias or a mask moves logits by 1e-2.
    ours, theirs = torch.stack(output.logits), torch.stack(expected.logits)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    cache = cache_in(output)
    assert isinstance(cache, EncoderDecoderCache) and isinstance(cache.self_attention_cache, QuantizedPagedCache)
    # The cross half is read from the second step on; in the first, attention gets what has just been stored.
    for half, count in ((cache.self_attention_cache, 3 * 90), (cache.cross_attention_cache, 3 * 89)):
        assert isinstance(half, QuantizedPagedCache)
        report = half.report()
        assert (report.paged_calls + report.open_calls, report.fallback_calls) == (count, 0)


def test_encoder_decoder_with_packed_cross_attention() -> None:
    model = tiny_t5()
    inputs = {**ragged_prompts((40, 11)), "do_sample": True, "temperature": 3.0}
    own, cross = paged(model), paged(model)
    output = generate(model, EncoderDecoderCache(own, cross), **inputs)
    assert torch.equal(output, generate(model, **inputs))
    assert cross.get_seq_length() == 40 and own.get_seq_length() == NEW


# -- ways in -----------------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[PreTrainedModel, str], dict[str, Any]]] = {
    "past_key_values": lambda model, policy: with_cache(QuantizedPagedCache(model.config, policy)),
    "kvquant": lambda model, policy: {"cache_implementation": "kvquant", "cache_config": {"policy": policy}},
    "quantized": lambda model, policy: {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "kvquant", "policy": policy},
    },
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("policy", ["exact", "int4", "8"])
def test_ways_in(way: str, policy: str, llama: PreTrainedModel) -> None:
    inputs = ragged_prompts()
    output = generate(llama, **inputs, **WAYS[way](llama, policy), return_dict_in_generate=True)
    cache = cache_in(output)
    assert isinstance(cache, QuantizedPagedCache)
    assert cache.policy.name == {"8": "int8-token"}.get(policy, policy)
    assert cache.get_seq_length() == 70 + NEW - 1 and cache.report().batch_size == 4
    same = torch.equal(output.sequences, generate(llama, **inputs))
    assert same == (policy == "exact"), "a quantized cache that changes no token of 96 was not used"


@pytest.mark.parametrize(
    "way",
    [
        "kvquant",
        "quantized",
    ],
)
def test_cache_config_can_be_used_again(way: str, llama: PreTrainedModel) -> None:
    options = WAYS[way](llama, "int4")
    before = copy.deepcopy(options)
    outputs = [generate(llama, input_ids=prompt(), max_new_tokens=3, **options) for _ in range(2)]
    assert torch.equal(*outputs) and options == before


def test_cache_options_reach_the_cache(llama: PreTrainedModel) -> None:
    options = {"policy": "int8/int4", "page_size": 16, "prefill": "quantized"}
    for implementation, more in (("kvquant", {}), ("quantized", {"backend": "kvquant"})):
        cache = cache_in(
            generate(
                llama,
                input_ids=prompt(),
                cache_implementation=implementation,
                cache_config=options | more,
                return_dict_in_generate=True,
            )
        )
        assert (cache.policy.name, cache.page_size, cache.prefill) == ("int8-channel/int4-hadamard", 16, "quantized")
        assert cache.report().prefill_calls == 0


@pytest.mark.parametrize("way", ["kvquant", "quantized"])
def test_default_in_the_models_generation_config(way: str, tmp_path: Path) -> None:
    """Set once, saved and loaded with the model's generation config."""
    model = tiny_llama()
    ids = prompt(1, 70)
    expected = generate(model, input_ids=ids)
    for name, value in WAYS[way](model, "exact").items():
        setattr(model.generation_config, name, value)
    model.generation_config.save_pretrained(tmp_path)
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    for _ in range(2):
        output = generate(model, input_ids=ids, return_dict_in_generate=True)
        assert torch.equal(output.sequences, expected)
        assert isinstance(cache_in(output), QuantizedPagedCache)
    output = generate(model, input_ids=ids, use_cache=False)
    assert torch.equal(output, expected)


def test_named_classes(llama: PreTrainedModel) -> None:
    for cls, name in ((Int8PagedCache, "int8"), (Int4PagedCache, "int4"), (TurboQuantPagedCache, "turboquant")):
        cache = cls(llama.config, page_size=32)
        output = generate(llama, cache, **ragged_prompts())
        assert torch.equal(
            output, generate(llama, QuantizedPagedCache(llama.config, name, page_size=32), **ragged_prompts())
        )
        assert cache.policy.name == name and isinstance(cache, DynamicCache)


# -- what is quantized is close ----------------------------------------------------------------------------------------


class NoisyCache(DynamicCache):
    """Exact storage; all but the last page of tokens are read with noise of the size that theory gives a codec.

    Keys relative to the spread of their channel, values relative to the length of their token.  ``shared``: the values
    of all tokens have the same noise, as where a large bias is rounded over and over; it does not average out.
    """

    def __init__(self, model: PreTrainedModel, noise: tuple[float, float], shared: bool) -> None:
        super().__init__(config=model.config)
        self.noise, self.shared = noise, shared

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        exact = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        sealed = (exact[0].shape[2] - 1) // 64 * 64
        generator = torch.Generator().manual_seed(layer_idx)
        units = exact[0].std(2, keepdim=True), exact[1].square().mean(3, keepdim=True).sqrt()
        shapes = exact[0].shape, exact[1][:, :, : 1 if self.shared else None].shape
        read = []
        for x, size, unit, shape in zip(exact, self.noise, units, shapes, strict=True):
            noisy = x + torch.randn(shape, generator=generator) * size * unit
            read.append(torch.cat([noisy[:, :, :sealed], x[:, :, sealed:]], 2))
        return read[0], read[1]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_logits_are_close(name: str) -> None:
    """Measure: rms(logits - exact logits) over 400 tokens, teacher-forced by pages.

    Budget: what noise of the codecs' theoretical size does to the same model.  Noise that is independent from token to
    token averages out in attention, noise that all values share does not; the truth lies between, and half of the
    former is the least that a cache can show that really stores so few bits.
    """
    model = DECODERS[name](initializer_range=0.06)
    ids = prompt(2, 400)
    exact = logits_through(model, ids, DynamicCache(config=model.config), 64)
    errors = {}
    for policy, noise in RELATIVE_NOISE.items():
        noisy = [logits_through(model, ids, NoisyCache(model, noise, shared), 64) - exact for shared in (False, True)]
        cache = QuantizedPagedCache(model.config, policy, prefill="quantized")
        error = logits_through(model, ids, cache, 64) - exact
        assert rms(error[:, :64]) < 1e-5 * rms(exact)  # nothing is sealed yet: float32 rounding alone
        errors[policy] = rms(error)
        assert rms(noisy[0]) / 2 <= errors[policy] <= rms(noisy[1]), policy
    assert 0 < errors["int8"] < errors["int4"] / 4 and errors["int4"] < errors["turboquant"] < 0.5 * rms(exact)


@pytest.mark.parametrize("policy", ONLINE)
def test_a_page_at_a_time_is_token_by_token(policy: str) -> None:
    """A chunk of one page seals the page before it, as its first token alone would.

    In float64, where the model's own sums differ by 1e-16 between a chunk and single tokens: too little to change a
    code, so that what remains of the difference stays near 1e-13.  A single code that differed would show as 1e-4.
    """
    model = tiny_llama().double()
    ids = prompt(2, 4 * PAGE)
    caches = [paged(model, policy, prefill="quantized") for _ in range(2)]
    pages, single = (logits_through(model, ids, cache, chunk) for cache, chunk in zip(caches, (PAGE, 1), strict=True))
    assert (pages - single).abs().max() <= 1e-10 * single.abs().max()
    assert all(cache.report().prefill_calls == 0 for cache in caches)
    if policy != "exact":
        whole = logits_through(model, ids, paged(model, policy, prefill="exact"), 4 * PAGE)
        assert (whole - single)[:, PAGE:].abs().max() > 1e-3, "the prompt was attended to unquantized"


def test_exact_prefill_attends_to_the_exact_prompt() -> None:
    model = tiny_llama()
    ids = prompt(2, 300)
    with torch.no_grad():
        plain = model(ids).logits
    assert torch.equal(logits_through(model, ids, QuantizedPagedCache(model.config, "int4"), 300), plain)


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["exact", "int4"])
def test_deepcopy_forks(policy: str, llama: PreTrainedModel) -> None:
    """A prompt is prefilled once; every continuation of it shares its pages."""
    ids = prompt(1, 200)
    cache = QuantizedPagedCache(llama.config, policy)
    logits_through(llama, ids, cache, 200)
    twin = copy.deepcopy(cache)
    pools = [store.pool for store in cache.stores]
    assert [store.pool for store in twin.stores] == pools and [pool.used for pool in pools] == [3] * 3
    more = prompt(1, 90, seed=1)
    alone = logits_through(llama, more, copy.deepcopy(cache), 1)
    gc.collect()
    assert torch.equal(logits_through(llama, more, twin, 1), alone)
    assert [pool.used for pool in pools] == [3 + 1] * 3
    assert cache.get_seq_length() == 200 and twin.get_seq_length() == 290
    assert torch.equal(logits_through(llama, more, cache, 1), alone)
    assert twin.report().paged_calls == cache.report().paged_calls == 3 * 90  # each counts its own


def test_dropped_caches_free_their_memory_at_once(llama: PreTrainedModel) -> None:
    """Without waiting for the garbage collector: a notebook would run out of memory before it comes."""
    cache = QuantizedPagedCache(llama.config, "int4")
    logits_through(llama, prompt(1, 100), cache, 100)
    twin = copy.deepcopy(cache)
    pool, store = cache.stores[0].pool, weakref.ref(cache.stores[0])
    gc.collect()
    gc.disable()
    try:
        logits_through(llama, prompt(1, 100), twin, 50)
        del twin
        assert pool.used == 1
        del cache
        assert store() is None and pool.used == pool.nbytes == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("policy", ONLINE)
def test_save_and_load(policy: str, llama: PreTrainedModel) -> None:
    ids, more = prompt(2, 150), prompt(2, 70, seed=1)
    cache = QuantizedPagedCache(llama.config, policy)
    logits_through(llama, ids, cache, 150)
    file = io.BytesIO()
    torch.save(cache, file)
    assert file.tell() < 1.2 * cache.report().bytes + 20_000  # no model, no dense copy
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert all(map(same_bytes, loaded.stores, cache.stores)) and len(loaded.stores) == 3
    assert torch.equal(logits_through(llama, more, loaded, 1), logits_through(llama, more, cache, 1))
    assert loaded.stores[0].pool is not cache.stores[0].pool
    assert loaded.report().as_dict() == cache.report().as_dict()
    loaded.bind(llama)
