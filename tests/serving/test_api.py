"""What a client of OpenAI's package sees: answers, streams, settings, and each thing that is refused."""

from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion
from serving.servers import NAME, Served, alone, tiny_model, wait_until

TEXT = "What is a page?"
NEW = 12


def chat(served: Served, text: str = TEXT, **settings: Any) -> Any:
    options = {"model": NAME, "max_tokens": NEW} | settings
    return served.client.chat.completions.create(messages=[{"role": "user", "content": text}], **options)


def text_of(answer: ChatCompletion) -> str:
    return answer.choices[0].message.content or ""


@pytest.fixture(scope="module")
def expected(served: Served) -> str:
    return alone(tiny_model(), served.tokenizer, TEXT, NEW, "int4")


def test_a_chat(served: Served, expected: str) -> None:
    answer = chat(served)
    assert text_of(answer) == expected and len(expected) == NEW
    assert answer.choices[0].finish_reason == "length"
    prompt = len("user: What is a page? ")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, NEW)
    assert answer.model == NAME


def test_a_stream(served: Served, expected: str) -> None:
    chunks = list(chat(served, stream=True))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == expected
    assert sum(map(bool, texts)) > 1, "it came at once"
    assert chunks[-1].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == NEW


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion(served: Served, stream: bool) -> None:
    prompt = f"user: {TEXT} "
    answer = served.client.completions.create(model=NAME, prompt=prompt, max_tokens=NEW, stream=stream)
    text = "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text
    assert text == text_of(chat(served))


@pytest.mark.parametrize("stream", [False, True])
def test_a_response(served: Served, expected: str, stream: bool) -> None:
    answer = served.client.responses.create(model=NAME, input=TEXT, max_output_tokens=NEW, stream=stream)
    if stream:
        text = "".join(event.delta for event in answer if event.type == "response.output_text.delta")
    else:
        text = answer.output_text
    assert text == expected


def test_a_response_without_stream_is_one_object(served: Served, expected: str) -> None:
    """Its default is OpenAI's, not that of transformers."""
    assert served.client.responses.create(model=NAME, input=TEXT, max_output_tokens=NEW).output_text == expected


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_are_not_in_the_answer(served: Served, expected: str, stream: bool) -> None:
    stop = expected[4:6]
    answer = chat(served, stop=[stop, "never there"], stream=stream)
    if stream:
        chunks = list(answer)
        text, reason = "".join(x.choices[0].delta.content or "" for x in chunks), chunks[-1].choices[0].finish_reason
    else:
        text, reason = text_of(answer), answer.choices[0].finish_reason
    assert (text, reason) == (expected[: expected.index(stop)], "stop")


