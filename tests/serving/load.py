"""A crowd of clients: half of them stream, a fifth goes away midway, some ask for what cannot be."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import httpx
import openai


class Crowd(NamedTuple):
    """What came of it: texts of greedy answers by question, statuses, and texts that were drawn, by seed."""

    greedy: dict[str, set[str]]
    statuses: Counter[str]
    drawn: dict[int, set[str]]


async def crowd(
    url: str, model: str, questions: Sequence[str], tokens: int, too_long: str, count: int = 200, at_once: int = 32
) -> Crowd:
    """Ask.

    Args:
        url: of the server.
        model: its name.
        questions: asked in turn, greedily or with one of two seeds at temperature 0.9.
        tokens: of an answer.
        too_long: a prompt beyond the limit.
        count: requests.
        at_once: connections.
    """
    found = Crowd({}, Counter(), {})
    room = asyncio.Semaphore(at_once)
    limits = httpx.Limits(max_connections=at_once)
    async with (
        httpx.AsyncClient(limits=limits, timeout=300) as http,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", http_client=http, max_retries=0) as client,
    ):

        async def ask(i: int) -> None:
            async with room:
                question = questions[i % len(questions)]
                settings: dict[str, Any] = {
                    "model": model,
                    "max_tokens": tokens,
                    "stream": i % 2 == 0,
                    "temperature": 0,
                }
                if i % 5 == 4:
                    await _leave(client, question, settings)
                    found.statuses["left"] += 1
                    return
                if i % 20 == 3:
                    settings["n"] = 7
                elif i % 20 == 8:
                    question = too_long
                seed = i % 3 if i % 4 == 1 else None
                if seed is not None:
                    settings |= {"temperature": 0.9, "top_p": 0.95, "seed": seed}
                try:
                    text = await _answer(client, question, settings)
                except openai.APIStatusError as error:
                    found.statuses[str(error.status_code)] += 1
                    return
                found.statuses["answered"] += 1
                if seed is None:
                    found.greedy.setdefault(question, set()).add(text)
                else:
                    found.drawn.setdefault(seed, set()).add(f"{question}\n{text}")

        await asyncio.gather(*(ask(i) for i in range(count)))
    return found


async def _answer(client: openai.AsyncOpenAI, question: str, settings: dict[str, Any]) -> str:
    messages: Any = [{"role": "user", "content": question}]
    answer = await client.chat.completions.create(messages=messages, **settings)
    if not settings["stream"]:
        return answer.choices[0].message.content or ""
    return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])


async def _leave(client: openai.AsyncOpenAI, question: str, settings: dict[str, Any]) -> None:
    """Go away: after two pieces of a stream, or before a whole answer can be there."""
    messages: Any = [{"role": "user", "content": question}]
    if settings["stream"]:
        pieces = 0
        async with await client.chat.completions.create(messages=messages, **settings) as stream:
            async for _ in stream:
                pieces += 1
                if pieces > 2:
                    return
    else:
        asking = asyncio.ensure_future(client.chat.completions.create(messages=messages, **settings))
        await asyncio.wait([asking], timeout=0.05)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
