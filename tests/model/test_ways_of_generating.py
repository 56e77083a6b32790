"""SmolLM2-135M with beams, prompt lookup, an assistant and early exit: `exact` is DynamicCache, `int4` finishes."""

import copy
from typing import Any

import pytest
import torch
from models import chapters
from transformers import DynamicCache

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.transformers_api.names import with_cache

pytestmark = [pytest.mark.model, pytest.mark.slow]

PROMPT, NEW = 70, 16
WAYS = ("beams", "lookup", "assistant", "early exit")


def options(way: str, model: Any) -> dict[str, Any]:
    if way == "beams":
        return {"num_beams": 4, "num_return_sequences": 2}
    if way == "lookup":
        return {"prompt_lookup_num_tokens": 5}
    if way == "early exit":
        return {"assistant_early_exit": 10}
    # An assistant that is often right, and not always: its draft comes from slightly other weights.
    assistant = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    return {"assistant_model": assistant}


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_generating(way: str, smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    text = chapters(3000)[0]
    ids = torch.tensor([tokenizer(text).input_ids[:PROMPT]])
    common = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    } | options(way, model)
    expected = model.generate(ids, **with_cache(DynamicCache(config=model.config)), **common)
    for policy in ("exact", "int4"):
        cache = QuantizedPagedCache(model.config, policy)
        generated = model.generate(ids, **with_cache(cache), **common)
        report = cache.report()
        if policy == "exact":
            assert torch.equal(generated, expected)
        assert generated.shape == expected.shape == (2 if way == "beams" else 1, PROMPT + NEW)
        assert report.fallback_calls == 0 and report.paged_calls > 0
        # All tokens but the last are held, and drafts that were not accepted are gone from every layer.
        assert {store.length for store in cache.stores} == {PROMPT + NEW - 1}
        if way == "beams":
            # The prompt's full page is held once however many beams read it.
            assert all(len(set(store.page_table[:, 0].tolist())) == 1 for store in cache.stores)
