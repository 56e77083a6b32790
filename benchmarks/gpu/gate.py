"""No speed while a test is red: the kernel tests of what is measured, compiled on the device, in their own processes.

Nothing but pytest itself is needed: test files that import a package which is not here are left out and named, and the
tests are dealt out to several pytest processes because most of their time is compilation.  A red test speaks for the
codecs that it is about, and so for every policy that has one of them; a test that is about none, for all policies.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvquant_hf.policies.table import POLICIES, KVPolicy, parse_policy
from kvquant_hf.triton_kernels.codecs import CODECS

from .clock import Budget
from .importable import ROOT, environment, link_tree
from .selection import Asked

KERNEL_TESTS = ROOT / "tests" / "kernels"
# A process holds a core while it compiles, and half a gigabyte of the GPU's memory.
MOST_PROCESSES = 12


@dataclass(frozen=True)
class Failure:
    """A test that failed or did not end, or what kept tests from running; ``codecs`` it is about, empty for all."""

    name: str
    codecs: frozenset[str] = frozenset()


@dataclass
class Verdict:
    """What the tests said.

    Args:
        passed, skipped: numbers of tests, by the file.
        by_codec: tests that passed, by the codecs they are about.
        failures: what is red.
        aside: tests that were not run: "codecs" that are not measured, "device": nothing runs there.
        left_out: why a file was not run, by its name.
        output: the end of what pytest printed about failures.
    """

    passed: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    by_codec: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    aside: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)
    output: str = ""

    def against(self, policy: str) -> list[str]:
        """Why the speed of ``policy`` may not be measured; empty if it may."""
        codecs = codecs_of([policy])
        red = [failure.name for failure in self.failures if not failure.codecs or failure.codecs & codecs]
        untested = [f"no test of {codec} passed" for codec in sorted(codecs) if not self.by_codec[codec]]
        return red or untested


def codecs_of(policies: Iterable[str]) -> set[str]:
    """Codecs of keys and values of all ``policies``."""
    parsed = [parse_policy(policy) for policy in policies]
    return {codec for policy in parsed if isinstance(policy, KVPolicy) for codec in (policy.keys, policy.values)}


def _tree(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError:
        return None  # pytest says it better


def _missing(tree: ast.Module) -> list[str]:
    """Top-level packages that a test file imports and that are not installed; tests' own folders are not asked for."""
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    own = {entry.stem for entry in (ROOT / "tests").iterdir()} | {"kvquant_hf"}
    return sorted(n for n in {name.partition(".")[0] for name in names} - own if importlib.util.find_spec(n) is None)


def _runs_there(tree: ast.Module) -> bool:
    """Whether a test of the file asks for the fixture ``device``."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return any(argument.arg == "device" for f in functions if f.name.startswith("test_") for argument in f.args.args)


def choose(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Test files of ``folder`` to run, and why each of the others is left out."""
    files, left_out = [], {}
    for path in sorted(folder.glob("test_*.py")):
        tree = _tree(path)
        if tree and not _runs_there(tree):
            left_out[path.name] = "runs nothing on the device"
        elif tree and (missing := _missing(tree)):
            left_out[path.name] = f"needs {', '.join(missing)}"
        else:
            files.append(path)
    return files, left_out


def run(
    budget: Budget, folder: Path, policies: Sequence[str], *, full: bool = False, processes: int | None = None
) -> Verdict:
    """Run the tests of ``folder``.

    Args:
        budget: time for all of them; what is not finished then counts as failed.
        folder: where ``test_*.py`` are.
        policies: which are to be measured; tests of other codecs are not run.
        full: also the cases that are marked ``full``.
        processes: at once; one for each core, at most ``MOST_PROCESSES``, if None.
    """
    files, left_out = choose(folder)
    if not files:
        return Verdict(failures=[Failure(f"no test file of {folder.name} can run here")], left_out=left_out)
    count = processes or min(MOST_PROCESSES, os.cpu_count() or 1)
    verdict = Verdict(left_out=left_out)
    with tempfile.TemporaryDirectory() as scratch:
        asked = [ask(policies, Path(scratch), n, count) for n in range(count)]
        running: list[subprocess.Popen[bytes]] = []
        try:
            running += [_start(files, each, full) for each in asked]
            for process, each in zip(running, asked, strict=True):
                _judge(process, each, budget, verdict)
            # A file that skips everything has tested nothing, whatever the others say.
            for name in verdict.skipped.keys() - verdict.passed.keys():
                verdict.failures.append(Failure(f"{name}: all {verdict.skipped[name]} tests were skipped"))
        finally:
            for process in running:
                process.kill()
                process.wait()
    return verdict


def ask(policies: Sequence[str], scratch: Path, shard: int, shards: int) -> Asked:
    """What to tell a process that writes its report into ``scratch``."""
    names = {codec: [codec] for codec in CODECS} | {policy: sorted(codecs_of([policy])) for policy in POLICIES}
    report = str(scratch / f"{shard}.jsonl")
    return Asked(shard=shard, shards=shards, codecs=sorted(codecs_of(policies)), names=names, report=report)


def _start(files: Sequence[Path], asked: Asked, full: bool, *more: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command += ["-p", "no:cacheprovider", "-p", "gpu.selection", "-q", "--tb=short", *(["-m", ""] if full else [])]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-p", "no:xdist"]
    command += [*more, *map(str, files)]
    with Path(asked["report"]).with_suffix(".txt").open("w") as output:
        # From the tree of links: python -m puts the working directory in front of the path.
        variables = environment() | {"GATE": json.dumps(asked)}
        return subprocess.Popen(command, cwd=link_tree(), env=variables, stdout=output, stderr=output)


def _judge(process: "subprocess.Popen[bytes]", asked: Asked, budget: Budget, verdict: Verdict) -> None:
    """Wait for a process, and add what it reported to ``verdict``."""
    title = f"process {asked['shard'] + 1} of {asked['shards']}"
    late = False
    try:
        code = process.wait(timeout=max(budget.left(), 0.1))
    except subprocess.TimeoutExpired:
        process.kill()
        code, late = process.wait(), True
    report = Path(asked["report"])
    lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    tests = {name: frozenset(codecs) for line in lines[:1] for name, codecs in line["tests"].items()}
    outcomes = {line["test"]: line["outcome"] for line in lines[1:]}
    if not asked["shard"]:  # each of them looked at all tests
        verdict.aside.update(lines[0]["aside"] if lines else {})
    passed = [name for name, outcome in outcomes.items() if outcome == "passed"]
    skipped = [name for name, outcome in outcomes.items() if outcome == "skipped"]
    red = [name for name, outcome in outcomes.items() if outcome == "failed"]
    verdict.passed.update(name.partition("::")[0] for name in passed)
    verdict.skipped.update(name.partition("::")[0] for name in skipped)
    verdict.by_codec.update(codec for name in passed for codec in tests[name])
    verdict.failures += [Failure(name, tests[name]) for name in red]
    if late or not lines or len(outcomes) < len(tests):
        why = "not finished in time" if late else f"pytest stopped with exit code {code}"
        left = [Failure(f"{name}: {why}", codecs) for name, codecs in tests.items() if name not in outcomes]
        verdict.failures += left or [Failure(f"{title}: {why}")]
    # 5: nothing was left to run.  Anything else than 0 and 1 says that pytest itself stopped.
    elif code not in (0, 1, 5) or (code == 1 and not red):
        verdict.failures.append(Failure(f"{title}: pytest stopped with exit code {code}"))
    if code not in (0, 5):
        verdict.output += report.with_suffix(".txt").read_text()[-3000:]
