"""The commands ``bench`` and ``tune``."""

import difflib
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from kvquant_hf.errors import UnknownPolicyError
from kvquant_hf.policies.table import parse_policy
from kvquant_hf.triton_kernels.launch import LaunchConfig
from kvquant_hf.triton_kernels.target import architecture

from . import gate, plan
from .importable import ROOT
from .launch_table import rewrite
from .machine import NoGpuError, describe, gpu, slug
from .models import model_cells
from .plan import Budget
from .report import figure, markdown
from .results import Observation, Writer, read
from .sweep import decode_sweep
from .timing import Stopwatch, attempt
from .tune import Question, answer, as_source, present, questions
from .updates import update_cells

RESULTS = ROOT / "benchmarks" / "results"
LAUNCH = ROOT / "triton_kernels" / "launch.py"
NO_GPU, RED = 2, 1
# Seconds of the whole run that the gate and the parts behind the sweep may take.
_GATE, _UPDATES, _MODELS = 300.0, 60.0, 240.0

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Measure and tune kvquant-hf on a GPU.")


def _gpu() -> torch.device:
    try:
        return gpu()
    except NoGpuError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(NO_GPU) from None


def pass_gate(budget: Budget) -> None:
    """Run the kernel tests, say how it went, and exit with 1 unless they pass."""
    verdict = gate.run(budget, gate.KERNEL_TESTS)
    for name, reason in verdict.left_out.items():
        typer.echo(f"gate: {name} is left out: {reason}")
    typer.echo(f"gate: {verdict.passed} passed, {verdict.skipped} skipped, {len(verdict.failed)} failed")
    if not verdict.green:
        typer.echo(verdict.output)
        for name in verdict.failed or ("no test ran",):
            typer.echo(f"gate: red: {name}")
        typer.echo("The kernel tests do not pass on this machine, so nothing is measured; mend them first.", err=True)
        raise typer.Exit(RED)


def draw(path: Path) -> None:
    """Write the table and the figure of a CSV file beside it."""
    rows = read(path)
    path.with_suffix(".md").write_text(markdown(rows, path.name), encoding="utf-8")
    typer.echo(f"wrote {path.with_suffix('.md')}")
    try:
        figure(rows, path.with_suffix(".png"))
    except (ImportError, ValueError) as error:
        typer.echo(f"no figure: {error}; later: python benchmarks/gpu bench --from {path}", err=True)
    else:
        typer.echo(f"wrote {path.with_suffix('.png')}")


def parts(
    policies: Sequence[str], stopwatch: Stopwatch, device: torch.device, budget: Budget, quick: bool
) -> Iterator[list[Observation]]:
    """All rows of a run, situation by situation."""
    if quick:
        cells = plan.cells(plan.SHAPES[:1], (1, 8), (4096, 32768))
        yield from decode_sweep(cells, policies, stopwatch, device, budget.part(60), 0.5)
        yield from update_cells(policies, stopwatch, device, budget.part(20), 0.2, batches=(8,))
        situations = ((8, 8192), (1, 8192))
        yield from model_cells(
            policies, stopwatch, device, budget, situations=situations, steps=16, num_hidden_layers=4
        )
        return
    sweep = Budget(budget.left() - _UPDATES - _MODELS)
    yield from decode_sweep(plan.cells(), policies, stopwatch, device, sweep, 1.5)
    yield from update_cells(policies, stopwatch, device, budget.part(_UPDATES), 0.5)
    yield from model_cells(policies, stopwatch, device, budget)


def _say(rows: Sequence[Observation]) -> None:
    for row in rows:
        what = f"{row.part} batch {row.batch} context {row.context} head_dim {row.head_dim} {row.family}"
        if row.p50_us is None:
            typer.echo(f"{what} {row.contender}: {row.status}: {row.reason}")
            continue
        ratio = f", {row.ratio_to_bf16:.2f} x bf16" if row.ratio_to_bf16 else ""
        share = f", {row.percent_of_copy:.0f} % of a copy" if row.percent_of_copy else ""
        speed = f", {row.tokens_per_s:.1f} tokens/s" if row.tokens_per_s else ""
        typer.echo(f"{what} {row.contender}: {row.p50_us:.1f} us{ratio}{share}{speed}")


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    source: Annotated[Path | None, typer.Option("--from", help="Only draw table and figure of this CSV.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few cells: about two minutes after the gate.")] = False,
    minutes: Annotated[float, typer.Option(help="For everything, the gate included.")] = 14.0,
    policies: Annotated[str, typer.Option(help="Comma-separated, as the cache takes them.")] = ",".join(plan.POLICIES),
    commit: Annotated[str, typer.Option(help="What to name the measured code, where git cannot say it.")] = "",
) -> None:
    """Run the kernel tests, then measure decode steps, appends, prefill and whole models; one CSV, table and figure."""
    if source is not None:
        draw(source)
        return
    device = _gpu()
    names = policies.split(",")
    try:
        for name in names:
            parse_policy(name)
    except UnknownPolicyError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(RED) from None
    budget = Budget(minutes * 60)
    pass_gate(budget.part(_GATE))
    gc.collect()
    gc.freeze()  # capturing a graph collects garbage, which takes long with all modules of torch to look at
    if quick:
        budget = budget.part(120)
    constants = describe(device, commit)
    path = out / f"gpu-{slug(constants['gpu'])}-{constants['date']}{'-quick' if quick else ''}.csv"
    with Writer(path, constants) as writer:
        for rows in parts(names, Stopwatch(device), device, budget, quick):
            writer.write(rows)
            _say(rows)
    typer.echo(f"wrote {path}")
    draw(path)


@app.command()
def tune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the difference, write nothing.")] = False,
    minutes: Annotated[float, typer.Option(help="For everything, the gate included.")] = 9.5,
) -> None:
    """Time launch configurations on this GPU and write its rows into the table of triton_kernels/launch.py."""
    device = _gpu()
    budget = Budget(minutes * 60)
    pass_gate(budget.part(_GATE))
    stopwatch = Stopwatch(device)
    found = {question: _tuned(question, stopwatch, device, budget) for question in questions()}
    if not any(found.values()):
        typer.echo("no row was measured, so the table stays as it is; run with more --minutes.", err=True)
        raise typer.Exit(RED)
    facts = describe(device)
    measured_on = f"{facts['gpu']}, Triton {facts['triton']}, {facts['date']}"
    # Rows that were not measured are written too, as they are: the measured ones would answer for them otherwise.
    choices = {q.bound: as_source(config or present(q, device)) for q, config in found.items()}
    before = LAUNCH.read_text(encoding="utf-8")
    after = rewrite(before, architecture(device), choices, measured_on)
    changes = difflib.unified_diff(before.splitlines(), after.splitlines(), str(LAUNCH), "tuned", lineterm="")
    typer.echo("\n".join(changes) or "the table stays as it is")
    if not dry_run:
        LAUNCH.write_text(after, encoding="utf-8")


def _tuned(question: Question, stopwatch: Stopwatch, device: torch.device, budget: Budget) -> LaunchConfig | None:
    dim, rows, bits = question.bound
    title = f"head_dim {dim}, rows from {rows}, bits up to {bits or 'any'}"
    found, reason = attempt(lambda: answer(question, stopwatch, device, budget), stopwatch, budget.left())
    if found is None:
        typer.echo(f"{title}: not measured, stays as it is {reason}".rstrip())
        return None
    typer.echo(
        f"{title}: {as_source(found.best)} {found.best_us:.1f} us, was {as_source(found.present)} "
        f"{found.present_us:.1f} us; {found.tried} timed, {found.dropped} dropped"
    )
    return found.best
