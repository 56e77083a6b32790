"""Continuous batching with the real SmolLM2-135M."""

import copy
from typing import Any

import pytest
import torch
from batching.runs import GREEDY, batched, config_of
from models import chapters
from stores import seeing_no_queries

from kvquant_hf.batching.hooks import unsupported

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.skipif(bool(unsupported()), reason="this transformers is too old for it"),
]
NEW = 12


@pytest.mark.parametrize("policy", ["exact", "int4"])
def test_as_one_by_one(policy: str, smollm2: tuple[Any, Any]) -> None:
    """Four prompts of 20 to 333 tokens, float32: ``exact`` as ``DynamicCache``, others as ``QuantizedPagedCache``."""
    model, tokenizer = smollm2
    prompts = [tokenizer(text).input_ids[:n] for text, n in zip(chapters(3000), (20, 64, 129, 333), strict=False)]
    ours = (
        {} if policy == "exact" else {"cache_implementation": "kvquant", "cache_config": {"policy": policy, "sinks": 0}}
    )
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with seeing_no_queries():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), **options, **ours)
        alone.append(output[0, len(prompt) :].tolist())
    short = copy.copy(GREEDY)
    short.max_new_tokens = NEW
    found, report = batched(model, prompts, config_of(policy), short)
    assert found == alone
    assert report.prefill_calls == 4 * model.config.num_hidden_layers
    assert report.paged_calls >= (NEW - 1) * model.config.num_hidden_layers
