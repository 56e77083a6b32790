"""What a calibration sees: the keys and values that attention gets, of every layer, and nothing of the text is kept."""

import gc
import weakref
from typing import Any

import pytest
import torch
from models import prompt, tiny_gemma2, tiny_gpt2, tiny_hybrid, tiny_llama, tiny_qwen2, tiny_t5
from transformers import DynamicCache, PreTrainedModel

from kvquant_hf.calibration import Statistics, collect
from kvquant_hf.errors import CalibrationError, UnsupportedModelError
from kvquant_hf.transformers_api.names import with_cache
from kvquant_hf.transformers_api.observe import ObservingCache

WINDOWS = prompt(3, 40)
MODELS = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "gemma2": tiny_gemma2,  # windows of 24 tokens, shorter than the text
    "gpt2": tiny_gpt2,
    "lfm2": lambda: tiny_hybrid("lfm2"),  # convolutions in turn with attention
    "qwen3-next": lambda: tiny_hybrid("qwen3-next"),
    "gemma4": lambda: tiny_hybrid("gemma4"),  # shared keys
    "deepseek-v3": lambda: tiny_hybrid("deepseek-v3"),  # latents
}


class Recording(DynamicCache):
    """transformers' own cache, which keeps what it is given."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.given: dict[tuple[int, str], torch.Tensor] = {}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        self.given |= {(layer_idx, "keys"): key_states, (layer_idx, "values"): value_states}
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def recorded(model: PreTrainedModel, ids: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
    cache = Recording(model.config)
    with torch.no_grad():
        model(ids, **with_cache(cache), use_cache=True)
    return cache.given


@pytest.mark.parametrize("name", list(MODELS))
def test_extremes_of_each_channel(name: str) -> None:
    """Against a plain reading with transformers' cache, window by window."""
    model = MODELS[name]()
    steps: list[int] = []
    found = collect(model, WINDOWS, {"text": "ids"}, lambda: steps.append(1))
    parts = [recorded(model, row) for row in WINDOWS.split(1)]
    assert {(layer, side) for layer in found.layers for side in ("keys", "values")} == set(parts[0])
    for layer, side in parts[0]:
        x = torch.cat([part[layer, side] for part in parts])
        low, high, absmax = found.of(layer, side)
        assert torch.equal(low, x.amin((0, 2))) and torch.equal(high, x.amax((0, 2)))
        assert torch.equal(absmax, x.abs().amax((0, 2)))
    assert len(steps) == 3 and found.facts == {"text": "ids"}


def test_logits_are_those_of_the_model() -> None:
    """Nothing in the forward pass changes because somebody watches."""
    model = tiny_gemma2()
    with torch.no_grad():
        watched = model(WINDOWS, **with_cache(ObservingCache(model.config, lambda *_: None)), use_cache=True).logits
        assert torch.equal(watched, model(WINDOWS).logits)


def test_nothing_of_the_text_is_kept() -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    cache = ObservingCache(tiny_llama().config, lambda layer, keys, values: held.append(weakref.ref(keys)))
    for layer in range(3):
        cache.update(torch.randn(1, 2, 8, 32), torch.randn(1, 2, 8, 32), layer)
    gc.collect()
    assert len(held) == 3 and all(reference() is None for reference in held)
    assert cache.get_seq_length() == 0


def test_bfloat16_is_collected_exactly() -> None:
    model = tiny_llama().bfloat16()
    found, x = collect(model, WINDOWS[:1]), recorded(model, WINDOWS[:1])
    assert torch.equal(found.of(1, "keys")[1], x[1, "keys"].float().amax((0, 2)))
    assert found.of(1, "keys")[1].dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = value
    with pytest.raises(CalibrationError, match=r"values of layer 1 are not finite; .*float32"):
        collect(model, WINDOWS)


def test_models_that_cannot_be_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedModelError, match="use a causal model"):
        collect(tiny_t5(), WINDOWS)
    model = tiny_llama()
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: None)
    with pytest.raises(CalibrationError, match="never updated the cache"):
        collect(model, WINDOWS)


def test_a_cache_of_another_shape_is_another_model() -> None:
    assert isinstance(collect(tiny_llama(), WINDOWS[:1]), Statistics)
    assert collect(tiny_llama(), WINDOWS[:1]).model != collect(tiny_qwen2(), WINDOWS[:1]).model
