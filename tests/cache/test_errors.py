"""Every wrong use: a named exception whose message ends with the remedy, and a cache that is as it was before."""

import json
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import OWN, prompt, ragged_prompts, tiny_llama, tiny_qwen2
from stores import logical_planes
from transformers import DynamicCache, MambaConfig, MambaForCausalLM, MistralConfig, PreTrainedModel
from transformers.cache_utils import QuantizedCache
from transformers.generation import configuration_utils, utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import kvquant_hf
from kvquant_hf import Int8PagedCache, QuantizedPagedCache, errors
from kvquant_hf.errors import KVQuantFallbackWarning
from kvquant_hf.policies.table import POLICIES
from kvquant_hf.transformers_api.names import cache_in, with_cache

GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama()


def state(cache: QuantizedPagedCache) -> list[Any]:
    """Everything that a refused call must not change."""
    stores = [[plane.tolist() for plane in logical_planes(store)] for store in cache.stores]
    versions = [(store.version, store.length, store.pool.used, store.batch_size) for store in cache.stores]
    return [stores, versions, cache.report().as_dict()]


@contextmanager
def refused(cache: QuantizedPagedCache, error: type[Exception], *remedies: str) -> Iterator[None]:
    """The block raises ``error``, one sentence with every remedy in it, and the cache stays as it is."""
    before = state(cache)
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert isinstance(caught.value, errors.KVQuantError) and type(caught.value) is error
    assert all(remedy in message for remedy in remedies), message
    assert "\n" not in message
    assert state(cache) == before


def forward(model: PreTrainedModel, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **with_cache(cache)).logits


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"policy": "int3"}, ["'int3'", *POLICIES, "0, 8, 4, 42"]),
        ({"policy": True}, ["True", *POLICIES]),
        ({"policy": "int8/int3"}, ["unknown values 'int3'", "int4-hadamard"]),
        (
            {"nbits": 4},
            [
                "'nbits'",
                "policy, bits, kv_budget, page_size, prefill, impl, sliding, sinks, max_pages, max_bytes, pool",
                "qparams",
            ],
        ),
        ({"page_size": 0}, ["page_size", "multiple of 8", "0"]),
        ({"page_size": 63}, ["multiple of 8", "63"]),
        ({"page_size": -64}, ["positive", "-64"]),
        ({"page_size": 64.0}, ["multiple of 8", "64.0"]),
        ({"page_size": "64"}, ["multiple of 8", "'64'"]),
        ({"sinks": -1}, ["sinks", "exact", "page of 64", "got -1", "use 0 to 63, or None"]),
        ({"sinks": 8, "page_size": 8}, ["page of 8", "got 8", "use 0 to 7"]),
        ({"sinks": True}, ["got True"]),
        ({"prefill": "fast"}, ["'fast'", "'exact'", "'quantized'"]),
        ({"sliding": "dynamic"}, ["'dynamic'", "'exact', 'quantized'"]),
        ({"impl": "cuda"}, ["'cuda'", "'auto', 'triton', 'cpu', 'reference'"]),
    ],
    ids=str,
)
def test_unknown_options(options: dict[str, Any], named: list[str], model: PreTrainedModel) -> None:
    """In the constructor, and through every name that ``generate`` knows."""
    calls: list[Callable[[], object]] = [
        lambda: QuantizedPagedCache(model.config, **options),
        lambda: model.generate(prompt(), **GREEDY, cache_implementation="kvquant", cache_config=options),
        lambda: model.generate(
            prompt(), **GREEDY, cache_implementation="quantized", cache_config={"backend": "kvquant"} | options
        ),
    ]
    for call in calls:
        with pytest.raises(errors.UnknownPolicyError) as caught:
            call()
        assert all(name in str(caught.value) for name in named), caught.value
        assert isinstance(caught.value, ValueError)
    with pytest.raises((errors.UnknownPolicyError, TypeError)):
        Int8PagedCache(model.config, **options)


