"""The commands ``bench`` and ``tune``."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from kvquant_hf.errors import UnknownPolicyError
from kvquant_hf.policies.table import KVPolicy, parse_policy

from . import plan, run, tune
from .clock import STARTED, Budget, hard_stop, no_hard_stop
from .importable import ROOT
from .machine import NoGpuError, UnnamedError, describe, gpu, slug
from .passed import pass_gate
from .results import Writer, find
from .timing import GpuLostError, Stopwatch

RESULTS = ROOT / "benchmarks" / "results"
LAUNCH = ROOT / "triton_kernels" / "launch.py"
NO_GPU, RED = 2, 1
# Seconds at the end of a command: for the last table and figure, and for the process to go.
_DRAWING, _GOING = 20.0, 3.0

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Measure and tune kvquant-hf on a GPU.")

Out = Annotated[Path, typer.Option(help="Folder of the results; a second run goes on with what it finds there.")]
Minutes = Annotated[float, typer.Option(min=0.5, help="For everything, from the start of the command to its end.")]
Commit = Annotated[str, typer.Option(help="What to name the measured code, instead of what git says.")]
FullGate = Annotated[bool, typer.Option("--full-gate", help="Run every case of the kernel tests, not the usual ones.")]


@contextmanager
def _limits(minutes: float) -> Iterator[Budget]:
    """The time that may be spent on measuring; behind it, and some seconds to draw, the process ends in any case."""
    hard_stop(Budget(minutes * 60 - _GOING, STARTED))
    try:
        yield Budget(minutes * 60 - _GOING - _DRAWING, STARTED)
    except (NoGpuError, UnnamedError, GpuLostError) as error:
        lost = f"the GPU answers no more ({error}); run again with the same --out to measure the other cells."
        typer.echo(lost if isinstance(error, GpuLostError) else str(error), err=True)
        raise typer.Exit(NO_GPU if isinstance(error, NoGpuError) else RED) from None
    finally:
        no_hard_stop()


def _green(
    names: list[str], facts: Mapping[str, str], out: Path, budget: Budget, full: bool
) -> tuple[list[str], dict[str, str]]:
    """The policies that may be measured, and the constant columns; exits with 1 if there is none."""
    policies, ran = pass_gate(names, facts, out, budget, full=full)
    if not policies:
        raise typer.Exit(RED)
    return policies, {**facts, "policies": " ".join(policies), "gate": ran}


def _parsed(names: str) -> list[str]:
    """Names of policies that can be measured with random pages.

    Raises:
        UnknownPolicyError: another name.
    """
    policies = names.split(",")
    for name in policies:
        policy = parse_policy(name)
        if not isinstance(policy, KVPolicy) or policy.calibrated:
            raise UnknownPolicyError(f"{name!r} cannot be measured with random pages; leave it out of --policies.")
    return policies


@app.command()
def bench(
    out: Out = RESULTS,
    source: Annotated[Path | None, typer.Option("--from", help="Only draw table and figure of this CSV.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter cells, a model of 4 layers.")] = False,
    minutes: Minutes = 8.0,
    policies: Annotated[str, typer.Option(help="Comma-separated, as the cache takes them.")] = ",".join(plan.POLICIES),
    commit: Commit = "",
    full_gate: FullGate = False,
) -> None:
    """Run the kernel tests, then measure kernels, whole models, updates and a sweep; one CSV, table and figure."""
    if source is not None:
        run.draw(source)
        return
    try:
        names = _parsed(policies)
    except UnknownPolicyError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(RED) from None
    with _limits(minutes) as end:
        device = gpu()
        names, constants = _green(names, describe(device, commit), out, end, full_gate)
        gc.collect()
        gc.freeze()  # capturing a graph collects garbage, which takes long with all modules of torch to look at
        kind = "gpu-quick" if quick else "gpu"
        path, before = find(out, f"{kind}-{slug(constants['gpu'])}-{constants['date']}", constants)
        stopwatch = Stopwatch(device)
        with Writer(path, constants, before) as writer:
            run.measure(run.groups(names, stopwatch, device, quick), writer, before, stopwatch, end)
        typer.echo(f"wrote {path}, and table and figure beside it")


@app.command(name="tune")
def tune_launches(
    out: Out = RESULTS,
    minutes: Minutes = 8.0,
    commit: Commit = "",
    full_gate: FullGate = False,
    write: Annotated[bool, typer.Option("--write", help="Rewrite triton_kernels/launch.py too.")] = False,
) -> None:
    """Time launch configurations on this GPU, and write launch.py with its rows into the folder of the results."""
    with _limits(minutes) as end:
        device = gpu()
        names, facts = _green(
            list(dict.fromkeys(tune.POLICIES.values())), describe(device, commit), out, end, full_gate
        )
        stopwatch = Stopwatch(device)
        asked = [question for question in tune.questions() if question.policy in names]
        before = LAUNCH.read_text(encoding="utf-8")
        after = tune.table(asked, before, facts, out, stopwatch, device, end)
        if after is None:
            typer.echo("no row was measured, so the table stays as it is; run with more --minutes.", err=True)
            raise typer.Exit(RED)
        typer.echo(tune.difference(before, after) or "the table stays as it is")
        if write:
            LAUNCH.write_text(after, encoding="utf-8")
            typer.echo(f"wrote {LAUNCH}")
