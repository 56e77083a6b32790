"""``kvquant generate``: one prompt through a quantized cache, the text on stdout and the cache's report on stderr."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..policies.auto import AUTO
from ..policies.table import parse_policy
from .models import BITS_HELP, WEIGHTS_HELP, check_cache_options, encode_prompt, load_model
from .sizes import bytes_of
from .terminal import InputError, print_json, stage


def generate(
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    file: Annotated[str | None, typer.Option(help="Read the prompt from a file; - is stdin.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder, .gguf file or hub name; default: the built-in SmolLM2-135M-Instruct.")
    ] = None,
    policy: Annotated[str, typer.Option(help="What to store the cache in; see `kvquant policies`.")] = "int4",
    bits: Annotated[float | None, typer.Option(help=BITS_HELP)] = None,
    kv_budget: Annotated[
        str | None, typer.Option(help="With --policy auto, instead of --bits: all pages of prompt and answer: 500MB.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    chat: Annotated[bool, typer.Option(help="Use the tokenizer's chat template, if it has one.")] = True,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    page_size: Annotated[int, typer.Option(help="Tokens per page, a multiple of 8.")] = 64,
    sinks: Annotated[
        int | None, typer.Option(help="First tokens of a sequence that are kept exact; default: what the policy does.")
    ] = None,
    prefill: Annotated[str, typer.Option(help="exact or quantized: what the prompt attends to in itself.")] = "exact",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    weights: Annotated[str, typer.Option(help=WEIGHTS_HELP)] = "full",
    qparams: Annotated[
        str | None,
        typer.Option(help="Folder or file of `kvquant qparams`: for int8-static, a prior for kv3 and others."),
    ] = None,
    report: Annotated[
        bool, typer.Option(help="Print at the end what the cache and the weights took, on stderr.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with the text and the report.")] = False,
) -> None:
    """Generate text with a quantized KV cache.

    The text is streamed to stdout; the cache's report follows on stderr.
    """
    from transformers import TextStreamer

    from ..cache import QuantizedPagedCache
    from ..transformers_api.names import with_cache

    text = _read_prompt(prompt, file)
    budget = None if kv_budget is None else bytes_of(kv_budget)
    if budget is not None and (policy != AUTO or bits is not None):
        raise InputError("--kv-budget goes with --policy auto, in the place of --bits; leave it out.")
    known = "exact" if budget is not None else parse_policy(policy, bits)
    check_cache_options(known, page_size, prefill, qparams, sinks)
    loaded = load_model(model, dtype, hidden=as_json, weights=weights)
    inputs = encode_prompt(loaded, text, chat=chat)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise InputError("the prompt is empty.")
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature}
    settings: dict[str, Any] = {"page_size": page_size, "prefill": prefill, "qparams": qparams, "sinks": sinks}
    settings |= {"bits": bits, "kv_budget": budget}
    settings |= {} if budget is None else {"max_length": length + max_new_tokens}
    cache = QuantizedPagedCache(loaded.model.config, policy, **settings)
    options |= {**with_cache(cache), "max_new_tokens": max_new_tokens}
    if as_json:
        with stage("generating", hidden=True):
            output = loaded.model.generate(**inputs, **options)
        new = output[0, length:]
        print_json(
            {
                "model": loaded.description,
                "prompt_tokens": length,
                "new_tokens": len(new),
                "text": loaded.tokenizer.decode(new, skip_special_tokens=True),
                "report": cache.report().as_dict(),
                "weights": loaded.weights_held(),
            }
        )
        return
    streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    loaded.model.generate(**inputs, **options, streamer=streamer)
    if report:
        print(f"\n{cache.report()}\n{loaded.weights_line()}", file=sys.stderr)


def _read_prompt(prompt: str | None, file: str | None) -> str:
    """The prompt from wherever it was given.

    Raises:
        InputError: given twice or not at all, empty, or not readable as text.
    """
    if (prompt is None) == (file is None):
        raise InputError("give the prompt with either --prompt TEXT or --file FILE (- for stdin).")
    if file is not None:
        try:
            prompt = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise InputError(f"cannot read the prompt from {file!r}: {reason}.") from error
    if not prompt or not prompt.strip():
        raise InputError("the prompt is empty.")
    return prompt
