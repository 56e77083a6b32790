"""``kvquant calibrate``: extremes of a model's keys and values over a text, moments of its queries; for ``kvquant
qparams``."""

import hashlib
from typing import Annotated

import typer

from .measure import long_text
from .models import load_model
from .terminal import InputError, progress, stage

DEFAULT_TEXT = "Python language reference"


def calibrate(
    out: Annotated[str, typer.Option(help="Folder for statistics.safetensors; made if need be.")],
    model: Annotated[
        str | None, typer.Option(help="Folder, .gguf file or hub name; default: the built-in SmolLM2-135M-Instruct.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="c4, ptb, wikitext2, pileval, or a UTF-8 file; default: the Python language reference."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows, from the beginning of the text.")] = 128,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 2048,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
) -> None:
    """Read a text and keep the smallest and largest element of each channel of keys and values, and what is usual of
    queries.

    Windows are read one by one, and nothing of them is kept.  The path of the file is printed on stdout.
    """
    from ..calibration import collect
    from ..calibration.texts import read_text
    from ..evaluation import cut_windows

    content = long_text() if dataset is None else read_text(dataset, samples * seqlen)
    loaded = load_model(model, dtype)
    limit = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and seqlen > limit:
        raise InputError(f"this model takes {limit} tokens; use at most --seqlen {limit}.")
    with stage("tokenizing the text"):
        ids = cut_windows(loaded.tokenizer, content, seqlen, samples, ("--seqlen", "--samples"))
    facts = {
        "model": loaded.description,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "text": DEFAULT_TEXT if dataset is None else dataset,
        "samples": samples,
        "seqlen": seqlen,
        "tokens_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
    }
    with progress("calibrating", samples) as advance:
        statistics = collect(loaded.model, ids, facts, lambda: advance("calibrating"))
    print(statistics.save(out))
