"""What ``kvquant bench --serve`` does: start servers at one budget, give them the same load, show what came back."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .measure import long_text
from .models import load_config, load_model, load_tokenizer, locate
from .serve import import_serving
from .terminal import InputError, advancing, stage

URL_EXAMPLE = "--url mine=http://127.0.0.1:8000"


class Asked(NamedTuple):
    """The options of ``--serve``.

    ``urls`` are running servers by their names, instead of those to start.  The budget is ``kv_bytes``, or else
    ``kv_times`` average requests.
    """

    model: str | None
    dtype: str
    policies: Sequence[str]
    urls: dict[str, str]
    requests: int
    requests_file: str | None
    max_prompt: int
    max_output: int
    kv_times: float
    kv_bytes: int | None
    max_batch_tokens: int
    max_concurrent: int | None
    stock_page_size: int
    rate: float | None
    concurrency: int | None
    rounds: int
    timeout: float
    hidden: bool


class ServedModel(NamedTuple):
    """A model to serve: what servers are told (a folder or a name on the hub), and what is known of it here."""

    place: str
    config: Any
    tokenizer: Any
    description: str


def named_urls(pairs: Sequence[str]) -> dict[str, str]:
    """``["mine=http://127.0.0.1:8000"]`` by name, without a slash at the end.

    Raises:
        InputError: not that, or a name twice.
    """
    urls: dict[str, str] = {}
    for pair in pairs:
        name, _, url = pair.partition("=")
        if not name or not url.startswith(("http://", "https://")):
            raise InputError(f"{pair!r} is no server; use {URL_EXAMPLE}.")
        if name in urls:
            raise InputError(f"two servers are called {name!r}; give each a name of its own.")
        urls[name] = url.rstrip("/")
    return urls


def load_servers(asked: Asked) -> Any:
    """Everything that ``--serve`` measures: a ``Load``.

    Raises:
        InputError, BenchmarkInputError: what was asked for cannot be.
        CommandError, UnsupportedVersionError: what a server needs is not installed, or too old.
        BenchmarkError: a server did not start.
    """
    from ..benchmark.load.run import Plan, load
    from ..benchmark.load.servers import started, target_at

    if not asked.urls:
        import_serving()
    with ExitStack() as stack:
        served = stack.enter_context(_served(asked))
        requests, about = _workload(asked, served)
        conditions: dict[str, Any] = {"model": served.description, "workload": about}
        if asked.urls:
            conditions |= {"kv_budget_bytes": None, "urls": list(asked.urls.values())}
            targets = [target_at(name, url) for name, url in asked.urls.items()]
        else:
            launches, settings = _launches(asked, served, requests)
            conditions |= settings
            targets = []
            for launch in launches:
                with stage(f"starting the server {launch.name}", hidden=asked.hidden):
                    targets.append(stack.enter_context(started(launch, asked.timeout)))
        ids = served.tokenizer(long_text(), add_special_tokens=False).input_ids
        plan = Plan(requests, asked.rate, asked.concurrency, asked.rounds, asked.timeout)
        advance = stack.enter_context(advancing(asked.hidden))
        return load(targets, plan, served.tokenizer, ids, conditions, advance)


@contextmanager
def _served(asked: Asked) -> Iterator[ServedModel]:
    """The model to serve.  A .gguf file is written out as a folder of plain weights, which every server can load."""
    source = locate(asked.model)
    if source.gguf is None or asked.urls:
        yield ServedModel(source.place, load_config(asked.model), load_tokenizer(asked.model), source.description)
        return
    loaded = load_model(asked.model, asked.dtype, hidden=asked.hidden, dequantize=True)
    with tempfile.TemporaryDirectory(prefix="kvquant-bench-") as folder:
        place = Path(folder) / source.description  # servers call the model by the folder's name
        config = loaded.model.config
        vars(config).pop("quantization_config", None)  # how the file was packed
        loaded.model.save_pretrained(place)
        loaded.tokenizer.save_pretrained(place)
        served = ServedModel(str(place), config, loaded.tokenizer, loaded.description)
        del loaded  # the servers need the memory
        yield served


def _workload(asked: Asked, served: ServedModel) -> tuple[list[Any], str]:
    """The requests, and what they are.

    Raises:
        InputError: one is longer than the model takes.
    """
    from ..benchmark import read_requests, sharegpt_requests
    from ..benchmark.load.sizing import longest_request

    lengths = {"max_prompt": asked.max_prompt, "max_output": asked.max_output}
    if asked.requests_file is None:
        drawn = sharegpt_requests(asked.requests, **lengths)
        about = "lengths of turns of ShareGPT, from the sample of 256 that comes with the package"
    else:
        drawn = read_requests(asked.requests_file, asked.requests, served.tokenizer, **lengths)
        about = f"lengths of {Path(asked.requests_file).name}"
    longest = longest_request(drawn)
    limit = getattr(served.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and longest > limit:
        raise InputError(
            f"a request has {longest} tokens and the model takes {limit} tokens; use a smaller --max-prompt or "
            "--max-output."
        )
    about += f"; cut to at most {asked.max_prompt} + {asked.max_output} tokens; texts from Python's language reference"
    return drawn, about


def _launches(asked: Asked, served: ServedModel, requests: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Servers to start, transformers' first, and what is to be said of their sizes."""
    import torch

    from ..benchmark.load import sizing
    from ..benchmark.load.servers import our_server, stock_server

    page = asked.stock_page_size
    dtype = getattr(torch, asked.dtype)
    per_token = sizing.dense_bytes_per_token(served.config, dtype)
    budget = asked.kv_bytes or sizing.budget_for(asked.kv_times, requests, per_token, page)
    sizing.check_budget(budget, requests, per_token, page)
    blocks = sizing.stock_blocks(budget, per_token, page)
    options: dict[str, Any] = {"dtype": asked.dtype, "max_batch_tokens": asked.max_batch_tokens}
    launches = [stock_server(served.place, blocks=blocks, page_size=page, **options)]
    concurrent = {
        policy: asked.max_concurrent or sizing.fitting_requests(budget, policy, served.config, dtype, requests)
        for policy in asked.policies
    }
    launches += [
        our_server(served.place, policy, budget=budget, max_concurrent=most, queue=len(requests), **options)
        for policy, most in concurrent.items()
    ]
    return launches, options | {
        "kv_budget_bytes": budget,
        "kv_budget_requests": budget / per_token / sizing.mean_tokens(requests),
        "stock_page_size": page,
        "stock_blocks": blocks,
        "max_concurrent": concurrent,
    }
