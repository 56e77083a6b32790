"""Requests to a server with OpenAI's ``/v1/completions``, streamed, and what came back when.

Requests are sent whether or not earlier ones were answered (an open loop).  Each answer is as long as asked for:
``generation_config``, which transformers' server and ours both read, is greedy, has so many tokens and an end that no
token is.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import httpx

from ..status import FAILED, OK
from .answers import REFUSED, Answer, Arrival

NO_TOKEN = -1  # as ``eos_token_id``


class Target(NamedTuple):
    """A running server: what tables call it, its address, and the name of its model."""

    name: str
    url: str
    model: str


class Prompt(NamedTuple):
    """A text, and tokens to write after it."""

    text: str
    output_tokens: int


def send_times(count: int, rate: float | None, seed: int) -> list[float]:
    """Seconds after the beginning at which requests are sent: all at once, or as a Poisson process of ``rate`` a second
    (the same for the same seed)."""
    if rate is None:
        return [0.0] * count
    generator = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += generator.expovariate(rate)
    return times


def drive(
    target: Target,
    prompts: Sequence[Prompt],
    times: Sequence[float],
    *,
    concurrency: int | None = None,
    timeout: float = 600.0,
    answered: Callable[[Answer], object] = lambda answer: None,
) -> list[Answer]:
    """Send ``prompts`` at their ``times`` and wait for all answers.

    Args:
        target: the server.
        prompts: what to send.
        times: seconds from now, for each.
        concurrency: most connections at a time; None: any number.  A request that finds none is sent when one is free.
        timeout: seconds that a server may be silent before a request counts as failed.
        answered: called with each answer.
    """
    return asyncio.run(_drive(target, prompts, times, concurrency, timeout, answered))


async def _drive(
    target: Target,
    prompts: Sequence[Prompt],
    times: Sequence[float],
    concurrency: int | None,
    timeout: float,
    answered: Callable[[Answer], object],
) -> list[Answer]:
    free = asyncio.Semaphore(concurrency or len(prompts))
    limits = httpx.Limits(max_connections=None)
    # Without the environment: a proxy would be measured, too.
    async with httpx.AsyncClient(base_url=target.url, timeout=timeout, limits=limits, trust_env=False) as client:
        begin = time.perf_counter()

        async def one(place: int) -> Answer:
            await asyncio.sleep(times[place])
            async with free:
                answer = await _ask(client, target.model, place, prompts[place], begin)
            answered(answer)
            return answer

        return list(await asyncio.gather(*map(one, range(len(prompts)))))


async def _ask(client: httpx.AsyncClient, model: str, place: int, prompt: Prompt, begin: float) -> Answer:
    """One request; whatever goes wrong with it is its answer."""
    settings = {"max_new_tokens": prompt.output_tokens, "do_sample": False, "eos_token_id": NO_TOKEN}
    body = {
        "model": model,
        "prompt": prompt.text,
        "stream": True,
        "max_tokens": prompt.output_tokens,
        "generation_config": json.dumps(settings),
    }
    stream = _Stream()
    sent = time.perf_counter() - begin

    def gave_up(status: str, reason: str) -> Answer:
        return Answer(place, status, reason, sent)

    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode(errors="replace").strip()
                refused = response.status_code == httpx.codes.TOO_MANY_REQUESTS
                return gave_up(REFUSED if refused else FAILED, f"HTTP {response.status_code} {text[:200]}")
            async for data in response.aiter_bytes():
                stream.read(data, time.perf_counter() - begin)
    except (httpx.HTTPError, ValueError) as error:
        return gave_up(FAILED, f"{type(error).__name__} {error}".strip())
    if stream.error or not stream.arrivals or not stream.usage:
        return gave_up(FAILED, stream.error or ("no usage was sent" if stream.arrivals else "no text was sent"))
    counts = stream.usage["prompt_tokens"], stream.usage["completion_tokens"]
    return Answer(place, OK, "", sent, tuple(stream.arrivals), stream.end_s, *counts, "".join(stream.texts))


class _Stream:
    """Server-sent events, as they are read."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []
        self.texts: list[str] = []
        self.usage: dict[str, int] = {}
        self.end_s = 0.0
        self.error = ""
        self._rest = b""

    def read(self, data: bytes, now: float) -> None:
        """Note what came ``now``, in seconds from the beginning.

        Raises:
            ValueError: an event is no JSON.
        """
        texts = []
        for event in self._events(data):
            if "error" in event:
                error = event["error"]
                self.error = str(error.get("message", error) if isinstance(error, dict) else error)
            texts += [choice["text"] for choice in event.get("choices", ()) if choice.get("text")]
            if event.get("usage"):
                self.usage, self.end_s = event["usage"], now
        if texts:
            self.arrivals.append(Arrival(now, len(texts)))
            self.texts += texts

    def _events(self, data: bytes) -> Iterator[dict[str, Any]]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            content = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and content != b"[DONE]":
                yield json.loads(content)
