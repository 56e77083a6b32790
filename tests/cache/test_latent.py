"""Layers that cache latents (MLA) attend to them in pages; what is not understood is multiplied out, and said."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import build, prompt, ragged_prompts, tiny_hybrid, tiny_llama
from ties import ROUNDING, Margins
from transformers import DynamicCache, PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

import kvquant_hf
from kvquant_hf import QuantizedPagedCache
from kvquant_hf.errors import KVQuantFallbackWarning
from kvquant_hf.transformers_api import latent
from kvquant_hf.transformers_api.names import with_cache

PAGE, NEW = 8, 20
_LATENT = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 24}
_BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_EXPERTS = {"n_routed_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
_EXPERTS |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "deepseek-v2": lambda: build("DeepseekV2", _BASE | _LATENT | _EXPERTS),
    "deepseek-v3": lambda: build("DeepseekV3", _BASE | _LATENT | _EXPERTS),
    "minicpm3": lambda: build("MiniCPM3", _BASE | _LATENT),
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MODELS[request.param]()


@pytest.fixture
def v3() -> PreTrainedModel:
    return MODELS["deepseek-v3"]()


def paged(model: PreTrainedModel, policy: str = "exact", **options: Any) -> QuantizedPagedCache:
    return QuantizedPagedCache(model.config, policy, page_size=PAGE, **options)


def generate(model: PreTrainedModel, **options: Any) -> torch.Tensor:
    return model.generate(**{"max_new_tokens": NEW, "do_sample": False} | options)


def read(model: PreTrainedModel, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **with_cache(cache)).logits


WAYS: dict[str, dict[str, Any]] = {
    "left-padded": ragged_prompts((60, 40, 3)),
    "chunks": {"input_ids": prompt(1, 60), "prefill_chunk_size": 23},
    "beams": {**ragged_prompts((40, 31)), "num_beams": 2},
}


@pytest.mark.parametrize("way", list(WAYS))
def test_exact_is_dynamic_cache(way: str, model: PreTrainedModel) -> None:
    options, margins, cache = WAYS[way], Margins(), paged(model)
    expected = generate(model, **options, **margins.options)
    if "num_beams" not in options:
        margins.check()
    with warnings.catch_warnings():
        warnings.simplefilter("error", KVQuantFallbackWarning)
        assert torch.equal(generate(model, **with_cache(cache), **options), expected)
    assert len(expected[:, options["input_ids"].shape[1] :].unique()) > 4
    report = cache.report()
    assert report.fallback_calls == 0 and report.paged_calls >= 2 * (NEW - 1) - report.open_calls > 0


def test_crop_and_fork(model: PreTrainedModel) -> None:
    ours, theirs, ids, more = paged(model), DynamicCache(config=model.config), prompt(2, 40), prompt(2, 9, seed=1)
    for cache in (ours, theirs):
        read(model, cache, ids)
        cache.crop(-5)
    fork = copy.deepcopy(ours)
    expected = read(model, theirs, more)
    for cache in (ours, fork):
        assert (read(model, cache, more) - expected).abs().max() <= ROUNDING * expected.abs().max()


@pytest.mark.parametrize("policy", ["int8", "int4", "kv2.4", "nvfp4"])
@pytest.mark.parametrize("static", [False, True], ids=["grows", "static"])
def test_absorbed_is_what_the_model_makes_of_the_pages(
    policy: str, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same pages, read by us and multiplied out for the model's own arithmetic: logits differ by rounding."""
    model = tiny_hybrid("deepseek-v3")
    options = {"static": True, "max_length": 64} if static else {}
    caches = [paged(model, policy, **options) for _ in range(2)]
    ids, more = prompt(2, 50), prompt(2, 3, seed=1)
    for cache in caches:
        read(model, cache, ids)
    absorbed = read(model, caches[0], more)
    monkeypatch.setattr(latent, "_refusal", lambda *_: "by hand")
    with pytest.warns(KVQuantFallbackWarning, match="by hand"):
        expanded = read(model, caches[1], more)
    reports = [cache.report() for cache in caches]
    assert [r.paged_calls for r in reports] == [2, 0] and reports[1].fallback_reasons == {"by hand": 2}
    assert (absorbed - expanded).abs().max() <= ROUNDING * expanded.abs().max()
    assert not torch.equal(absorbed, expanded)