def test_head_dim_that_the_codec_cannot_store() -> None:
    model = tiny_llama(head_dim=30)
    cache = QuantizedPagedCache(model.config, "int4")
    with refused(
        cache, errors.UnsupportedModelError, "'int4-ranked'", "multiple of 8", "has 30", "choose another policy"
    ):
        forward(model, cache, prompt())
    assert cache.get_seq_length() == 0
    assert forward(model, QuantizedPagedCache(model.config, "int4-channel/int4"), prompt()).isfinite().all()


# -- another batch, another model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_batch_size_changed(batch: int, model: PreTrainedModel) -> None:
    cache = QuantizedPagedCache(model.config, "int4")
    forward(model, cache, prompt(2, 100))
    with refused(cache, errors.BatchSizeError, f"batch of 2, the call has {batch}", "cache.reset()", "new cache"):
        forward(model, cache, prompt(batch, 1))
    forward(model, cache, prompt(2, 1))
    assert cache.get_seq_length() == 101
    cache.reset()
    forward(model, cache, prompt(batch, 100))
    assert cache.report().batch_size == batch


def test_generate_with_another_kind_of_model(model: PreTrainedModel) -> None:
    cache = QuantizedPagedCache(model.config, "int4")
    model.generate(prompt(), **with_cache(cache), **GREEDY)
    for other in (tiny_qwen2(), tiny_llama(num_hidden_layers=2), tiny_llama(num_key_value_heads=4)):
        with refused(cache, errors.WrongModelError, "made for the config", "'llama'", "make a cache from this model"):
            other.generate(prompt(1, 90), **with_cache(cache), **GREEDY)


def test_generate_with_another_instance_of_the_model(model: PreTrainedModel) -> None:
    cache = QuantizedPagedCache(model.config, "int4")
    model.generate(prompt(), **with_cache(cache), **GREEDY)
    other = tiny_llama(seed=1)
    with refused(cache, errors.WrongModelError, "filled by another model", "cache.reset()", "new cache"):
        other.generate(prompt(1, 90), **with_cache(cache), **GREEDY)
    cache.reset()
    expected = other.generate(prompt(1, 90), **with_cache(QuantizedPagedCache(model.config, "int4")), **GREEDY)
    assert torch.equal(other.generate(prompt(1, 90), **with_cache(cache), **GREEDY), expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kvquant", {}),
        ("quantized", {"backend": "kvquant"}),
    ],
)
def test_cache_made_by_generate_belongs_to_its_model(
    name: str, options: dict[str, str], model: PreTrainedModel
) -> None:
    options = {"cache_implementation": name, "cache_config": {"policy": "int4"} | options}
    cache = cache_in(model.generate(prompt(), **GREEDY, **options, return_dict_in_generate=True))
    with refused(cache, errors.WrongModelError, "filled by another model"):
        tiny_llama(seed=1).generate(prompt(1, 90), **with_cache(cache), **GREEDY)


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 4}, {"head_dim": 64}, {"num_key_value_heads": 1}], ids=str)
def test_forward_with_tensors_that_do_not_fit(changes: dict[str, int], model: PreTrainedModel) -> None:
    cache = QuantizedPagedCache(model.config, "int4")
    forward(model, cache, prompt(2, 100))
    with refused(cache, errors.CacheMismatchError, "filled by another model", "cache.reset()", "new cache"):
        forward(tiny_llama(**changes), cache, prompt(2, 1))


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_gradient_enabled(model: PreTrainedModel) -> None:
    cache = QuantizedPagedCache(model.config, "int8")
    forward(model, cache, prompt(1, 100))
    with refused(cache, errors.GradientError, "torch.no_grad()", "use_cache=False"):
        model(prompt(1, 1), **with_cache(cache))
    empty = QuantizedPagedCache(model.config, "int8")
    with refused(empty, errors.GradientError, "torch.no_grad()"):
        model(prompt(1, 100), **with_cache(empty))
    with torch.inference_mode():
        assert model(prompt(1, 1), **with_cache(cache)).logits.isfinite().all()
    frozen = tiny_llama().requires_grad_(False)
    assert frozen(prompt(1, 1), **with_cache(cache)).logits.isfinite().all()


