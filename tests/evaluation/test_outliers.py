"""Outlier keys: the same function, keys that hurt codecs per token, and an error where it would be another function."""

from typing import Any

import pytest
import torch
from models import _DECODER, build, prompt, tiny_gpt2, tiny_llama, tiny_qwen2
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig

from kvquant_hf.errors import EvaluationInputError, UnsupportedModelError
from kvquant_hf.evaluation import evaluate, paged, with_outlier_keys
from kvquant_hf.transformers_api.names import with_cache

FACTOR = 32.0


def tiny_qwen3() -> Any:
    """Queries and keys normalised per head, with weights that are not all one."""
    model = build("Qwen3", _DECODER)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    return model


def key_channels(model: Any) -> torch.Tensor:
    """Root mean square of the keys that a model caches, ``[layers, heads, head_dim]``."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(length=40), **with_cache(cache), use_cache=True)
    return torch.stack([layer.keys[0].square().mean(1).sqrt() for layer in cache.layers])


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_qwen3])
def test_the_same_function_with_other_keys(make: Any) -> None:
    model = make()
    twin = with_outlier_keys(model, FACTOR)
    with torch.no_grad():
        before, after = (m(prompt(batch=2), use_cache=False).logits for m in (model, twin))
    # A power of two rounds nothing, so what is left is the order of sums.
    assert torch.allclose(before, after, rtol=0, atol=float(before.abs().max()) * 1e-5)
    ratio = key_channels(twin) / key_channels(model)
    larger = ratio > FACTOR / 2
    assert larger.sum(-1).eq(4).all(), "two pairs of every head"
    assert torch.allclose(ratio[larger], torch.tensor(FACTOR), rtol=1e-3)
    assert torch.allclose(ratio[~larger], torch.tensor(1.0), rtol=1e-3)
    assert torch.equal(larger[..., :16], larger[..., 16:]), "channel i with channel i + head_dim / 2"
    assert twin.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    with torch.no_grad():
        assert torch.equal(model(prompt(batch=2), use_cache=False).logits, before), "the original was changed"


def test_the_documented_choice_of_channels() -> None:
    model = tiny_llama()
    twin = with_outlier_keys(model, 8, pairs=3, seed=5)
    larger = (key_channels(twin) / key_channels(model) > 4)[..., :16]
    for n in range(3):
        rows = torch.rand(2, 16, generator=torch.Generator().manual_seed(5000 + n)).argsort(dim=1)[:, :3]
        for head in range(2):
            assert larger[n, head].nonzero().flatten().tolist() == sorted(rows[head].tolist())


def test_they_hurt_a_scale_per_token_and_not_one_per_channel() -> None:
    """A scale per channel takes the factor up; one per token has to cover it."""
    model, windows = tiny_llama(), prompt(length=70)

    def mean(model: Any) -> dict[str, float]:
        contenders = [paged(model, policy, page_size=16) for policy in ("int8", "int8-token")]
        results = evaluate(model, windows, contenders, step=16, page_size=16)
        return {name: result.accuracy.kld_mean for name, result in results.items()}

    plain, hard = mean(model), mean(with_outlier_keys(model, FACTOR))
    assert hard["int8"] == pytest.approx(plain["int8"], rel=0.02)
    assert hard["int8-token"] > 10 * plain["int8-token"]


def tiny_gemma3() -> Any:
    """Norms that add one to their weights."""
    return Gemma3ForCausalLM(Gemma3TextConfig(**_DECODER)).eval()


def tiny_cohere() -> Any:
    """Rotary pairs (2 i, 2 i + 1)."""
    return build("Cohere", _DECODER)


def tiny_olmo2() -> Any:
    """Norms over all heads."""
    return build("Olmo2", _DECODER)


@pytest.mark.parametrize("make", [tiny_gemma3, tiny_cohere, tiny_olmo2])
def test_another_function_is_refused(make: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="--outliers"):
        with_outlier_keys(make(), FACTOR)


def test_fused_projections_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="k_proj"):
        with_outlier_keys(tiny_gpt2(), FACTOR)


@pytest.mark.parametrize("factor", [0.0, -2.0, 3.0, float("nan"), float("inf")])
def test_only_powers_of_two(factor: float) -> None:
    with pytest.raises(EvaluationInputError, match="power of two"):
        with_outlier_keys(tiny_llama(), factor)


@pytest.mark.parametrize("pairs", [0, 17])
def test_no_such_pairs(pairs: int) -> None:
    with pytest.raises(EvaluationInputError, match="1 to 16"):
        with_outlier_keys(tiny_llama(), FACTOR, pairs)
