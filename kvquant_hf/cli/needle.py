"""``kvquant needle``: is a fact in a long text still found through a quantized cache?  Depths and lengths as a grid."""

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from ..policies.table import parse_policy
from .eval import DEFAULT_TEXT, EXACT
from .measure import long_text
from .measuring import check_writable, conditions, position_limit, progress, split_names
from .models import check_cache_options, load_model
from .terminal import InputError, print_json, stage

DEFAULT_LENGTHS = (512, 1024, 2048, 4096)


def needle(
    model: Annotated[
        str | None, typer.Option(help="Folder, .gguf file or hub name; default: the built-in SmolLM2-135M-Instruct.")
    ] = None,
    policies: Annotated[
        str, typer.Option(help="Policies to measure, with commas; exact always is.")
    ] = "int8,int4,turboquant",
    lengths: Annotated[
        str | None,
        typer.Option(help="Tokens per prompt, with commas; default: 512,1024,2048,4096 as far as the model can read."),
    ] = None,
    depths: Annotated[
        str, typer.Option(help="Where the needle lies, in percent of the text, with commas.")
    ] = "0,25,50,75,100",
    text: Annotated[str | None, typer.Option(help="A UTF-8 file; default: the Python language reference.")] = None,
    seed: Annotated[int, typer.Option(help="Of the digits to be found.")] = 0,
    page_size: Annotated[int, typer.Option(help="Tokens per page, a multiple of 8.")] = 64,
    sinks: Annotated[
        int | None, typer.Option(help="First tokens of a sequence that are kept exact; default: what the policy does.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts of one length side by side.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
    png: Annotated[str | None, typer.Option(help="Draw heat maps: .png, .svg or .pdf.")] = None,
) -> None:
    """Hide five digits in texts of several lengths, at several depths, and see whether the model finds them.

    Found: each token of the answer is the most likely one, so greedy generation would write it.  Cells of a policy are
    compared with those of exact one by one.
    """
    from ..evaluation.figure import check_figure
    from ..evaluation.harness import written
    from ..evaluation.heatmap import draw_heatmaps
    from ..evaluation.needle import find_needles, hide_needles, passes
    from ..evaluation.text import read_file

    # Whatever can be wrong is said before a model is loaded or hours of measuring are lost.
    names = [EXACT, *(name for name in split_names(policies) if parse_policy(name).name != EXACT)]
    for name in names:
        check_cache_options(name, page_size, sinks=sinks)
    asked = None if lengths is None else [int(n) for n in _numbers(lengths, "--lengths 512,1024")]
    rows = _numbers(depths, "--depths 0,50,100")
    check_writable(png)
    if png is not None:
        check_figure(png, "--png")
    content = long_text() if text is None else read_file(text)

    loaded = load_model(model, dtype, hidden=as_json)
    limit = position_limit(loaded.model)
    readable = [length for length in DEFAULT_LENGTHS if limit is None or length <= limit]
    columns = asked or readable or [limit or DEFAULT_LENGTHS[0]]
    if limit and max(columns) > limit:
        raise InputError(f"this model takes {limit} tokens; use at most --lengths {limit}.")
    with stage("tokenizing the text", hidden=as_json):
        prompts = hide_needles(loaded.tokenizer, content, columns, rows, seed)
    with progress(len(names) * passes(prompts, page_size, batch), hidden=as_json) as advance:
        grids = {
            written(name, loaded.model, page_size): find_needles(
                loaded.model, prompts, name, page_size=page_size, sinks=sinks, batch=batch, advance=advance
            )
            for name in names
        }
    facts = conditions(loaded) | {
        "text": DEFAULT_TEXT if text is None else Path(text).name,
        "lengths": columns,
        "depths": rows,
        "seed": seed,
        "page_size": page_size,
        "sinks": sinks,
        "batch": batch,
        "tokens_sha256": hashlib.sha256(str([prompt.ids for prompt in prompts]).encode()).hexdigest(),
    }
    title = f"{facts['model']}, {facts['dtype']}\nneedles in {facts['text']}"
    if png is not None:
        draw_heatmaps(grids, title, png)
    if as_json:
        print_json(facts | {"caches": {name: _summary(cells, grids[EXACT]) for name, cells in grids.items()}})
    else:
        _print_table(title, columns, grids)


def _numbers(listed: str, example: str) -> list[float]:
    """Numbers of a list with commas, ascending.

    Raises:
        InputError: something else is among them, or there are none; the message ends with ``example``.
    """
    try:
        numbers = sorted(float(name) for name in split_names(listed))
    except ValueError:
        numbers = []
    if not numbers:
        raise InputError(f"{listed!r} is no list of numbers; write for instance {example}.")
    return numbers


def _equal(cells: list[Any], exact: list[Any]) -> int:
    """In how many cells the needle is found, or not found, as with ``exact``."""
    return sum(cell.found == other.found for cell, other in zip(cells, exact, strict=True))


def _summary(cells: list[Any], exact: list[Any]) -> dict[str, Any]:
    return {
        "found": sum(cell.found for cell in cells),
        "equal_to_exact": _equal(cells, exact),
        "cells": [cell.as_dict() for cell in cells],
    }


def _print_table(title: str, lengths: list[int], grids: dict[str, list[Any]]) -> None:
    """A line per policy, a column per length."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"{title}\n", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("cache", overflow="fold")
    for heading in (*(f"{length:,}" for length in lengths), "as exact", "nats"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, cells in grids.items():
        found = []
        for length in lengths:
            column = [cell.found for cell in cells if cell.length == length]
            found.append(f"{sum(column)}/{len(column)}")
        nats = sum(cell.nats for cell in cells) / len(cells)
        table.add_row(name, *found, f"{_equal(cells, grids[EXACT])}/{len(cells)}", f"{nats:.4f}")
    console.print(table)
    console.print(
        "\nneedles found, by tokens per prompt, of one per depth; as exact: the same outcome\n"
        "nats: mean -log p of a token of the answer",
        highlight=False,
    )