# -- interruption ------------------------------------------------------------------------------------------------------


@contextmanager
def interrupted(model: PreTrainedModel, layer: int, step: int) -> Iterator[None]:
    """Ctrl-C arrives just before attention layer ``layer`` in the ``step``-th forward pass."""
    calls = []

    def stop(*_: object) -> None:
        calls.append(1)
        if len(calls) > step:
            raise KeyboardInterrupt

    handle = model.model.layers[layer].self_attn.register_forward_pre_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        handle.remove()
    assert len(calls) == step + 1


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("policy", ["exact", "int4"])
@pytest.mark.parametrize("tokens", [64, 100, 127], ids=lambda n: f"T{n}")
def test_interrupted_step(layer: int, policy: str, tokens: int, model: PreTrainedModel) -> None:
    """At 64 tokens the interrupted step has sealed a page in some layers only."""
    cache, calm = QuantizedPagedCache(model.config, policy), QuantizedPagedCache(model.config, policy)
    for each in (cache, calm):
        forward(model, each, prompt(2, tokens))
    more = prompt(2, 70, seed=1)
    with interrupted(model, layer, 0):
        forward(model, cache, more[:, :1])
    held = [each.get_seq_length() for each in cache.layers]
    assert held == [tokens + 1] * layer + [tokens] * (3 - layer)
    with refused(cache, errors.InterruptedForwardError, f"{tokens + 1}, {tokens} tokens", "rollback()", "reset()"):
        forward(model, cache, more[:, :1])
    assert cache.rollback() == tokens
    for i in range(70):
        assert torch.equal(forward(model, cache, more[:, i : i + 1]), forward(model, calm, more[:, i : i + 1])), i
    assert cache.report().reopened_pages == 0


@pytest.mark.parametrize("layer", [1, 2])
def test_interrupted_first_prefill(layer: int, model: PreTrainedModel) -> None:
    cache = QuantizedPagedCache(model.config, "int4")
    ids = prompt(2, 100)
    with interrupted(model, layer, 0):
        forward(model, cache, ids)
    with pytest.raises(errors.InterruptedForwardError, match=r"interrupted.*rollback"):
        forward(model, cache, ids)
    assert cache.rollback() == 0
    assert torch.equal(forward(model, cache, ids), forward(model, QuantizedPagedCache(model.config, "int4"), ids))
    with interrupted(model, layer, 0):
        forward(model, cache, ids[:, :1])
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.report().bytes == 0
    assert forward(model, cache, prompt(3, 70)).shape[0] == 3  # another batch size


@pytest.mark.parametrize("step", [0, 1, 30], ids=lambda n: f"step{n}")
@pytest.mark.parametrize("policy", ["exact", "int8"])
def test_interrupted_generate(step: int, policy: str, model: PreTrainedModel) -> None:
    """As in a notebook: the cell is stopped, and run again with the same cache."""
    inputs = ragged_prompts((50, 20))
    expected = model.generate(
        **inputs, **with_cache(QuantizedPagedCache(model.config, policy)), max_new_tokens=60, do_sample=False
    )
    cache = QuantizedPagedCache(model.config, policy)
    with interrupted(model, 2, step):
        model.generate(**inputs, **with_cache(cache), max_new_tokens=60, do_sample=False)
    reached = 50 + step - (step > 0)
    with pytest.raises(errors.InterruptedForwardError, match=r"cache\.rollback\(\).*cache\.reset\(\)"):
        model.generate(**inputs, **with_cache(cache), max_new_tokens=60, do_sample=False)
    assert cache.rollback() == (reached if step else 0)
    ids = expected[:, : 50 + step]  # what had been generated when it was stopped
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, step, dtype=torch.long)], 1)
    again = model.generate(
        input_ids=ids, attention_mask=mask, **with_cache(cache), max_new_tokens=60 - step, do_sample=False
    )
    assert torch.equal(again, expected)


def test_rollback_of_a_level_cache_changes_nothing(model: PreTrainedModel) -> None:
    cache = QuantizedPagedCache(model.config, "int4")
    assert cache.rollback() == 0
    forward(model, cache, prompt(1, 100))
    before = state(cache)
    assert cache.rollback() == 100 and state(cache) == before


