"""The harness on tiny models: it sees nothing where nothing is, damage where there is damage, and no cheating."""

from functools import partial
from typing import Any

import pytest
import torch
from models import OWN, prompt, tiny_gemma2, tiny_llama, tiny_qwen2
from readings import Damaged, same
from transformers import T5Config

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.errors import EvaluationError, EvaluationInputError, UnsupportedModelError
from kvquant_hf.evaluation import Contender, evaluate, paged
from kvquant_hf.evaluation.harness import weigh_paged
from kvquant_hf.policies.cost import page_cost
from kvquant_hf.transformers_api.names import with_cache

PAGE = 16
CONTEXT = 3 * PAGE + 5


def contenders(model: Any, *policies: str) -> list[Contender]:
    return [paged(model, policy, page_size=PAGE) for policy in policies]


def measure(model: Any, *policies: str, **options: Any) -> dict[str, Any]:
    windows = prompt(batch=3, length=CONTEXT)
    return evaluate(
        model, windows, contenders(model, *policies), **({"page_size": PAGE, "step": PAGE, "batch": 3} | options)
    )


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2, partial(tiny_gemma2, attention="kvquant")])
def test_exact_is_the_noise_floor(build: Any) -> None:
    results = measure(build(), "exact", "int8", "int4")
    exact, int8, int4 = (results[name].accuracy for name in ("exact", "int8", "int4"))
    assert abs(exact.kld_mean) < 1e-10 and exact.top1_agreement == 1
    assert exact.positions == 3 * (CONTEXT - 1)
    assert 100 * abs(exact.kld_mean) < int8.kld_mean < int4.kld_mean
    assert exact.perplexity == pytest.approx(exact.exact_perplexity, rel=1e-5)


def test_the_exact_model_is_a_plain_forward_pass() -> None:
    """What is compared with is read in chunks too; it must be what one forward pass without a cache gives."""
    model, windows = tiny_llama(), prompt(batch=2, length=CONTEXT)
    scores = evaluate(model, windows, contenders(model, "exact"), step=PAGE, page_size=PAGE)["exact"].scores
    with torch.inference_mode():
        log_p = model(windows, use_cache=False).logits.double().log_softmax(-1)
    loss = -log_p[:, :-1].gather(-1, windows[:, 1:, None]).squeeze(-1)
    assert torch.allclose(scores.exact_loss, loss, rtol=1e-4, atol=1e-5)
    assert torch.allclose(scores.loss, loss, rtol=1e-4, atol=1e-5)


def test_token_by_token_is_the_same() -> None:
    model = tiny_qwen2().double()
    policies = ("int8", "int4", "turboquant-qjl")
    chunked, stepped = measure(model, *policies), measure(model, *policies, step=1)
    for name in policies:
        assert same(chunked[name].scores.kld, stepped[name].scores.kld), name
        assert chunked[name].storage == stepped[name].storage
    assert chunked["int8"].accuracy.kld_mean > 1e-6


def test_a_chunk_that_straddles_pages_would_not_be_the_same() -> None:
    """The reason why a step must divide a page: such a chunk finds a part of itself sealed."""
    model = tiny_llama()
    windows, cache = prompt(length=2 * PAGE), paged(model, "int4", page_size=PAGE).make()
    with torch.inference_mode():
        aligned = evaluate(model, windows, contenders(model, "int4"), step=PAGE, page_size=PAGE)["int4"].scores
        exact = model(windows).logits.double().log_softmax(-1)
        output = [model(chunk, **with_cache(cache)).logits for chunk in windows.split(PAGE - 4, dim=1)]
    straddling = torch.cat(output, dim=1).double().log_softmax(-1)
    kld = (exact.exp() * (exact - straddling)).sum(-1)[:, : PAGE - 1]
    assert float(aligned.kld[:, : PAGE - 1].max()) < 1e-9
    assert float(kld.max()) > 1e-6


