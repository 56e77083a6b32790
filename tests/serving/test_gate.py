"""Who may ask, how many at once, and what becomes of requests whose clients go away."""

import asyncio
import json
import socket
from typing import Any

import httpx
import openai
import pytest
from serving.servers import NAME, Served, serving, wait_until

BODY = {"model": NAME, "messages": [{"role": "user", "content": "x"}]}
LONG = BODY | {"max_tokens": 400}


def requests_of(served: Served) -> dict[str, int]:
    return served.app.report()["requests"]


def test_without_the_key_nothing_but_health() -> None:
    with serving(policy="exact", kv_budget=2_000_000, api_key="secret") as served:
        assert served.client.chat.completions.create(**BODY, max_tokens=2).choices
        for path in ("/v1/models", "/metrics", "/kvquant/report"):
            assert httpx.get(served.url + path).status_code == 401
            assert httpx.get(served.url + path, headers={"authorization": "Bearer secret"}).status_code == 200
        assert httpx.get(f"{served.url}/health").status_code == 200
        with pytest.raises(openai.AuthenticationError, match="API key"):
            served.client.with_options(api_key="wrong").chat.completions.create(**BODY)


def test_other_origins_only_where_they_are_allowed(served: Served) -> None:
    asks = {"origin": "http://elsewhere", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in httpx.options(f"{served.url}/v1/chat/completions", headers=asks).headers
    with serving(policy="exact", kv_budget=2_000_000, cors=True, api_key="secret") as open_to_all:
        answer = httpx.options(f"{open_to_all.url}/v1/chat/completions", headers=asks)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"]


def test_one_too_many_comes_later() -> None:
    """One runs, one waits, the third is refused; when they are over there is room again."""
    with serving(policy="int4", kv_budget=2_000_000, max_concurrent=1, queue=1) as served:
        streams = [served.client.chat.completions.create(**LONG, stream=True) for _ in range(2)]
        try:
            wait_until(lambda: requests_of(served)["running"] == 1 and requests_of(served)["waiting"] == 1)
            refused = httpx.post(f"{served.url}/v1/chat/completions", json=BODY)
            assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
            assert "2 requests are running or waiting" in refused.json()["error"]["message"]
            assert requests_of(served)["refused"] == 1
        finally:
            for stream in streams:
                stream.close()
        wait_until(lambda: not requests_of(served)["running"] and not requests_of(served)["waiting"])
        assert served.client.chat.completions.create(**BODY, max_tokens=3).usage.completion_tokens == 3
        assert httpx.get(f"{served.url}/metrics").text.count('kvquant_requests_total{outcome="refused"} 1.0') == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("batching", [True, False], ids=["batched", "in turn"])
def test_who_goes_away_leaves_nothing(stream: bool, batching: bool) -> None:
    """The connection is cut while tokens come: the request ends, and its pages are free."""
    budget = {"kv_budget": 2_000_000} if batching else {}
    with serving(policy="int4", continuous_batching=batching, **budget) as served:
        with socket.create_connection(served.app_address()) as client:
            client.sendall(post(LONG | {"stream": stream}))
            wait_until(lambda: any(entry.tokens > 2 for entry in served.app.ledger.live.values()))
        wait_until(lambda: not served.app.ledger.live)
        assert requests_of(served)["cancelled"] == 1
        assert served.app.report()["tokens"]["generated"] < 400
        if batching:
            wait_until(lambda: served.app.engine.report().live_requests == 0)
            assert served.app.engine.report().used_blocks == 0
        assert served.client.chat.completions.create(**BODY, max_tokens=2).usage.completion_tokens == 2
        if batching:
            assert list(served.app.engine._cb.output_router.result_handlers) == [], "a handler is leaked"


def post(body: dict[str, Any]) -> bytes:
    """A request as it goes over the wire."""
    content = json.dumps(body).encode()
    lines = ("POST /v1/chat/completions HTTP/1.1", "host: x", "content-type: application/json")
    return "\r\n".join((*lines, f"content-length: {len(content)}", "", "")).encode() + content


def test_two_requests_of_one_name_are_two(served: Served) -> None:
    async def both() -> list[str]:
        async with httpx.AsyncClient(timeout=60) as client:
            bodies = [BODY | {"max_tokens": 30, "logit_bias": {str(token): 100}} for token in (33, 34)]
            url, same = f"{served.url}/v1/chat/completions", {"x-request-id": "same"}
            asked = [client.post(url, json=body, headers=same) for body in bodies]
            answers = await asyncio.gather(*asked)
        assert len({answer.headers["x-request-id"] for answer in answers}) == 2
        return [answer.json()["choices"][0]["message"]["content"] for answer in answers]

    assert asyncio.run(both()) == [chr(32 + 33) * 30, chr(32 + 34) * 30]


def test_a_body_without_end_is_refused(served: Served) -> None:
    answer = httpx.post(f"{served.url}/v1/completions", content=b"x" * (17 * 2**20))
    assert answer.status_code == 413


def test_when_the_run_has_died_it_says_so() -> None:
    """An error in the model's step ends the run: health and requests are 503, and nothing hangs."""
    with serving(policy="int4", kv_budget=2_000_000) as served:

        def broken(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("the device is lost")

        served.model.forward = broken
        with pytest.raises(openai.APIStatusError) as failed:
            served.client.chat.completions.create(**BODY, max_tokens=3)
        assert failed.value.status_code == 503
        assert httpx.get(f"{served.url}/health").status_code == 503
        with pytest.raises(openai.APIStatusError) as failed:
            served.client.chat.completions.create(**BODY, max_tokens=3)
        assert failed.value.status_code == 503 and "the device is lost" in str(failed.value.body)