# -- models and versions -----------------------------------------------------------------------------------------------


def test_models_without_a_cache_to_quantize(model: PreTrainedModel) -> None:
    mamba = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(errors.UnsupportedModelError, match=r"'mamba' has no layer to quantize.*use transformers'"):
        QuantizedPagedCache(mamba)
    for window in (None, 16):
        config = MistralConfig(num_hidden_layers=2, sliding_window=window)
        assert len(QuantizedPagedCache(config).paged_layers) == 2


def test_generate_of_a_model_without_cache_classes() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    with pytest.raises(errors.UnsupportedModelError, match="cache"):
        model.generate(prompt(), cache_implementation="kvquant", **GREEDY)
    assert model.generate(prompt(), pad_token_id=0, **GREEDY).shape == (1, 75)


# -- carriers and fallbacks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["append", "crop", "reorder", "reset"])
def test_stale_keys_are_refused(change: str, model: PreTrainedModel) -> None:
    cache = QuantizedPagedCache(model.config, "int8")
    forward(model, cache, prompt(2, 100))
    x = torch.randn(2, 2, 1, 32)
    keys, values = cache.update(x, x, 0)
    kept = cache.layers[0].keys
    assert keys.shape == (2, 2, 101, 32)
    {
        "append": lambda: cache.stores[0].append(x, x),
        "crop": lambda: cache.layers[0].crop(-1),
        "reorder": lambda: cache.layers[0].reorder_cache(torch.tensor([1, 0])),
        "reset": lambda: cache.layers[0].store.clear(),
    }[change]()
    for stale in (keys, values, kept):
        with pytest.raises(errors.StaleCarrierError, match="latest update"):
            stale + 0
    query = torch.randn(2, 4, 1, 32)
    with pytest.raises(errors.StaleCarrierError):
        AttentionInterface()["kvquant"](model.model.layers[0].self_attn, query, keys, values, None)


@pytest.mark.filterwarnings("always::kvquant_hf.errors.KVQuantFallbackWarning")
def test_fallback_is_said_once_per_cache() -> None:
    model = tiny_llama(attention=OWN)
    for _ in range(2):
        cache = QuantizedPagedCache(model.config, "int8")
        forward(model, cache, prompt(1, 100))  # exact prefill: nothing to multiply out
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                forward(model, cache, prompt(1, 1))
        ours = [str(w.message) for w in caught if issubclass(w.category, KVQuantFallbackWarning)]
        assert len(ours) == 1 and "read by aten." in ours[0]
        assert "set_attn_implementation('kvquant')" in ours[0] and "cache.report()" in ours[0]
        assert cache.report().fallback_calls == 9


