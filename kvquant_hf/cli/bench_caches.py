"""What ``kvquant bench`` measures in this process: caches one call at a time, and requests in static batches."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .measure import long_text
from .models import load_model
from .terminal import advancing, stage


class Asked(NamedTuple):
    """Which model, how many tokens it has to read, and whether to be silent about it."""

    model: str | None
    shape: str | None
    layers: int | None
    tokens: int
    hidden: bool


def compare_caches(
    contexts: Sequence[int],
    policies: Sequence[str],
    baselines: Sequence[str],
    dtypes: Sequence[str] | None,
    rounds: int,
    chunk: int,
    peak: bool,
    timeout: float,
    asked: Asked,
) -> Any:
    """Speed and memory of caches side by side: a ``Comparison``."""
    from ..benchmark import compare
    from ..benchmark.speed.compare import default_dtypes

    dtypes = dtypes or default_dtypes()
    subject, _ = _subject(asked, dtypes)
    with advancing(asked.hidden) as advance:
        return compare(
            subject,
            contexts=contexts,
            policies=policies,
            baselines=baselines,
            dtypes=dtypes,
            rounds=rounds,
            prefill_chunk=chunk,
            peak=peak,
            timeout=timeout,
            advance=advance,
        )


def serve_batches(
    count: int,
    file: str | None,
    max_prompt: int,
    max_output: int,
    budget: int | None,
    sizes: Sequence[int | None],
    policies: Sequence[str],
    dtypes: Sequence[str],
    asked: Asked,
) -> Any:
    """Requests in static batches: a ``Serving``."""
    from ..benchmark import draw_requests, read_requests, serve

    lengths = {"max_prompt": max_prompt, "max_output": max_output}
    drawn = draw_requests(count, **lengths)  # wrong lengths are said before a model is loaded
    subject, tokenizer = _subject(asked, dtypes)
    about = "synthetic: log-normal lengths with ShareGPT's means (161 and 338 tokens), seed 0"
    if file is not None:
        drawn = read_requests(file, count, tokenizer, **lengths)
        about = f"lengths of {Path(file).name}"
    about += f"; at most {max_prompt} + {max_output} tokens"
    with advancing(asked.hidden) as advance:
        return serve(
            subject,
            drawn,
            kv_budget=budget,
            batch_sizes=sizes,
            policies=policies,
            dtypes=dtypes,
            about=about,
            advance=advance,
        )


def _subject(asked: Asked, dtypes: Sequence[str]) -> tuple[Any, Any]:
    """The model to time, and its tokenizer (None for a shape)."""
    from ..benchmark import Subject
    from ..benchmark import shape as of_shape

    if asked.shape is not None:
        return of_shape(asked.shape, layers=asked.layers, dtypes=dtypes, tokens=asked.tokens), None
    first = load_model(asked.model, dtypes[0], hidden=asked.hidden)
    limit = getattr(first.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    with stage("tokenizing the text", hidden=asked.hidden):
        ids = first.tokenizer(long_text()).input_ids[: asked.tokens]
    kept = {dtypes[0]: first.model}
    load = partial(load_weights, asked.model)

    def once(dtype: str) -> Any:
        return kept.pop(dtype, None) or load(dtype)

    return Subject(first.description, once, ids, limit, apart=load), first.tokenizer


def load_weights(model: str | None, dtype: str) -> Any:
    """A model in eval mode, in ``dtype``; for processes of their own, too."""
    return load_model(model, dtype, hidden=True).model
