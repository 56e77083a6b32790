"""``kvquant eval``: what a quantized cache does to a model's predictions on real text."""

import csv
import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from ..policies.table import POLICIES, parse_policy
from .measure import long_text
from .measuring import check_writable, conditions, position_limit, progress, split_names
from .models import LoadedModel, check_cache_options, load_model
from .terminal import InputError, print_json, say, stage

EXACT = "exact"
DEFAULT_POLICIES = ",".join(name for name, policy in POLICIES.items() if name != EXACT and not policy.calibrated)
DEFAULT_WINDOWS = 8  # at most
DEFAULT_TEXT = "Python language reference"
CHUNKS, GENERATE = "chunks", "generate"  # modes
DEFAULT_PROMPT = 64  # tokens
# Differences smaller than this many times the noise floor are not worth a sentence.
FLOOR_FACTOR = 10


def evaluate(
    model: Annotated[
        str | None, typer.Option(help="Folder, .gguf file or hub name; default: the built-in SmolLM2-135M-Instruct.")
    ] = None,
    policies: Annotated[
        str, typer.Option(help="Policies to measure, with commas; exact always is.")
    ] = DEFAULT_POLICIES,
    baselines: Annotated[
        str, typer.Option(help="transformers' own quantized caches, with commas: quanto-4,hqq-4,hqq-8.")
    ] = "",
    text: Annotated[str | None, typer.Option(help="A UTF-8 file; default: the Python language reference.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="NAME[:CONFIG[:SPLIT]] for the datasets library; column text, split test.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="chunks: the text is read a page at a time; generate: it is continued token by token.")
    ] = CHUNKS,
    context: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    prompt: Annotated[
        int | None, typer.Option(min=1, help="First tokens of a window that --mode generate continues; default: 64.")
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(min=1, help="Windows, from the beginning of the text; default: 8, or what a shorter text has."),
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=1, help="Tokens per forward pass, at most a page; 1 is as in generation.")
    ] = None,
    page_size: Annotated[int, typer.Option(help="Tokens per page, a multiple of 8.")] = 64,
    sinks: Annotated[
        int | None, typer.Option(help="First tokens of a sequence that are kept exact; default: what the policy does.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows side by side.")] = 4,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "float32",
    outliers: Annotated[
        float | None, typer.Option(help="Give the keys outlier channels, so many times larger; a power of two.")
    ] = None,
    qparams: Annotated[
        str | None,
        typer.Option(help="Folder or file of `kvquant qparams`: for int8-static, a prior for kv3 and others."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
    csv_file: Annotated[str | None, typer.Option("--csv", help="Write the numbers to a CSV file too.")] = None,
    figure: Annotated[
        str | None, typer.Option(help="Draw mean KLD against bits, or along the way: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Compare next-token distributions through quantized caches with the exact model's.

    Text is read in windows, a page at a time; everything attended to comes out of the cache, as in generation.  With
    --mode generate the exact model continues the beginning of each window, and its continuation is decoded token by
    token through each cache: whether errors accumulate, and whether reading it in chunks would be better.
    """
    from ..evaluation import cut_windows, with_outlier_keys
    from ..evaluation.baselines import baseline, parse_baseline
    from ..evaluation.figure import check_figure, draw, draw_way
    from ..evaluation.generate import check_prompt, decode, passes
    from ..evaluation.harness import check_step, paged
    from ..evaluation.harness import evaluate as measure
    from ..evaluation.text import read_dataset, read_file

    # Whatever can be wrong is said before a model is loaded or hours of measuring are lost.
    names = [EXACT, *(name for name in split_names(policies) if parse_policy(name).name != EXACT)]
    names = list({parse_policy(name): name for name in names}.values())
    parsed = {name: parse_policy(name) for name in names}
    parameters = {name: qparams if x.calibrated or x.uses_queries else None for name, x in parsed.items()}
    if qparams is not None and not any(parameters.values()):
        raise InputError("--qparams is for policies that a calibration helps; add int8-static to --policies, or kv3.")
    for name in names:
        check_cache_options(name, page_size, qparams=parameters[name], sinks=sinks)
    if mode not in (CHUNKS, GENERATE):
        raise InputError(f"unknown mode {mode!r}; use {CHUNKS} or {GENERATE}.")
    if mode == CHUNKS and prompt is not None:
        raise InputError(f"--prompt goes with --mode {GENERATE}, the only one with a prompt; leave it out.")
    if mode == GENERATE and step is not None:
        raise InputError(f"--step goes with --mode {CHUNKS}, because {GENERATE} decodes one by one; leave it out.")
    if mode == GENERATE:
        step, prompt = 1, DEFAULT_PROMPT if prompt is None else prompt
        check_prompt(prompt, context)
    step = page_size if step is None else step
    check_step(step, page_size)
    others = split_names(baselines)
    for name in others:
        parse_baseline(name)
    if text is not None and dataset is not None:
        raise InputError("--text and --dataset exclude each other.")
    for file in (csv_file, figure):
        check_writable(file)
    if figure is not None:
        check_figure(figure)
    content = read_file(text) if text is not None else read_dataset(dataset) if dataset is not None else long_text()
    described = Path(text).name if text is not None else dataset or DEFAULT_TEXT

    loaded = load_model(model, dtype, hidden=as_json)
    limit = position_limit(loaded.model)
    if limit and context > limit:
        raise InputError(f"this model takes {limit} tokens; use at most --context {limit}.")
    with stage("tokenizing the text", hidden=as_json):
        count = windows or DEFAULT_WINDOWS
        ids = cut_windows(loaded.tokenizer, content, context, count, or_fewer=windows is None)
    if outliers is not None:
        with stage("giving the keys outliers", hidden=as_json):
            loaded = loaded._replace(model=with_outlier_keys(loaded.model, outliers))
    contenders = [
        paged(loaded.model, name, page_size=page_size, qparams=parameters[name], sinks=sinks) for name in names
    ]
    contenders += [baseline(loaded.model, name) for name in others]
    total = passes(prompt, context, page_size) if prompt else -(-context // step)
    results: Any
    with progress((len(contenders) + 1) * -(-len(ids) // batch) * total, hidden=as_json) as advance:
        options: dict[str, Any] = {"page_size": page_size, "batch": batch, "advance": advance}
        if prompt:
            ids, results = decode(loaded.model, ids[:, :prompt], context, contenders, **options)
        else:
            results = measure(loaded.model, ids, contenders, step=step, **options)
    facts = text_conditions(loaded, described, ids) | {
        "mode": mode,
        "prompt_tokens": prompt,
        "step": step,
        "page_size": page_size,
        "sinks": sinks,
        "batch": batch,
        "outliers": outliers,
    }
    rows = {name: result.as_dict() for name, result in results.items()}
    if csv_file is not None:
        _write_csv(csv_file, facts, rows)
    if figure is not None and prompt:
        draw_way({name: result.result.scores.kld for name, result in results.items()}, prompt, _title(facts), figure)
    elif figure is not None:
        draw(results, _title(facts), figure)
    if as_json:
        print_json(facts | {"caches": rows})
    else:
        _print_table(facts, rows)
        if prompt:
            _print_way(rows)
    _say_what_drowns(rows, facts["dtype"])


def text_conditions(loaded: LoadedModel, text: str, ids: Any) -> dict[str, Any]:
    """The conditions of a measurement."""
    return conditions(loaded) | {
        "text": text,
        "windows": ids.shape[0],
        "context_tokens": ids.shape[1],
        "tokens_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
    }


def _title(facts: dict[str, Any]) -> str:
    keys = f", keys with outliers x{facts['outliers']:g}" if facts["outliers"] else ""
    windows = f"first {facts['windows']} windows of {facts['context_tokens']}"
    if facts["prompt_tokens"]:
        windows += f", prompts of {facts['prompt_tokens']}"
    return f"{facts['model']}, {facts['dtype']}{keys}\n{facts['text']}, {windows}"


def _write_csv(path: str, facts: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    """A line per cache; the conditions are repeated in each."""
    repeated = {name: value for name, value in facts.items() if name != "versions"}
    repeated |= {f"{package}_version": number for package, number in facts["versions"].items()}
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["cache", *next(iter(rows.values())), *repeated])
        writer.writeheader()
        writer.writerows({"cache": name} | row | repeated for name, row in rows.items())


def _print_table(facts: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    """The conditions, then a line per cache, as wide as a terminal of 80 columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    exact = rows[EXACT]
    console.print(f"{_title(facts)}, {exact['positions']} positions", highlight=False)
    console.print(f"perplexity of the exact model: {exact['exact_perplexity']:.3f}\n", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("cache", overflow="fold")
    for heading in ("bits", "held", "mean KLD", "median", "99.9 %", "top-1", "perplexity"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        bits = row["page_bits_per_element"]
        klds = (f"{row[key]:.2e}" for key in ("kld_mean", "kld_median", "kld_q999"))
        table.add_row(
            name,
            "-" if bits is None else f"{bits:.2f}",
            f"{row['bits_per_element']:.2f}",
            *klds,
            f"{row['top1_agreement']:.2%}",
            f"{row['perplexity']:.3f}",
        )
    console.print(table)
    console.print(
        "\nbits: per key or value element in full pages; held: everything, the open page too\n"
        "KLD: KL(exact || cache), nats; top-1: the same most likely token; exact: the noise floor",
        highlight=False,
    )


def _print_way(rows: dict[str, dict[str, Any]]) -> None:
    """KLD along the way and in chunks, a line per cache, as wide as a terminal of 80 columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("cache", overflow="fold")
    for heading in ("quarter 1", "2", "3", "4", "mean KLD", "chunked KLD"):
        table.add_column(heading, justify="right", no_wrap=True)
    keys = (*(f"kld_mean_quarter_{i}" for i in range(1, 5)), "kld_mean", "kld_mean_chunked")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:.2e}" for key in keys))
    console.print()
    console.print(table)
    console.print(
        "\nquarters: mean KLD of each quarter of the positions, in order\n"
        "chunked KLD: of the same tokens, read a page at a time instead of one by one",
        highlight=False,
    )


def _say_what_drowns(rows: dict[str, dict[str, Any]], dtype: str) -> None:
    """Name the caches whose difference from the exact model is not much more than rounding."""
    floor = rows[EXACT]["kld_mean"]
    drowned = [name for name, row in rows.items() if name != EXACT and row["kld_mean"] < FLOOR_FACTOR * floor]
    if drowned:
        say(
            f"{', '.join(drowned)}: mean KLD within {FLOOR_FACTOR} times the noise floor of {dtype} ({floor:.1e}), so "
            "rounding is part of it; use --dtype float32 to see it alone."
        )
