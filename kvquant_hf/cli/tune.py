"""``kvquant tune``: a policy for each layer, for a model and a number of bits."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..policies.file import SUFFIX, write_layers
from ..policies.table import LayerwisePolicy
from .eval import DEFAULT_TEXT, text_conditions
from .measure import long_text
from .measuring import progress
from .models import check_cache_options, load_model
from .terminal import InputError, print_json, say, stage


def tune(
    out: Annotated[str, typer.Option(help="The policy file to write; it ends with .json.")],
    budget: Annotated[float, typer.Option(min=1.0, help="Bits per element in full pages, scales included.")] = 3.5,
    model: Annotated[
        str | None, typer.Option(help="Folder, .gguf file or hub name; default: the built-in SmolLM2-135M-Instruct.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="A UTF-8 file; default: the Python language reference.")] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    windows: Annotated[int, typer.Option(min=1, help="Windows, from the beginning of the text.")] = 1,
    page_size: Annotated[int, typer.Option(help="Tokens per page, a multiple of 8.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Windows side by side.")] = 4,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="What the file says, as one JSON object too.")] = False,
) -> None:
    """Measure how much each layer suffers from coarser codecs and write the best policy for a number of bits.

    Use it as --policy FILE, or policy="FILE" in Python.  Measure it on another text: kvquant eval --policies FILE.
    """
    from ..evaluation import cut_windows, evaluate, paged
    from ..evaluation.text import read_file
    from ..evaluation.tune import Part, choose, find_parts, mean_bits, measure, passes, uniform
    from ..policies.fingerprint import fingerprint

    check_cache_options("exact", page_size)
    if not out.endswith(SUFFIX) or not Path(out).absolute().parent.is_dir() or Path(out).is_dir():
        raise InputError(f"cannot write {out!r}: give the name of a {SUFFIX} file in a folder that exists.")
    if context <= page_size:
        raise InputError(f"windows of {context} tokens seal no page of {page_size}; use a longer --context.")
    content = long_text() if text is None else read_file(text)
    loaded = load_model(model, dtype, hidden=as_json)
    with stage("tokenizing the text", hidden=as_json):
        ids = cut_windows(loaded.tokenizer, content, context, windows)
    parts = find_parts(loaded.model)
    with progress(passes(parts, ids, page_size, batch), hidden=as_json) as advance:
        sensitivity = measure(loaded.model, ids, parts, page_size=page_size, batch=batch, advance=advance)
    policy = choose(sensitivity, parts, budget, page_size)
    with stage("measuring the result", hidden=as_json):
        contenders = [paged(loaded.model, policy, page_size=page_size)._replace(name="tuned")]
        contenders += [paged(loaded.model, name, page_size=page_size) for name in uniform(parts)]
        results = evaluate(loaded.model, ids, contenders, step=page_size, page_size=page_size, batch=batch)
    described: dict[str, Any] = {
        "bits_per_element": mean_bits(policy, parts, page_size),
        "budget": budget,
        "page_size": page_size,
        "measured": {
            "on": text_conditions(loaded, DEFAULT_TEXT if text is None else Path(text).name, ids),
            "rung_of_one_part": sensitivity.probes,
            "kld_of_one_part": [
                {side: sensitivity.parts[Part(side, i)] for side in ("keys", "values")}
                for i in range(len(policy.layers))
            ],
            "kld_of_rungs": sensitivity.rungs,
            "kld": {name: result.accuracy.kld_mean for name, result in results.items()},
            "bits": {name: result.storage.page_bits_per_element for name, result in results.items()},
        },
    }
    write_layers(out, policy.as_dict()["layers"], fingerprint(loaded.model.config), described)
    if as_json:
        print_json({"file": out, "layers": policy.as_dict()["layers"]} | described)
    else:
        _print_table(policy, described)
    say(f"wrote {out}; use it as policy={out!r}, and measure it on another text with kvquant eval --policies {out}.")


def _print_table(policy: LayerwisePolicy, described: dict[str, Any]) -> None:
    """What each layer got and why, then the whole beside uniform policies."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    measured = described["measured"]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("layer", "keys", "values"):
        table.add_column(heading, no_wrap=True)
    for side in ("keys", "values"):
        table.add_column(f"KLD, {side} in {measured['rung_of_one_part'][side]}", justify="right")
    for i, (layer, kld) in enumerate(zip(policy.layers, measured["kld_of_one_part"], strict=True)):
        table.add_row(str(i), layer.keys, layer.values, f"{kld['keys']:.1e}", f"{kld['values']:.1e}")
    console.print(table)
    whole = Table("policy", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("bits", "mean KLD"):
        whole.add_column(heading, justify="right")
    for name, kld in measured["kld"].items():
        whole.add_row(name, f"{measured['bits'][name]:.2f}", f"{kld:.2e}")
    console.print(whole)
    on = measured["on"]
    where = f"{on['model']}, {on['dtype']}, {on['text']}, first {on['windows']} windows of {on['context_tokens']}"
    console.print(
        f"\n{where}, which it was tuned on\n"
        "KLD of a layer: that part so, everything else exact; bits: per element in full pages",
        highlight=False,
    )
