"""The gate as the commands see it: run, said in sentences, and remembered for a run that goes on."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import typer

from . import gate
from .clock import Budget
from .machine import CONDITIONS, slug

# Of the time of a command, what the tests may take.
SHARE, FULL_SHARE = 0.5, 0.8


def pass_gate(
    policies: Sequence[str], facts: Mapping[str, str], folder: Path, budget: Budget, *, full: bool
) -> tuple[list[str], str]:
    """Run the kernel tests of ``policies`` and say how it went.

    Tests that passed under the same conditions, the code among them to the byte, are not run a second time: the file
    ``gate-<gpu>.json`` in ``folder`` says so.

    Args:
        policies: that are to be measured.
        facts: of ``machine.describe``.
        folder: of the results.
        budget: of the whole command.
        full: also the cases that are marked ``full``.

    Returns:
        The policies of which nothing is red, in their order (none: nothing may be measured), and what was run, for the
        file of results.
    """
    path = folder / f"gate-{slug(facts['gpu'])}.json"
    conditions = {name: facts[name] for name in CONDITIONS if name in facts}
    known = _recall(path, conditions, full)
    if known and set(policies) <= set(known["policies"]):
        typer.echo(f"gate: {known['ran']}, under the same conditions ({path}); not run again")
        return list(policies), str(known["ran"])
    kind = "every case" if full else "trimmed"
    typer.echo(f"gate: the kernel tests of {', '.join(policies)} ({kind}); --full-gate runs every case")
    share = FULL_SHARE if full else SHARE
    verdict = gate.run(budget.part(share * budget.left()), gate.KERNEL_TESTS, policies, full=full)
    against = {policy: verdict.against(policy) for policy in policies}
    green = [policy for policy, reasons in against.items() if not reasons]
    for name, reason in verdict.left_out.items():
        typer.echo(f"gate: {name} is left out: {reason}")
    ran = f"{verdict.passed.total()} passed, {verdict.skipped.total()} skipped, {len(verdict.failures)} red, {kind}"
    typer.echo(
        f"gate: {ran}; not run: {verdict.aside['codecs']} of other codecs, "
        f"{verdict.aside['device']} that run nothing on the device"
    )
    if verdict.failures:
        typer.echo(verdict.output)
    for failure in verdict.failures:
        typer.echo(f"gate: red: {failure.name}")
    for policy, reasons in against.items():
        if reasons:
            more = f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""
            typer.echo(f"gate: {policy} is left out, its own tests are red: {reasons[0]}{more}", err=True)
    if not green:
        typer.echo("The kernel tests do not pass on this machine, so nothing is measured; mend them first.", err=True)
    elif not verdict.failures:
        folder.mkdir(parents=True, exist_ok=True)
        record = {"conditions": conditions, "full": full, "policies": green, "ran": ran}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return green, ran


def _recall(path: Path, conditions: Mapping[str, str], full: bool) -> dict[str, object] | None:
    """What the file says, if it is of the same conditions and of as many cases."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or half of one
        return None
    same = record["conditions"] == conditions and record["full"] >= full
    return record if same else None
