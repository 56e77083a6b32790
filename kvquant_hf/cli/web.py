"""``kvquant web``: a chat in the browser, with a server of its own or one that runs."""

import importlib.util
import sys
from typing import Annotated, Any

import typer

from .chat import MODEL_HELP, server_for
from .terminal import CommandError

REMEDY = "pip install 'kvquant-hf[web]'"


def web(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP)] = None,
    policy: Annotated[str | None, typer.Option(help="What to store the cache in; default: int4.")] = None,
    kv_budget: Annotated[str | None, typer.Option(help="As for kvquant serve: 500MB, or a share.")] = None,
    host: Annotated[str, typer.Option(help="Where the page is; by default only this machine sees it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any that is free.")] = 7860,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop an answer after so many tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="KVQUANT_API_KEY", help="What the server wants to see.")] = None,
) -> None:
    """Chat with a model in the browser, and see beside it what its KV cache holds.

    Starts a server and ends it with the page, or talks to one that runs: kvquant web http://127.0.0.1:8000.  Ctrl-C
    ends it.
    """
    if importlib.util.find_spec("gradio") is None:
        raise CommandError(f"the page needs the package gradio; run: {REMEDY}")
    settings: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": temperature}
    with server_for(model, policy, kv_budget, api_key) as server:
        from ..clients.web import application
        from ..serving.run import bind, run, url_of

        with bind(host, port) as listening:
            ready = f"kvquant web for {server.model} at {url_of(listening)}"
            try:
                app = application(server, settings, system)
                # Pages that are open when it ends are cut off, which uvicorn takes for errors.

                run(app, listening, lambda: print(ready, file=sys.stderr, flush=True), "critical", grace=1)
            except KeyboardInterrupt:
                print("stopped.", file=sys.stderr)
