"""``kvquant bench``: speed and memory of KV caches side by side, or many requests at once.

``--throughput`` answers them in batches in this process, ``--serve`` sends them to servers.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..policies.table import parse_policy
from . import bench_servers
from .bench_caches import Asked, compare_caches, serve_batches
from .sizes import bytes_of, times_of
from .terminal import INTERRUPTED, InputError, print_json, print_table

ROUNDS, LOADS = 24, 3  # if --rounds is not given
STEP, STOCK_PAGE, TIMES = 256, 256, 8.0  # of --serve, if nothing else is said; a block of 256 is transformers' own
THROUGHPUT, SERVE = "Throughput (--throughput)", "Load on servers (--serve)"
BOTH = "Requests (--throughput, --serve)"


def bench(
    model: Annotated[
        str | None, typer.Option(help="Folder, .gguf file or hub name; default: the built-in SmolLM2-135M-Instruct.")
    ] = None,
    shape: Annotated[str | None, typer.Option(help="Random weights instead: llama-3-8b, qwen2.5-7b ...")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="With --shape: so many layers.")] = None,
    context: Annotated[str, typer.Option(help="Tokens held, with commas; k is 1,024.")] = "1k,4k,8k,32k",
    policies: Annotated[
        str, typer.Option(help="Our policies, with commas; exact always is.")
    ] = "exact,int8,int4,turboquant",
    baselines: Annotated[
        str, typer.Option(help="transformers' caches, with commas; dynamic always is.")
    ] = "static,quanto-4,hqq-4,fp8",
    dtypes: Annotated[
        str | None, typer.Option(help="With commas; default: float32,bfloat16, on a GPU bfloat16.")
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help=f"Decode steps of each cache ({ROUNDS}), or loads of each server ({LOADS})."),
    ] = None,
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Tokens per forward pass of a prompt.")] = 512,
    peak: Annotated[bool, typer.Option("--peak/--no-peak", help="Peak memory, a process for each number.")] = True,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for one prompt, for the rounds, or of a server's silence.")
    ] = 600.0,
    throughput: Annotated[
        bool, typer.Option("--throughput", rich_help_panel=THROUGHPUT, help="Many requests in batches, in one process.")
    ] = False,
    batch_sizes: Annotated[
        str | None, typer.Option(rich_help_panel=THROUGHPUT, help="Requests per batch, with commas: 8,16,32,48.")
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", rich_help_panel=SERVE, help="Start transformers' server and ours, and load them.")
    ] = False,
    rate: Annotated[
        float | None, typer.Option(rich_help_panel=SERVE, min=1e-6, help="Requests per second; default: all at once.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(rich_help_panel=SERVE, min=1, help="Most connections at a time.")
    ] = None,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(rich_help_panel=SERVE, min=1, help=f"Tokens that a server computes in a step ({STEP})."),
    ] = None,
    max_concurrent: Annotated[
        int | None,
        typer.Option(rich_help_panel=SERVE, min=1, help="Requests with pages in ours; default: as many as fit."),
    ] = None,
    stock_page_size: Annotated[
        int | None,
        typer.Option(rich_help_panel=SERVE, min=4, help=f"Tokens of a block of transformers' server ({STOCK_PAGE})."),
    ] = None,
    url: Annotated[
        list[str] | None, typer.Option(rich_help_panel=SERVE, help="NAME=URL of a running server instead; may repeat.")
    ] = None,
    requests: Annotated[int, typer.Option(rich_help_panel=BOTH, min=1, help="How many.")] = 32,
    requests_file: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=BOTH,
            help="Lengths from JSON lines, CSV or a ShareGPT file; default: a synthetic mix; of --serve: of ShareGPT.",
        ),
    ] = None,
    kv_budget: Annotated[
        str | None,
        typer.Option(rich_help_panel=BOTH, help="Bytes of a batch's or a server's cache: 500MB; of --serve also 8x."),
    ] = None,
    max_prompt: Annotated[
        int, typer.Option(rich_help_panel=BOTH, min=4, help="Longest prompt; longer are cut.")
    ] = 1024,
    max_output: Annotated[
        int, typer.Option(rich_help_panel=BOTH, min=2, help="Longest answer; longer are cut.")
    ] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
    csv_file: Annotated[str | None, typer.Option("--csv", help="Write the numbers to a CSV file too.")] = None,
    figure: Annotated[str | None, typer.Option(help="Draw the numbers: .png, .svg or .pdf.")] = None,
) -> None:
    """Time decode steps and prefill of KV caches in turn, and weigh them.

    All caches of a context take turns in one process; peak memory is measured in a process for each number.  What does
    not fit or is not installed is named with its reason.  Ctrl-C shows what was measured until then.  With --throughput
    or --serve, many requests are answered instead, in batches or by servers.
    """
    from ..benchmark.contenders import EXACT, choose
    from ..benchmark.pictures import check_figure, save
    from ..benchmark.plan import known_dtypes, numbers_of, prompt_tokens
    from ..benchmark.shapes import find_shape
    from ..benchmark.speed.race import CHECKED

    # Whatever can be wrong is said before a model is loaded or hours of measuring are lost.
    ours, theirs = _list(policies), _list(baselines)
    for name in ours:
        parse_policy(name)
    choose(ours, theirs)
    if model is not None and shape is not None:
        raise InputError("--model and --shape exclude each other.")
    if shape is not None:
        find_shape(shape)
    elif layers is not None:
        raise InputError("--layers goes with --shape; leave it out.")
    chosen = None if dtypes is None else known_dtypes(_list(dtypes))
    for file in (csv_file, figure):
        if file is not None and (not Path(file).absolute().parent.is_dir() or Path(file).is_dir()):
            raise InputError(f"cannot write {file!r}: give the name of a file in a folder that exists.")
    if figure is not None:
        check_figure(figure)
    started = {"--max-batch-tokens": max_batch_tokens, "--max-concurrent": max_concurrent}
    started |= {"--stock-page-size": stock_page_size}
    if not serve:
        _refuse({"--rate": rate, "--concurrency": concurrency, "--url": url, **started}, "goes with --serve; add it")
    if serve:
        unfit = {"--throughput": throughput or None, "--batch-sizes": batch_sizes, "--shape": shape}
        _refuse(unfit, "does not go with --serve; leave it out")
        if url:
            _refuse({"--kv-budget": kv_budget, **started}, "is for servers that are started; leave it out with --url")
        if chosen is not None and len(chosen) > 1:
            raise InputError("--serve takes one dtype; use --dtypes bfloat16.")
        times = times_of(kv_budget) if kv_budget else TIMES
        asked = bench_servers.Asked(
            model=model,
            dtype=(chosen or ("bfloat16",))[0],
            policies=list(dict.fromkeys([EXACT, *ours])),
            urls=bench_servers.named_urls(url or ()),
            requests=requests,
            requests_file=requests_file,
            max_prompt=max_prompt,
            max_output=max_output,
            kv_times=times or TIMES,
            kv_bytes=bytes_of(kv_budget) if kv_budget and times is None else None,
            max_batch_tokens=max_batch_tokens or STEP,
            max_concurrent=max_concurrent,
            stock_page_size=stock_page_size or STOCK_PAGE,
            rate=rate,
            concurrency=concurrency,
            rounds=rounds or LOADS,
            timeout=timeout,
            hidden=as_json,
        )
        run: Callable[[], Any] = partial(bench_servers.load_servers, asked)
    elif throughput:
        if figure is not None:
            raise InputError("--figure draws speed against context; leave it out with --throughput.")
        if kv_budget is None and batch_sizes is None:
            raise InputError("--throughput needs --kv-budget 1GB, --batch-sizes 8,16,32,48, or both.")
        budget = None if kv_budget is None else bytes_of(kv_budget)
        sizes: list[int | None] = [None]
        if batch_sizes is not None:
            sizes = [*numbers_of(batch_sizes, "--batch-sizes")]
        subject = Asked(model, shape, layers, max_prompt + max_output, as_json)
        workload = requests, requests_file, max_prompt, max_output
        run = partial(serve_batches, *workload, budget, sizes, ours, chosen or ("bfloat16",), subject)
    else:
        if kv_budget is not None or batch_sizes is not None or requests_file is not None:
            raise InputError(
                "--kv-budget, --batch-sizes and --requests-file go with --throughput or --serve; add one of them."
            )
        contexts = numbers_of(context, "--context")
        steps = rounds or ROUNDS
        for tokens in contexts:
            prompt_tokens(tokens, CHECKED, steps)
        subject = Asked(model, shape, layers, max(contexts), as_json)
        measured = sorted(set(contexts)), ours, theirs, chosen
        run = partial(compare_caches, *measured, steps, prefill_chunk, peak, timeout, subject)
    result = run()
    # First what cannot go wrong: hours of measuring may lie in it.
    if as_json:
        print_json(result.as_dict())
    else:
        print_table(result.table())
    if csv_file is not None:
        result.write_csv(csv_file)
    if figure is not None:
        save(result.figure(), figure)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


def _refuse(options: dict[str, Any], why: str) -> None:
    """Say which option is out of place.

    Raises:
        InputError: one of ``options`` was given.
    """
    for name, value in options.items():
        if value is not None:
            raise InputError(f"{name} {why}.")


def _list(names: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
