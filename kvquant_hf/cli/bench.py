"""``kvquant bench``: speed and memory of KV caches side by side; ``--throughput``: many requests in batches."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from ..policies.table import parse_policy
from .measure import long_text
from .models import load_model
from .sizes import bytes_of
from .terminal import INTERRUPTED, InputError, print_json, stage


class _Asked(NamedTuple):
    """Which model, how many tokens it has to read, and whether to be silent about it."""

    model: str | None
    shape: str | None
    layers: int | None
    tokens: int
    hidden: bool


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
    rounds: Annotated[int, typer.Option(min=1, help="Decode steps of each cache.")] = 24,
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Tokens per forward pass of a prompt.")] = 512,
    peak: Annotated[bool, typer.Option("--peak/--no-peak", help="Peak memory, a process for each number.")] = True,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one prompt, or for the rounds.")] = 600.0,
    throughput: Annotated[
        bool,
        typer.Option(
            "--throughput", rich_help_panel="Throughput", help="Many requests in batches, instead of one sequence."
        ),
    ] = False,
    requests: Annotated[int, typer.Option(rich_help_panel="Throughput", min=1, help="How many.")] = 32,
    requests_file: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Throughput", help="Lengths from JSON lines or a ShareGPT file; default: a synthetic mix."
        ),
    ] = None,
    kv_budget: Annotated[
        str | None, typer.Option(rich_help_panel="Throughput", help="Bytes of a batch's cache: 500MB, 1GB.")
    ] = None,
    batch_sizes: Annotated[
        str | None, typer.Option(rich_help_panel="Throughput", help="Requests per batch, with commas: 8,16,32,48.")
    ] = None,
    max_prompt: Annotated[
        int, typer.Option(rich_help_panel="Throughput", min=4, help="Longest prompt of a request.")
    ] = 1024,
    max_output: Annotated[
        int, typer.Option(rich_help_panel="Throughput", min=2, help="Longest answer of a request.")
    ] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
    csv_file: Annotated[str | None, typer.Option("--csv", help="Write the numbers to a CSV file too.")] = None,
    figure: Annotated[str | None, typer.Option(help="Draw speed and memory: .png, .svg or .pdf.")] = None,
) -> None:
    """Time decode steps and prefill of KV caches in turn, and weigh them.

    All caches of a context take turns in one process; peak memory is measured in a process for each number.  What does
    not fit or is not installed is named with its reason.  Ctrl-C shows what was measured until then.
    """
    from ..benchmark.contenders import choose
    from ..benchmark.plan import known_dtypes, numbers_of, prompt_tokens
    from ..benchmark.shapes import find_shape
    from ..benchmark.speed.figure import check_figure, save
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
    if throughput:
        if figure is not None:
            raise InputError("--figure draws speed against context; leave it out with --throughput.")
        if kv_budget is None and batch_sizes is None:
            raise InputError("--throughput needs --kv-budget 1GB, --batch-sizes 8,16,32,48, or both.")
        budget = None if kv_budget is None else bytes_of(kv_budget)
        sizes: list[int | None] = [None]
        if batch_sizes is not None:
            sizes = [*numbers_of(batch_sizes, "--batch-sizes")]
        run = partial(
            _serve, requests, requests_file, max_prompt, max_output, budget, sizes, ours, chosen or ("bfloat16",)
        )
        needed = max_prompt + max_output
    else:
        if kv_budget is not None or batch_sizes is not None or requests_file is not None:
            raise InputError("--kv-budget, --batch-sizes and --requests-file go with --throughput; add it.")
        contexts = numbers_of(context, "--context")
        for tokens in contexts:
            prompt_tokens(tokens, CHECKED, rounds)
        run = partial(_compare, sorted(set(contexts)), ours, theirs, chosen, rounds, prefill_chunk, peak, timeout)
        needed = max(contexts)
    result = run(_Asked(model, shape, layers, needed, as_json))
    # First what cannot go wrong: hours of measuring may lie in it.
    if as_json:
        print_json(result.as_dict())
    else:
        _print_table(result.table())
    if csv_file is not None:
        result.write_csv(csv_file)
    if figure is not None:
        save(result.conditions, result.rows, figure)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


def _compare(
    contexts: Sequence[int],
    policies: Sequence[str],
    baselines: Sequence[str],
    dtypes: Sequence[str] | None,
    rounds: int,
    chunk: int,
    peak: bool,
    timeout: float,
    asked: _Asked,
) -> Any:
    from ..benchmark import compare
    from ..benchmark.speed.compare import default_dtypes

    dtypes = dtypes or default_dtypes()
    subject, _ = _subject(asked, dtypes)
    with _progress(asked.hidden) as advance:
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


def _serve(
    count: int,
    file: str | None,
    max_prompt: int,
    max_output: int,
    budget: int | None,
    sizes: Sequence[int | None],
    policies: Sequence[str],
    dtypes: Sequence[str],
    asked: _Asked,
) -> Any:
    from ..benchmark import draw_requests, read_requests, serve

    lengths = {"max_prompt": max_prompt, "max_output": max_output}
    drawn = draw_requests(count, **lengths)  # wrong lengths are said before a model is loaded
    subject, tokenizer = _subject(asked, dtypes)
    about = "synthetic: log-normal lengths with ShareGPT's means (161 and 338 tokens), seed 0"
    if file is not None:
        drawn = read_requests(file, count, tokenizer, **lengths)
        about = f"lengths of {Path(file).name}"
    about += f"; at most {max_prompt} + {max_output} tokens"
    with _progress(asked.hidden) as advance:
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


def _subject(asked: _Asked, dtypes: Sequence[str]) -> tuple[Any, Any]:
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


def _list(names: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))


@contextmanager
def _progress(hidden: bool) -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal; a line for each new thing where stderr is a file, unless ``hidden``."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    # Two frames a second: what draws must not cost what is timed.
    with Progress(
        *columns, console=console, transient=True, refresh_per_second=2, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("loading", total=1.0)

        def advance(what: str, share: float) -> None:
            progress.update(task, advance=share, description=what or None)
            if what and ": round " not in what and not console.is_terminal and not hidden:
                print(f"{what} ...", file=sys.stderr, flush=True)

        yield advance


def _print_table(table: Any) -> None:
    """Title, lines and notes, as wide as the terminal; wider where columns would lose their numbers."""
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    console = Console()
    console.print(f"{table.title}\n", highlight=False)
    gap = 1 if console.width >= 90 else 0  # between columns, beside the one that is always there
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap, 0, 0))
    for i, heading in enumerate(table.headings):
        shown.add_column(heading, justify="left" if i < 2 else "right", no_wrap=i > 0, overflow="fold")
    for line in table.lines:
        shown.add_row(*line)
    whole = Measurement.get(console, console.options.update(max_width=1000), shown).maximum
    Console(width=max(console.width, whole)).print(shown)
    console.print()
    for note in table.notes:
        console.print(f"- {note}", highlight=False, markup=False)