def test_no_warning_in_pages(model: PreTrainedModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", KVQuantFallbackWarning)
        model.generate(prompt(), **with_cache(QuantizedPagedCache(model.config, "int8")), **GREEDY)


def test_positive_crop_is_refused(model: PreTrainedModel) -> None:
    cache = QuantizedPagedCache(model.config, "int8")
    forward(model, cache, prompt(1, 100))
    before = state(cache)
    with pytest.raises(ValueError, match=r"use crop\(-50\)"):
        cache.crop(50)
    assert state(cache) == before
    cache.crop(-50)
    assert cache.get_seq_length() == 50


# -- enable and disable ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["kvquant", "quantized"])
def test_name_and_cache_together_are_transformers_own_error(implementation: str, model: PreTrainedModel) -> None:
    for cache in (QuantizedPagedCache(model.config), DynamicCache(config=model.config)):
        with pytest.raises(ValueError, match="Passing both `cache_implementation`") as caught:
            model.generate(prompt(), **with_cache(cache), cache_implementation=implementation, **GREEDY)
        assert not isinstance(caught.value, errors.KVQuantError)


def patched() -> list[object]:
    """Every object that ``enable`` replaces."""
    return [
        configuration_utils.ALL_CACHE_IMPLEMENTATIONS,
        utils.GenerationMixin._prepare_cache_for_generation,
        utils.QuantizedCache,
        AttentionInterface()["sdpa"],
        AttentionInterface._global_mapping.get("kvquant"),
        AttentionMaskInterface._global_mapping.get("kvquant"),
    ]


def test_enable_is_idempotent() -> None:
    before = patched()
    kvquant_hf.enable()
    kvquant_hf.enable()
    assert all(a is b for a, b in zip(patched(), before, strict=True))
    assert configuration_utils.ALL_CACHE_IMPLEMENTATIONS.count("kvquant") == 1


def test_disable_restores_the_very_same_objects(model: PreTrainedModel) -> None:
    enabled = patched()
    kvquant_hf.disable()
    try:
        original = patched()
        kvquant_hf.disable()
        assert all(a is b for a, b in zip(patched(), original, strict=True))
        assert not any(a is b for a, b in zip(original, enabled, strict=True))
        assert utils.QuantizedCache is QuantizedCache and original[4:] == [None, None]
        for each in original[1:4]:
            assert each.__module__.startswith("transformers.")
        with pytest.raises(ValueError, match="kvquant"):
            model.generate(prompt(), cache_implementation="kvquant", **GREEDY)
        # A cache of ours still works where it is handed over: transformers' sdpa ends in torch's, which reads pages.
        cache = QuantizedPagedCache(model.config, "exact")
        assert torch.equal(model.generate(prompt(), **with_cache(cache), **GREEDY), model.generate(prompt(), **GREEDY))
        assert cache.report().paged_calls > 0
    finally:
        kvquant_hf.enable()
    kvquant_hf.disable()
    assert all(a is b for a, b in zip(patched(), original, strict=True))
    kvquant_hf.enable()
    output = model.generate(prompt(), cache_implementation="kvquant", return_dict_in_generate=True, **GREEDY)
    assert isinstance(cache_in(output), QuantizedPagedCache)


def test_other_names_pass_through(model: PreTrainedModel) -> None:
    expected = model.generate(prompt(), **GREEDY)
    for options in ({"cache_implementation": "dynamic"}, {"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(model.generate(prompt(), **GREEDY, **options), expected)
    with pytest.raises(ValueError, match=r"no such backend|Unknown quantization backend"):
        model.generate(
            prompt(), **GREEDY, cache_implementation="quantized", cache_config={"backend": "no such backend"}
        )


def test_reload_keeps_one_patch() -> None:
    """%autoreload of every module of the package, in a process of its own: classes are new afterwards."""
    script = """
        import importlib, json, sys
        import transformers.generation.utils as utils
        from transformers.generation import configuration_utils
        from transformers.modeling_utils import AttentionInterface
        watched = lambda: [configuration_utils.ALL_CACHE_IMPLEMENTATIONS, utils.QuantizedCache,
            utils.GenerationMixin._prepare_cache_for_generation, AttentionInterface()["sdpa"]]
        original = watched()
        import kvquant_hf
        for _ in range(2):
            names = sorted((n for n in sys.modules if n.startswith("kvquant_hf.")), key=lambda n: -n.count("."))
            for name in [*names, "kvquant_hf"]:
                importlib.reload(sys.modules[name])
        names = configuration_utils.ALL_CACHE_IMPLEMENTATIONS.count("kvquant")
        import torch
        from models import prompt, tiny_llama
        model = tiny_llama()
        output = model.generate(prompt(), max_new_tokens=3, do_sample=False, cache_implementation="kvquant",
            return_dict_in_generate=True)
        from kvquant_hf.transformers_api.names import cache_in
        new = type(cache_in(output)) is kvquant_hf.QuantizedPagedCache
        paged = cache_in(output).report().paged_calls
        kvquant_hf.disable()
        restored = [a is b for a, b in zip(watched(), original)]
        print(json.dumps({"names": names, "new": new, "paged": paged, "restored": restored}))
    """
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{textwrap.dedent(script)}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result == {"names": 1, "new": True, "paged": 6, "restored": [True] * 4}