def test_many_queries(v3: PreTrainedModel) -> None:
    """A long second turn makes keys and values of a block of pages at a time, and is no detour."""
    ours, theirs, ids, more = paged(v3), DynamicCache(config=v3.config), prompt(1, 40), prompt(1, 90, seed=1)
    for cache in (ours, theirs):
        read(v3, cache, ids)
    logits, expected = read(v3, ours, more), read(v3, theirs, more)
    assert (logits - expected).abs().max() <= ROUNDING * expected.abs().max()
    report = ours.report()
    assert (report.implementation, report.fallback_calls) == ("reference", 0)


@pytest.mark.parametrize("name", ["eager", "kvquant", "flash_attention_2"])
def test_other_attention_functions(name: str) -> None:
    from stand_ins import with_attention

    model, expected = MODELS["deepseek-v3"](), MODELS["deepseek-v3"]()
    with_attention(model, name)
    cache = paged(model)
    assert torch.equal(
        generate(model, **with_cache(cache), **WAYS["left-padded"]), generate(expected, **WAYS["left-padded"])
    )
    assert cache.report().fallback_calls == 0


def test_whoever_else_reads_them_gets_keys_and_values(v3: PreTrainedModel) -> None:
    """An attention function that knows nothing of pages, and weights that are asked for."""
    own = build("DeepseekV3", _BASE | _LATENT | _EXPERTS, attention="own")
    cache, ids = paged(own), prompt(1, 40)
    with pytest.warns(KVQuantFallbackWarning):
        output = generate(own, **with_cache(cache), input_ids=ids)
    assert torch.equal(output, generate(v3, input_ids=ids)) and cache.report().paged_calls == 0
    v3.set_attn_implementation("eager")
    cache = paged(v3)
    read(v3, cache, ids)
    with pytest.warns(KVQuantFallbackWarning, match="weights"), torch.no_grad():
        weights = v3(ids[:, :1], **with_cache(cache), output_attentions=True).attentions
    assert weights[0].shape == (1, 4, 1, 41)