@pytest.mark.parametrize("batch", [1, 2])
def test_windows_side_by_side_are_the_same(batch: int) -> None:
    model = tiny_llama().double()
    all_at_once, fewer = measure(model, "exact", "int4"), measure(model, "exact", "int4", batch=batch)
    for name in fewer:
        assert same(all_at_once[name].scores.kld, fewer[name].scores.kld)
        assert all_at_once[name].storage.page_bits_per_element == fewer[name].storage.page_bits_per_element


def test_nothing_is_seen_before_the_first_page_is_sealed() -> None:
    kld = measure(tiny_llama(), "int4")["int4"].scores.kld
    assert float(kld[:, :PAGE].abs().max()) < 1e-9
    assert float(kld[:, PAGE:].median()) > 1e-6


def test_bits_are_measured() -> None:
    model = tiny_llama()
    for name, result in measure(model, "exact", "int4", "turboquant").items():
        cost = page_cost(name, 32, heads=2, page_size=PAGE, dtype=torch.float32)
        assert result.storage.page_bits_per_element == cost.bits_per_element
        assert (
            result.storage.elements == 3 * CONTEXT * 3 * 2 * 2 * 32
        )  # windows, tokens, layers, sides, heads, head_dim
        assert result.storage.bits_per_element > cost.bits_per_element
        assert result.as_dict()["page_bits_per_element"] == cost.bits_per_element


def test_a_damaged_page_is_seen() -> None:
    model = tiny_llama()
    make = lambda: Damaged(model.config, "exact", page_size=PAGE, prefill="quantized")  # noqa: E731
    damaged = Contender("damaged", make, weigh_paged)
    windows = prompt(batch=3, length=CONTEXT)
    results = evaluate(model, windows, [*contenders(model, "exact", "int8"), damaged], step=PAGE, page_size=PAGE)
    kld = results["damaged"].scores.kld
    assert float(kld[:, :PAGE].abs().max()) < 1e-9  # nothing was damaged yet
    assert results["damaged"].accuracy.kld_mean > max(0.2, 2 * results["int8"].accuracy.kld_mean)


def test_a_cache_that_is_not_read_is_refused() -> None:
    model = tiny_llama()
    exact_prefill = Contender("x", lambda: QuantizedPagedCache(model.config, "int4", page_size=PAGE), weigh_paged)
    with pytest.raises(EvaluationError, match="prefill='quantized'"):
        evaluate(model, prompt(length=CONTEXT), [exact_prefill], step=PAGE, page_size=PAGE)


def test_a_cache_that_multiplies_out_is_counted() -> None:
    """The numbers are the same, and the detour is told."""
    with pytest.warns(UserWarning, match="multiplied out"):
        own = measure(tiny_llama(attention=OWN), "int8")["int8"]
    assert own.storage.fallback_calls == 3 * 4  # layers, chunks
    assert own.accuracy.kld_mean == pytest.approx(measure(tiny_llama(), "int8")["int8"].accuracy.kld_mean, rel=1e-2)


@pytest.mark.parametrize("step", [0, 3, 2 * PAGE])
def test_a_step_divides_a_page(step: int) -> None:
    with pytest.raises(EvaluationInputError, match="divisor"):
        measure(tiny_llama(), "exact", step=step)


def test_models_that_cannot_be_read_in_windows() -> None:
    model = tiny_llama()
    model.config = T5Config()
    with pytest.raises(UnsupportedModelError, match="encoder"):
        evaluate(model, prompt(), [])
    model = tiny_llama()
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **(kwargs | {"use_cache": False}))
    with pytest.raises(UnsupportedModelError, match="no KV cache"):
        evaluate(model, prompt(), [])


def test_every_forward_pass_is_told() -> None:
    told: list[str] = []
    measure(tiny_llama(), "exact", "int8", advance=told.append, batch=2)
    assert told == ["", "exact", "int8"] * 4 * 2
