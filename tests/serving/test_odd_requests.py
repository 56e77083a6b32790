"""Whatever stands in the fields of a request: it is answered or refused, and the server is as it was."""

import random
from typing import Any

import httpx
import pytest
from serving.servers import NAME, Served, serving, wait_until

from kvquant_hf.errors import BatchingError

VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    1,
    -1,
    0.5,
    1e-45,
    1e308,
    10**30,
    "",
    "x",
    "é",
    "\0",
    "a" * 700,
    [],
    ["x"],
    [1],
)
VALUES += ({}, {"a": 1}, {"5": 3}, {"-1": 3}, {"5": 1e9}, [[1, 2]])
# Settings of transformers, right and wrong, which the server reads from JSON in a string.
CONFIGS = (
    '{"temperature": 0.5, "do_sample": true}',
    '{"temperature": -1, "do_sample": true}',
    '{"eos_token_id": [5, 6]}',
    '{"eos_token_id": "x"}',
    '{"eos_token_id": 99999}',
    '{"suppress_tokens": [99999]}',
    '{"bad_words_ids": [[3]], "min_new_tokens": 3}',
    '{"max_new_tokens": -3}',
    '{"max_length": 3}',
    '{"typical_p": 0.2, "eta_cutoff": 0.1, "epsilon_cutoff": 0.2, "do_sample": true}',
    '{"num_return_sequences": 3}',
    '{"begin_suppress_tokens": [1], "forced_bos_token_id": 3}',
    '{"stop_strings": ["a"]}',
    '{"cache_implementation": "static", "compile_config": {}}',
    '{"no_repeat_ngram_size": 2, "repetition_penalty": 1e30}',
    '{"watermarking_config": {"bias": 2}}',
    '{"sequence_bias": [[[1, 2], 3.0]]}',
    '{"exponential_decay_length_penalty": [1, 1e300]}',
    '{"continuous_batching_config": {"page_size": 3}}',
    '{"do_sample": "yes", "top_k": "x"}',
    "{",
    "[]",
)
BODIES: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    "completions": {"prompt": "hi there", "max_tokens": 4},
    "responses": {"input": "hi", "max_output_tokens": 4},
}
FIELDS = (
    *("temperature", "top_p", "seed", "stop", "frequency_penalty", "presence_penalty", "logit_bias", "top_k", "min_p"),
    *("repetition_penalty", "ignore_eos", "n", "logprobs", "stream", "max_tokens", "max_completion_tokens", "model"),
    *(
        "response_format",
        "tools",
        "tool_choice",
        "chat_template_kwargs",
        "user",
        "metadata",
        "stream_options",
        "suffix",
    ),
    *("messages", "prompt", "input", "max_output_tokens", "instructions", "reasoning", "text"),
)


@pytest.mark.parametrize("seed", range(4))
def test_odd_requests(seed: int, served: Served) -> None:
    draw = random.Random(seed)
    statuses = set()
    with httpx.Client(timeout=60) as client:
        for _ in range(60):
            path = draw.choice(list(BODIES))
            body = {**BODIES[path], **{draw.choice(FIELDS): draw.choice(VALUES) for _ in range(draw.randint(0, 2))}}
            if draw.random() < 0.4:
                body["generation_config"] = draw.choice((*CONFIGS, *VALUES))
            answer = client.post(f"{served.url}/v1/{path}", json=body)
            assert answer.status_code in (200, 400, 404), (path, body, answer.text)
            assert answer.status_code == 200 or answer.json()["error"]["message"], (path, body)
            statuses.add(answer.status_code)
        assert statuses >= {200, 400}
        wait_until(lambda: not served.app.ledger.live and not served.app.engine.report().used_blocks)
        assert client.get(f"{served.url}/health").json() == {"status": "ok"}
    assert served.client.completions.create(model=NAME, prompt="hi", max_tokens=3).usage.completion_tokens == 3


def test_a_request_that_comes_as_the_run_ends_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was asked for when all was well, and the queue no longer takes it: not the request is wrong."""
    with serving(policy="int4") as served:
        manager = served.app.engine._cb

        def ending(*args: Any, **settings: Any) -> None:
            error = BatchingError("the run has ended with an error (a broken weight)")
            manager.background_thread_status.record_fatal_error(error)
            raise error

        monkeypatch.setattr(manager, "add_request", ending)
        body = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
        found = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=30)
        assert found.status_code == 503, found.text
        assert not manager.output_router.result_handlers, "a handler is leaked"