def test_carriers_are_read_only_and_grow_stale(v3: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = v3.model.layers[0].self_attn
    cache = paged(v3)
    latents, rotary = torch.randn(2, 1, 20, 32), torch.randn(2, 1, 20, 8)
    cache.update(latents, rotary, 0)
    keys, values = layer.expand_kv(*cache.update(latents, rotary, 0))
    assert keys.shape == (2, 4, 40, 24) and values.shape == (2, 4, 40, 24) and keys.device == latents.device
    expected = layer.expand_kv(torch.cat((latents, latents), 2), torch.cat((rotary, rotary), 2))
    with pytest.warns(KVQuantFallbackWarning):
        assert torch.equal(keys.clone(), expected[0]) and torch.equal(values.clone(), expected[1])
    assert cache.report().fallback_calls == 1
    with pytest.raises(kvquant_hf.errors.CacheMismatchError, match="would write"):
        keys[..., 0] = 0.0
    stale = layer.expand_kv(*cache.update(latents, rotary, 0))[0]
    cache.update(latents, rotary, 0)
    with pytest.raises(kvquant_hf.errors.StaleCarrierError):
        stale.clone()


# -- what is not understood --------------------------------------------------------------------------------------------


class Adapted(torch.nn.Linear):
    """As an adapter or a quantized weight would be."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Packed(torch.Tensor):
    """A weight that is no plain tensor."""


def adapted(layer: Any) -> None:
    replaced = Adapted(32, layer.kv_b_proj.weight.shape[0], bias=False)
    replaced.weight = layer.kv_b_proj.weight
    layer.kv_b_proj = replaced


def packed(layer: Any) -> None:
    weight = layer.kv_b_proj.weight
    layer.kv_b_proj.weight = torch.nn.Parameter(weight.detach().as_subclass(Packed), requires_grad=False)


def biased(layer: Any) -> None:
    layer.kv_b_proj.bias = torch.nn.Parameter(torch.ones(layer.kv_b_proj.weight.shape[0]))


def hooked(layer: Any) -> None:
    layer.kv_b_proj.register_forward_hook(lambda module, args, output: output * 1.5)


ODD: dict[str, tuple[Callable[[Any], None], str]] = {
    "adapter": (adapted, "DeepseekV3Attention.kv_b_proj is a Adapted and no plain Linear"),
    "weight": (packed, "DeepseekV3Attention.kv_b_proj is a Linear of Packed and no plain Linear"),
    "bias": (biased, "DeepseekV3Attention.expand_kv is no product with the weight of kv_b_proj"),
    "hook": (hooked, "DeepseekV3Attention.expand_kv is no product with the weight of kv_b_proj"),
}


@pytest.mark.parametrize("kind", list(ODD))
def test_what_is_not_understood_is_multiplied_out(kind: str, v3: PreTrainedModel) -> None:
    change, reason = ODD[kind]
    for layer in v3.model.layers:
        change(layer.self_attn)
    cache = paged(v3)
    expected = generate(v3, input_ids=prompt(1, 40))
    with pytest.warns(KVQuantFallbackWarning, match=reason.replace(".", r"\.")):
        assert torch.equal(generate(v3, **with_cache(cache), input_ids=prompt(1, 40)), expected)
    report = cache.report()
    assert report.fallback_reasons == {reason: 2 * (NEW - 1)} and report.paged_calls == 0
    assert reason in str(report)


def test_a_layer_is_asked_again_when_its_projection_is_another(v3: PreTrainedModel) -> None:
    cache, ids, token = paged(v3), prompt(1, 40), prompt(1, 1)
    read(v3, cache, ids)
    read(v3, cache, token)
    assert cache.report().paged_calls == 2
    biased(v3.model.layers[0].self_attn)  # the module is the same one: asked before, not again
    adapted(v3.model.layers[1].self_attn)
    with pytest.warns(KVQuantFallbackWarning, match="Adapted"):
        read(v3, cache, token)
    assert cache.report().fallback_calls == 1


def test_classes_that_are_not_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another device, dims that nothing says, a method that raises: each is a reason, none an error."""
    layer: Any = MODELS["deepseek-v3"]().model.layers[0].self_attn
    original, (keys, rotary) = (
        latent._ORIGINALS[DeepseekV3Attention],
        (torch.zeros(1, 1, 1, 32), torch.zeros(1, 1, 1, 8)),
    )

    def why(method: Any = original, latents: torch.Tensor = keys) -> str:
        latent._ASKED.pop(layer, None)
        return latent._refusal(layer, method, latents, rotary)

    def broken(*_: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        assert "not compared before the graph was made" in why()
    assert why() == ""
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        assert why() == ""
    assert "not for latents of 16" in why(latents=keys[..., :16])
    assert "does not run on small latents (RuntimeError)" in why(broken)
    layer.qk_nope_head_dim = None
    assert "does not say what a head makes" in why()
    layer.qk_nope_head_dim = 16
    layer.kv_b_proj.to("meta")
    assert "torch.float32 on meta" in why()


def test_disable_restores_the_method() -> None:
    cache = paged(MODELS["deepseek-v3"]())
    original = latent._ORIGINALS[DeepseekV3Attention]
    assert vars(DeepseekV3Attention)["expand_kv"].__wrapped__ is original
    kvquant_hf.disable()
    try:
        assert vars(DeepseekV3Attention)["expand_kv"] is original
    finally:
        kvquant_hf.enable()
    assert vars(DeepseekV3Attention)["expand_kv"].__wrapped__ is original and cache.get_seq_length() == 0


def test_only_models_with_latents_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[type] = []
    monkeypatch.setattr(latent, "_modeling", lambda kind: looked.append(kind) or [])
    QuantizedPagedCache(tiny_llama().config)
    assert looked == []


def test_a_models_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config outside of transformers: the file beside it, if it is loaded."""
    import sys
    import types

    own = types.ModuleType("somewhere.modeling_own")
    exec("class Attention:\n    def expand_kv(self, kv_nope, k_rot): return kv_nope, k_rot\n", vars(own))
    kind = type("OwnConfig", (), {"__module__": "somewhere.configuration_own", "kv_lora_rank": 4})
    config: Any = kind()
    config.get_text_config = lambda decoder: config
    latent.know(config)  # not loaded: nothing to extend
    monkeypatch.setitem(sys.modules, "somewhere.modeling_own", own)
    monkeypatch.setattr(latent, "_ORIGINALS", {})
    latent.know(config)
    assert list(latent._ORIGINALS) == [own.Attention]
    assert own.Attention().expand_kv(1, 2) == (1, 2)
