"""A cache that ``generate`` was given is used, or it is said."""

import warnings
from typing import Any

import pytest
import torch
import transformers
from models import prompt, tiny_llama, tiny_t5
from packaging.version import Version
from transformers import DynamicCache, Phi3Config, Phi3ForCausalLM

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.errors import KVQuantDroppedCacheWarning
from kvquant_hf.transformers_api.names import CACHE_ARGUMENT, cache_in, with_cache

# Before 5.20 transformers goes on with the last token alone where it should read all tokens again, with any cache.
READS_AGAIN = Version(transformers.__version__) >= Version("5.20")
ORIGINAL = 64  # tokens up to which the short rotary factors hold
NEW = {"max_new_tokens": 20, "do_sample": False}


def phi3() -> Phi3ForCausalLM:
    """Its rotary embedding changes beyond 64 tokens, and nothing that was cached before holds then."""
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    }
    config = Phi3Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters=rope,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    return Phi3ForCausalLM(config).eval()


WAYS = {
    "greedy": {},
    "chunked": {"prefill_chunk_size": 16},
    "beams": {"num_beams": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("length", [40, 50, 64, 65, 80], ids=lambda n: f"T{n}")
def test_phi3_beyond_its_original_length(length: int, way: str) -> None:
    """The prompt is below, at or beyond it, or generation crosses it: the tokens of ``DynamicCache``, in our pages."""
    model, ids = phi3(), prompt(length=length, batch=1 if way == "lookup" else 2)
    mask = torch.ones_like(ids)
    mask[-1, :5] = 1 if way == "lookup" else 0  # one sequence without padding is what it takes
    options = {"attention_mask": mask, "return_dict_in_generate": True} | NEW | WAYS[way]
    torch.manual_seed(1)
    wanted = model.generate(ids, **options).sequences
    cache = QuantizedPagedCache(model.config, "exact", page_size=8)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KVQuantDroppedCacheWarning)
        output = model.generate(ids, **with_cache(cache), **options)
    assert torch.equal(output.sequences, wanted)
    assert cache_in(output) is cache
    if READS_AGAIN or length > ORIGINAL:
        assert cache.get_seq_length() >= length + NEW["max_new_tokens"] - 1 - 3  # speculation may end on a crop
    crossed = length <= ORIGINAL < length + NEW["max_new_tokens"] - 1
    restarts = {"Phi3ForCausalLM.prepare_inputs_for_generation": 1} if crossed else {}
    if way != "lookup" and READS_AGAIN:  # speculation crosses where it guesses to
        assert cache.report().restarts == restarts
    assert cache.report().dropped == ""


@pytest.mark.parametrize("options", [{}, {"static": True}], ids=["dynamic", "static"])
@pytest.mark.parametrize("length", [50, 80], ids=lambda n: f"T{n}")
def test_phi3_by_name(length: int, options: dict[str, Any]) -> None:
    model, ids = phi3(), prompt(length=length)
    wanted = model.generate(ids, **NEW)
    output = model.generate(
        ids, cache_implementation="kvquant", cache_config={"policy": "exact", "page_size": 8} | options,
        disable_compile=True, return_dict_in_generate=True, **NEW
    )  # fmt: skip
    assert torch.equal(output.sequences, wanted)
    if READS_AGAIN or length > ORIGINAL:
        assert int(cache_in(output).get_seq_length()) == length + NEW["max_new_tokens"] - 1


def test_padding_stays_out_of_the_scales_after_a_restart() -> None:
    """What is read again is told which tokens are padding, as the first time."""
    model, ids = phi3(), prompt(length=60, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    whole = QuantizedPagedCache(model.config, "int4", page_size=8)
    model.generate(ids, attention_mask=mask, **with_cache(whole), **NEW)
    assert whole.report().restarts
    for layer in whole.paged_layers:
        assert layer.padding is not None
        assert layer.padding[1, :5].all() and not layer.padding[0].any()


def forward_without_cache(model: Any) -> None:
    """Make ``model`` a model whose ``forward`` makes a cache of its own."""
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get(CACHE_ARGUMENT), QuantizedPagedCache):
            kwargs[CACHE_ARGUMENT] = DynamicCache(config=model.config)
        return plain(*args, **kwargs)

    model.forward = forward


def prepare_without_cache(model: Any) -> None:
    """Make ``model`` a model whose preparation of inputs asks nobody, and hands on a cache of its own."""

    class Own(type(model)):  # type: ignore[misc]
        def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
            held = kwargs.get(CACHE_ARGUMENT)
            held = DynamicCache(config=self.config) if isinstance(held, QuantizedPagedCache) else held
            return {"input_ids": input_ids[:, held.get_seq_length() :], CACHE_ARGUMENT: held, "use_cache": True}

    Own.__name__ = type(model).__name__
    model.__class__ = Own


@pytest.mark.parametrize(
    ("spoil", "method"),
    [(forward_without_cache, "forward"), (prepare_without_cache, "prepare_inputs_for_generation")],
    ids=["forward", "prepare"],
)
@pytest.mark.parametrize("returned", [True, False], ids=["dict", "tokens"])
def test_a_model_that_drops_the_cache_is_named(spoil: Any, method: str, returned: bool) -> None:
    model = tiny_llama()
    wanted = model.generate(prompt(), **NEW)
    spoil(model)
    cache = QuantizedPagedCache(model.config, "int8")
    with pytest.warns(KVQuantDroppedCacheWarning, match=f"LlamaForCausalLM.{method} dropped it") as caught:
        output = model.generate(prompt(), **with_cache(cache), return_dict_in_generate=returned, **NEW)
    assert torch.equal(output.sequences if returned else output, wanted)
    assert len([w for w in caught if issubclass(w.category, KVQuantDroppedCacheWarning)]) == 1
    assert cache.report().dropped == f"LlamaForCausalLM.{method} dropped it and went on with a DynamicCache"
    assert "not used" in str(cache.report())


def test_a_cache_that_nobody_fills_is_said() -> None:
    model = tiny_llama()
    plain = model.forward
    model.forward = lambda *args, **kwargs: plain(*args, **kwargs | {CACHE_ARGUMENT: None, "use_cache": False})
    cache = QuantizedPagedCache(model.config, "int8")
    with pytest.warns(KVQuantDroppedCacheWarning, match="forward dropped it and filled no cache"):
        model.generate(prompt(), **with_cache(cache), max_new_tokens=1)


@pytest.mark.parametrize("make", [tiny_llama, tiny_t5], ids=["llama", "t5"])
def test_a_cache_that_is_used_says_nothing(make: Any) -> None:
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error", KVQuantDroppedCacheWarning)
        named = {"cache_implementation": "kvquant", "cache_config": {"policy": "int8"}}
        output = model.generate(prompt(), return_dict_in_generate=True, **named, **NEW)
    halves = (cache_in(output), getattr(cache_in(output), "self_attention_cache", None))
    ours = next(half for half in halves if isinstance(half, QuantizedPagedCache))
    assert (ours.report().dropped, ours.report().restarts) == ("", {})
