"""What clients are told and asked in these tests."""

from typing import Any

import httpx

KEY = "open sesame"


def answer(server: Any, *turns: str, tokens: int, system: str | None = None) -> str:
    """What the server says, greedily, to a chat whose ``turns`` are the user's and its own in turn."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    body = {"model": server.model, "messages": messages, "temperature": 0, "max_tokens": tokens}
    headers = {"Authorization": f"Bearer {server.api_key}"}
    found = httpx.post(f"{server.api}/chat/completions", json=body, headers=headers, timeout=60)
    found.raise_for_status()
    text: str = found.json()["choices"][0]["message"]["content"]
    return text
