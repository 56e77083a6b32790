"""``kvquant chat``: a chat in the terminal, with a server of its own or one that runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .models import WEIGHTS_HELP
from .serve import import_serving
from .terminal import InputError

if TYPE_CHECKING:
    from ..clients.server import Server

MODEL_HELP = "Folder, .gguf file or hub name, or the http:// address of a server; default: the built-in model."


def chat(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP)] = None,
    policy: Annotated[str | None, typer.Option(help="What to store the cache in; default: int4.")] = None,
    kv_budget: Annotated[str | None, typer.Option(help="As for kvquant serve: 500MB, or a share.")] = None,
    weights: Annotated[str | None, typer.Option(help=WEIGHTS_HELP)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop an answer after so many tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="KVQUANT_API_KEY", help="What the server wants to see.")] = None,
) -> None:
    """Chat with a model, its KV cache in quantized pages.

    Starts a server and ends it with the chat, or talks to one that runs: kvquant chat http://127.0.0.1:8000.  !exit,
    Ctrl-C and Ctrl-D end it; !help lists what else there is.
    """
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        settings["temperature"] = temperature
    with server_for(model, policy, kv_budget, api_key, weights) as server:
        from ..clients.chat import chat as talk

        talk(server, settings, system)


@contextmanager
def server_for(
    model: str | None, policy: str | None, kv_budget: str | None, api_key: str | None, weights: str | None = None
) -> Iterator["Server"]:
    """The server that a command's arguments name, or one of its own that ends with the block.

    Raises:
        InputError: options of a server that is to be started, for one that runs.
        CommandError: a package that a server needs is missing.
        NoServerError: it does not answer.
    """
    options = {"--policy": policy, "--kv-budget": kv_budget, "--weights": weights}
    given = {name: value for name, value in options.items() if value is not None}
    import_serving()
    from ..clients.server import find, started

    if model is None or not model.startswith(("http://", "https://")):
        arguments = [*([] if model is None else [model]), *(word for pair in given.items() for word in pair)]
        with started(arguments, api_key) as server:
            yield server
        return
    if given:
        raise InputError(f"{' and '.join(given)} are for a server that is to be started, and {model} runs; leave out.")
    yield find(model, api_key)
