"""``kvquant serve``: an OpenAI server over quantized pages."""

import functools
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UnsupportedModelError
from ..policies.table import parse_policy
from .models import BITS_HELP, WEIGHTS_HELP, check_cache_options, load_model, locate
from .sizes import bytes_of
from .terminal import CommandError, InputError

if TYPE_CHECKING:
    from ..serving.application import Application
    from ..serving.options import ServeOptions

LOG_LEVELS = ("critical", "error", "warning", "info", "debug")
REMEDY = "pip install 'kvquant-hf[serve]'"


def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder, .gguf file or hub name; default: the built-in SmolLM2-135M-Instruct."),
    ] = None,
    policy: Annotated[str, typer.Option(help="What to store the cache in; LMDeploy's 8, 4 and 42 too.")] = "int4",
    bits: Annotated[float | None, typer.Option(help=BITS_HELP)] = None,
    host: Annotated[str, typer.Option(help="Where to listen; by default only this machine can ask.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any that is free.")] = 8000,
    kv_budget: Annotated[
        str | None,
        typer.Option(help="All pages together: 500MB, or a share of the free memory: 0.3; default: half of it."),
    ] = None,
    max_concurrent: Annotated[
        int | None,
        typer.Option(min=1, help="Requests at a time; default: as many of 256 tokens as fit, at most 64."),
    ] = None,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are told to come later (429).")] = 128,
    max_batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a step; longer prompts are read in chunks.")
    ] = 1024,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of a request that does not say how many.")] = 1024,
    page_size: Annotated[int, typer.Option(help="Tokens per page, a multiple of 8.")] = 64,
    prefill: Annotated[str, typer.Option(help="exact or quantized: what a prompt attends to in itself.")] = "exact",
    qparams: Annotated[
        str | None,
        typer.Option(help="Folder or file of `kvquant qparams`: for int8-static, a prior for kv3 and others."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    weights: Annotated[str, typer.Option(help=WEIGHTS_HELP)] = "full",
    name: Annotated[str | None, typer.Option(help="What requests call the model; default: its own name.")] = None,
    continuous_batching: Annotated[
        bool, typer.Option(help="Many requests at once; without, they are answered in turn.")
    ] = True,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="KVQUANT_API_KEY", help="What requests must bear: Authorization: Bearer KEY."),
    ] = None,
    cors: Annotated[bool, typer.Option("--cors", help="Let pages of any origin ask.")] = False,
    allow_any_model: Annotated[
        bool, typer.Option("--allow-any-model", help="Let a request name another model or path, which is loaded.")
    ] = False,
    replicas: Annotated[
        int, typer.Option(min=1, help="So many servers behind one address, by Ray Serve (extra: ray).")
    ] = 1,
    log_level: Annotated[str, typer.Option(help="critical, error, warning, info (each request) or debug.")] = "warning",
) -> None:
    """Serve a model over OpenAI's protocol, with its KV cache in quantized pages.

    Chat completions, completions, responses and models under /v1, streamed or not; /health, /metrics for Prometheus,
    and /kvquant/report.  Ctrl-C ends it.
    """
    import_serving()
    from ..serving.options import ServeOptions
    from ..serving.run import bind, url_of

    if log_level not in LOG_LEVELS:
        raise InputError(f"unknown log level {log_level!r}; use one of {', '.join(LOG_LEVELS)}.")
    chosen = policy_of(policy, bits)
    check_cache_options(chosen, page_size, prefill, qparams)
    options = ServeOptions(
        policy=chosen,
        page_size=page_size,
        prefill=prefill,
        qparams=qparams,
        kv_budget=None if kv_budget is None else budget_of(kv_budget),
        max_concurrent=max_concurrent,
        queue=queue,
        max_batch_tokens=max_batch_tokens,
        max_tokens=max_tokens,
        continuous_batching=continuous_batching,
        api_key=api_key,
        cors=cors,
        allow_any_model=allow_any_model,
    )
    logging.basicConfig(level=getattr(logging, log_level.upper()), format="%(levelname)s: %(message)s")
    called = name or locate(model).description
    with bind(host, port) as listening:
        if replicas == 1:
            _run(functools.partial(build, model, called, dtype, options, weights), called, listening, log_level)
            return
        url, free = url_of(listening), listening.getsockname()[1]
    _run_replicas(functools.partial(build, model, called, dtype, options, weights), replicas, host, free, called, url)


def build(model: str | None, name: str, dtype: str, options: "ServeOptions", weights: str = "full") -> "Application":
    """Load a model, and make a server of it.

    Raises:
        UnsupportedModelError: it cannot be served like that.
    """
    from ..serving.application import Application

    loaded = load_model(model, dtype, weights=weights)
    print(loaded.weights_line(), file=sys.stderr, flush=True)
    try:
        return Application(name, loaded.model, loaded.tokenizer, options)
    except UnsupportedModelError as error:
        if not options.continuous_batching:
            raise
        raise UnsupportedModelError(f"{str(error).rstrip('.')}; or serve it with --no-continuous-batching.") from error


def _run(make: "Callable[[], Application]", name: str, listening: Any, log_level: str) -> None:
    """Serve from this process; the engine's thread ends with the command."""
    from ..serving.run import run, url_of

    app = make()
    print(app.room(), file=sys.stderr, flush=True)
    ready = f"serving {name} with {app.report()['policy']} at {url_of(listening)}"
    try:
        run(app, listening, lambda: print(ready, file=sys.stderr, flush=True), log_level)
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
    finally:
        app.engine.stop()


def _run_replicas(make: "Callable[[], Application]", replicas: int, host: str, port: int, name: str, url: str) -> None:
    """Serve from processes of Ray.

    Raises:
        CommandError: Ray is not installed, or a replica cannot be built.
    """
    try:
        from ..serving.replicas import run_replicas
    except ModuleNotFoundError as error:
        raise CommandError(f"replicas need the package {error.name}; run: pip install 'kvquant-hf[ray]'") from error
    ready = f"serving {name} from {replicas} replicas at {url}"
    try:
        print(f"starting {replicas} replicas ...", file=sys.stderr, flush=True)
        run_replicas(make, replicas, host, port, lambda: print(ready, file=sys.stderr, flush=True))
    except RuntimeError as error:
        raise CommandError(f"the replicas do not start: {str(error).strip().splitlines()[-1]}") from error
    print("stopped.", file=sys.stderr)


def policy_of(text: str, bits: float | None = None) -> str | int:
    """A policy as it is written on a command line: LMDeploy's numbers are numbers, and bits go with ``auto``."""
    if bits is not None:
        return parse_policy(text, bits).name
    return int(text) if text.isdecimal() else text


def budget_of(text: str) -> int | float:
    """``500MB`` in bytes, ``0.3`` and ``30%`` as a share.

    Raises:
        InputError: neither.
    """
    word = text.strip()
    number = word.removesuffix("%").replace(".", "", 1)
    if number.isdecimal() and (word.endswith("%") or "." in word):
        return float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)
    return bytes_of(text)


def import_serving() -> None:
    """Look for what a server needs.

    Raises:
        CommandError: a package is missing.
        UnsupportedVersionError: transformers is too old or too new.
    """
    from ..batching.hooks import require_support

    try:
        import fastapi  # noqa: F401
        import httpx  # noqa: F401
        import openai  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise CommandError(f"a server needs the package {error.name}; run: {REMEDY}") from error
    require_support()
