"""transformers' chat client, talking to a server of ours."""

import functools
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import openai
from transformers.cli import chat as theirs

from .server import Server


def chat(server: Server, settings: dict[str, Any], system: str | None = None) -> None:
    """Chat in the terminal until ``!exit``, Ctrl-C or the end of stdin.

    Args:
        server: what answers.
        settings: of the generation config: ``max_new_tokens=100``.
        system: the system prompt, or None.
    """
    flags = [f"{name}={value}" for name, value in settings.items()]
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        with _parts(server), suppress(KeyboardInterrupt):
            _Chat(server.model, server.api, flags, system_prompt=system)
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(number: int, frame: object) -> None:
    """As Python's own handler, which asyncio would replace by one that waits: for a line to be typed, or for a long
    answer to be drawn."""
    raise KeyboardInterrupt


@contextmanager
def _parts(server: Server) -> Iterator[None]:
    """Have transformers' chat made of our parts, which it has no other place for."""
    before = theirs.AsyncInferenceClient, theirs.RichInterface
    theirs.AsyncInferenceClient = functools.partial(_Client, server)
    theirs.RichInterface = functools.partial(_Interface, server)
    try:
        yield
    finally:
        theirs.AsyncInferenceClient, theirs.RichInterface = before


class _Client:
    """What asks the server.  The hub's client, which transformers' chat takes, has no key for it but the hub's, and
    refuses with ``HF_HUB_OFFLINE=1``, also for this machine.

    Args:
        server: what answers.
        base_url: the same.
    """

    def __init__(self, server: Server, base_url: str) -> None:
        self._openai = openai.AsyncOpenAI(base_url=base_url, api_key=server.api_key or "none", max_retries=0)

    async def __aenter__(self) -> "_Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._openai.close()

    def chat_completion(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        """Something to await, that becomes the chunks of the answer."""
        create: Any = self._openai.chat.completions.create
        return create(messages=messages, **options)


class _Chat(theirs.Chat):
    """transformers' chat, whose server is known to answer."""

    @staticmethod
    def check_health(url: str) -> bool:
        return True


class _Interface(theirs.RichInterface):
    """transformers' terminal, whose model is loaded already.

    Args:
        server: what answers.
        arguments: of transformers' own.
    """

    def __init__(self, server: Server, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._server = server

    def print_model_load(self, model: str) -> None:
        """Instead of asking the server to load it: what it stores its cache in."""
        self.print_color(f"{model}, KV cache in {self._server.report()['policy']}", "blue")

    def input(self) -> str:
        """As transformers'; the end of stdin ends the chat."""
        try:
            text: str = super().input()
        except EOFError:
            raise KeyboardInterrupt from None
        return text
