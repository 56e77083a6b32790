"""A crowd at a server of the real SmolLM2-135M: greedy answers are those of ``generate`` alone."""

import asyncio
import importlib.util
from typing import Any

import pytest
import torch
from stores import seeing_no_queries

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.batching.hooks import unsupported
from kvquant_hf.transformers_api.names import with_cache

MISSING = bool(unsupported()) or not importlib.util.find_spec("uvicorn")
pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.skipif(MISSING, reason="this transformers is too old, or the packages of a server are missing"),
]
SUBJECTS = ("a page", "a cache", "a key", "a value", "a kernel", "a token", "a prompt", "a layer")
TOKENS = 12


def alone(model: Any, tokenizer: Any, question: str, policy: str) -> str:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    cache = with_cache(QuantizedPagedCache(model.config, policy, prefill="quantized", sinks=0))
    with seeing_no_queries():
        output = model.generate(**prompt, **cache, max_new_tokens=TOKENS, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.full)])
def test_a_crowd(count: int, smollm2: tuple[Any, Any]) -> None:
    from serving.load import crowd
    from serving.servers import NAME, serving, wait_until

    model, tokenizer = smollm2
    questions = [f"What is {subject}? {'Think. ' * (2 * i)}" for i, subject in enumerate(SUBJECTS)]
    with torch.no_grad():
        expected = {question: alone(model, tokenizer, question, "int4") for question in questions}
    options: dict[str, Any] = {"policy": "int4", "prefill": "quantized", "kv_budget": 60_000_000, "max_concurrent": 12}
    with serving(model, tokenizer, **options) as served:
        found = asyncio.run(crowd(served.url, NAME, questions, TOKENS, "word " * 9000, count))
        assert found.statuses == {"left": count // 5, "400": count // 10, "answered": count * 7 // 10}
        assert found.greedy == {question: {expected[question]} for question in found.greedy} and found.greedy
        wait_until(lambda: not served.app.ledger.live and not served.app.engine.report().used_blocks)
        report = served.app.report()
        assert report["requests"]["failed"] == report["cache"]["live_requests"] == 0
        assert report["requests"]["finished"] == count * 7 // 10