def test_settings_of_a_request_are_its_own(served: Served, expected: str) -> None:
    """One that draws, before and beside greedy ones, changes nothing for them, and its seed is heard."""
    drawn = [text_of(chat(served, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert text_of(chat(served, temperature=0)) == text_of(chat(served)) == expected
    favoured = chat(served, logit_bias={"40": 100})
    assert text_of(favoured) == chr(32 + 40) * NEW
    own = {"top_k": 1, "repetition_penalty": 1.0, "min_p": 0.0}
    assert text_of(chat(served, temperature=1.5, extra_body=own)) == expected


def test_an_end_that_is_not_asked_for(served: Served) -> None:
    """The last token is favoured above all: the answer is empty, unless the request ignores it."""
    end = {"model": NAME, "prompt": "x", "max_tokens": 3, "extra_body": {"ignore_eos": True}}
    config = '{"suppress_tokens": [], "sequence_bias": [[[95], 100.0]]}'
    body = {"generation_config": config}
    ended = served.client.completions.create(**{**end, "extra_body": body})
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    ignored = served.client.completions.create(**{**end, "extra_body": body | {"ignore_eos": True}})
    assert ignored.usage.completion_tokens == 3


def test_the_length_that_is_not_given_is_what_fits(served: Served) -> None:
    answer = served.client.completions.create(model=NAME, prompt="x" * 500, max_tokens=openai.omit)
    assert answer.usage.completion_tokens == 512 - 500


@pytest.mark.parametrize(
    ("settings", "status", "said"),
    [
        ({"n": 2}, 400, "n: input should be 1"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"temperature": 3}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 600}, 400, "the limit of this server is 512 tokens"),
        ({"stop": [""]}, 400, "stop"),
        ({"logit_bias": {"999999": 5}}, 400, "settings are refused"),
        ({"extra_body": {"no_such_field": 1}}, 400, "no_such_field"),
        ({"extra_body": {"generation_config": "{"}}, 400, "generation_config"),
        ({"extra_body": {"generation_config": '{"num_beams": 3}'}}, 400, "no beams"),
        ({"extra_body": {"chat_template_kwargs": {"chat_template": "x"}}}, 400, "chat_template cannot be given"),
        ({"model": "gpt-5"}, 404, "there is no model 'gpt-5' here; this server has 'tiny'"),
        ({"model": "/etc/passwd"}, 404, "there is no model"),
    ],
)
def test_what_is_wrong_is_said(served: Served, settings: dict[str, Any], status: int, said: str) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        chat(served, **settings)
    assert refused.value.status_code == status
    assert said in str(refused.value.body)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", b'{"messages": ['),
        ("chat/completions", b"[]"),
        ("chat/completions", b"{}"),
        ("chat/completions", b'{"messages": []}'),
        ("chat/completions", b'{"messages": [{"content": "no role"}]}'),
        ("chat/completions", b'{"messages": [{"role": "user", "content": 3}]}'),
        ("chat/completions", b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}'),
        ("completions", b'{"prompt": ["several", "texts"]}'),
        ("completions", b'{"prompt": ""}'),
        ("completions", b'{"prompt": "x", "suffix": 3}'),
        ("chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "tools": "none"}'),
        ("responses", b'{"input": ""}'),
        ("responses", b'{"input": [[1, 2]]}'),
        ("responses", b'{"input": "x", "instructions": true}'),
        ("responses", b'{"input": "x", "tools": [3]}'),
        ("responses", b'{"input": "x", "previous_response_id": "earlier"}'),
    ],
)
def test_malformed(served: Served, path: str, body: bytes) -> None:
    answer = httpx.post(f"{served.url}/v1/{path}", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_path_that_nobody_has_is_said_like_any_error(served: Served) -> None:
    answer = httpx.get(f"{served.url}/v1/embeddings")
    assert answer.status_code == 404 and answer.json()["error"]["message"] == "Not Found"


def test_parts_of_text_are_text(served: Served, expected: str) -> None:
    parts = [{"type": "text", "text": TEXT}]
    answer = served.client.chat.completions.create(
        model=NAME, max_tokens=NEW, messages=[{"role": "user", "content": parts}]
    )
    assert text_of(answer) == expected


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_streams_end_with_a_word(served: Served, path: str) -> None:
    body = {"prompt": "x"} if path == "completions" else {"messages": [{"role": "user", "content": "x"}]}
    whole = httpx.post(f"{served.url}/v1/{path}", json=body | {"max_tokens": 2, "stream": True}).text
    assert whole.endswith("\n\ndata: [DONE]\n\n") and whole.count("[DONE]") == 1


def test_models(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == [NAME]
    ready = httpx.post(f"{served.url}/load_model", json={"model": NAME}).text
    assert '"status": "ready"' in ready and '"cached": true' in ready
    other = httpx.post(f"{served.url}/load_model", json={"model": "/tmp"}).text
    assert '"status": "error"' in other and "there is no model" in other
    assert httpx.post(f"{served.url}/reset").status_code == 404, "a request may unload the model"


def test_health_and_numbers(served: Served) -> None:
    def report() -> dict[str, Any]:
        return httpx.get(f"{served.url}/kvquant/report").json()

    before = report()
    chat(served, "a" * 200, max_tokens=5)
    with pytest.raises(openai.BadRequestError):
        chat(served, n=2)
    wait_until(lambda: not served.app.ledger.live)
    after = report()
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    assert (after["model"], after["policy"], after["continuous_batching"]) == (NAME, "int4", True)
    assert after["tokens"]["generated"] - before["tokens"]["generated"] == 5
    assert after["tokens"]["prompt"] - before["tokens"]["prompt"] == 200 + len("user:  ")
    gained = {name: after["requests"][name] - before["requests"][name] for name in after["requests"]}
    assert gained == {"running": 0, "waiting": 0, "finished": 1, "failed": 0, "cancelled": 0, "refused": 1}
    kept = after["cache"]["cached_blocks"]
    assert kept >= 3 and after["most_used_blocks"] >= 3, "200 tokens are three sealed pages"
    assert after["bytes_held"] == kept * after["cache"]["bytes_per_block"]
    assert after["bytes_saved"] == after["dense_bytes"] - after["bytes_held"] > 0


def test_metrics(served: Served) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    chat(served)
    wait_until(lambda: not served.app.ledger.live)
    answer = httpx.get(f"{served.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert all(name.startswith("kvquant_") for name in families)
    values = {(sample.name, *sample.labels.values()): sample.value for x in families.values() for sample in x.samples}
    report = httpx.get(f"{served.url}/kvquant/report").json()
    assert values["kvquant_requests_total", "finished"] == report["requests"]["finished"] > 0
    assert values["kvquant_generated_tokens_total",] == report["tokens"]["generated"]
    assert values["kvquant_time_to_first_token_seconds_count",] >= report["requests"]["finished"]
    assert values["kvquant_time_per_output_token_seconds_sum",] > 0
    pages = [values[f"kvquant_pages_{kind}",] for kind in ("used", "kept", "free")]
    assert sum(pages) == report["cache"]["blocks"]
    assert values["kvquant_cache_bytes_saved",] == report["bytes_saved"]
