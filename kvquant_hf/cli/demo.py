"""``kvquant demo``: the same answers, the same long text, less memory; exact and quantized side by side."""

import platform
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer

from .models import WEIGHTS_HELP, check_cache_options, load_model
from .terminal import InputError, print_json

REFERENCE = "exact"


def demo(
    model: Annotated[
        str | None, typer.Option(help="Folder, .gguf file or hub name; default: the built-in SmolLM2-135M-Instruct.")
    ] = None,
    policies: Annotated[str, typer.Option(help="Policies to compare, with commas.")] = "exact,int8,int4,turboquant",
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per text.")] = 64,
    context: Annotated[int, typer.Option(min=2, help="Tokens of the long text.")] = 3000,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "bfloat16",
    weights: Annotated[str, typer.Option(help=WEIGHTS_HELP)] = "full",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
) -> None:
    """Answer a prompt and continue a long text, exact and quantized, as a table.

    Agreement, bytes and speed are of the long text (the Python language reference); about two minutes on two cores.
    """
    names = list(dict.fromkeys(name.strip() for name in policies.split(",") if name.strip()))
    if not names:
        raise InputError("--policies is empty; name at least one, for instance --policies exact,int4.")
    for name in names:
        check_cache_options(name)  # what is wrong is said before the model is loaded
    results, facts = _measure(names, model, dtype, context, tokens, hidden=as_json, weights=weights)
    if as_json:
        print_json(facts | {"policies": {name: result.as_dict() for name, result in results.items()}})
    else:
        _print_results(results, facts)


def _measure(
    names: list[str], model: str | None, dtype: str, context: int, tokens: int, *, hidden: bool, weights: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results by policy, and the conditions under which they were measured."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from .measure import AGREEMENT_POSITIONS, Bench

    loaded = load_model(model, dtype, hidden=hidden, weights=weights)
    bench = Bench(loaded, context, tokens)
    order = [REFERENCE, *(name for name in names if name != REFERENCE)]
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    results = {}
    # Two frames a second: what draws must not cost what is timed.
    with Progress(
        *columns, console=console, transient=True, refresh_per_second=2, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=len(order))
        for name in order:
            progress.update(task, description=f"{name}: {context} tokens of context, {tokens} new")
            if not console.is_terminal and not hidden:
                print(f"measuring {name} ...", file=sys.stderr, flush=True)
            results[name] = bench.measure(name)
            progress.advance(task)
    facts = {
        "model": loaded.description,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "weights": loaded.weights_held(),
        "device": str(loaded.model.device),
        "context_tokens": context,
        "new_tokens": tokens,
        "agreement_positions": AGREEMENT_POSITIONS,
        "versions": {
            "kvquant_hf": _own_version(),
            "transformers": version("transformers"),
            "torch": version("torch"),
            "python": platform.python_version(),
        },
    }
    return {name: results[name] for name in names}, facts


def _own_version() -> str:
    from .. import __version__

    return __version__


def _print_results(results: dict[str, Any], facts: dict[str, Any]) -> None:
    """The table, then what each policy wrote."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    held = facts["context_tokens"] - 1 + facts["agreement_positions"]
    taken = f"weights in {facts['weights']['bytes'] / 1e6:.1f} MB"
    console.print(
        f"{facts['model']}, {taken}, {facts['dtype']} on {facts['device']}, {held} tokens held\n", highlight=False
    )
    table = Table("policy", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("KV bytes", "ratio", "bits/element", "top-1 agreement", "tokens/s"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.bytes / 1e6:.2f} MB",
            f"{result.ratio:.2f}x",
            f"{result.bits_per_element:.2f}",
            f"{result.top1_agreement:.1%}",
            f"{result.tokens_per_second:.1f}",
        )
    console.print(table)
    console.print(
        f"\nratio: to {facts['dtype']}, everything held counted; agreement: with {REFERENCE}, over "
        f"{facts['agreement_positions']} tokens of real text; tokens/s: decoding at {facts['context_tokens']} tokens",
        highlight=False,
    )
    fallbacks = {name: result.fallback_calls for name, result in results.items() if result.fallback_calls}
    if fallbacks:
        counts = ", ".join(f"{count} in {name}" for name, count in fallbacks.items())
        console.print(f"attention calls that multiplied the cache out: {counts}")
    for title, field in (("answer to the prompt", "answer"), ("continuation of the long text", "text")):
        console.print(f"\n{title}", style="bold")
        said: dict[str, str] = {}
        for name, result in results.items():
            text = getattr(result, field)
            first = said.setdefault(text, name)
            shown = _shortened(text) if first == name else f"the same as {first}"
            console.print(Text(f"{name}: ", style="cyan"), Text(shown), sep="")


def _shortened(text: str, most: int = 280) -> str:
    """One line of at most ``most`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 4].rsplit(" ", 1)[0] + " ..."
