"""No speed while a test is red: the kernel tests, compiled on the device, in processes of their own.

Nothing but pytest itself is needed: test files that import a package which is not here are left out and named, and the
tests are dealt out to several pytest processes because most of their time is compilation.
"""

import ast
import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .importable import ROOT, environment, link_tree
from .plan import Budget

Running = tuple["subprocess.Popen[bytes]", Path]  # writes <path>.xml and <path>.txt
KERNEL_TESTS = ROOT / "tests" / "kernels"
# They compile for GPUs that are not there and read what comes out; they run nothing on the one that is.
AHEAD_OF_TIME = ("test_compile_targets.py", "test_kernel_docs.py")


@dataclass(frozen=True)
class Verdict:
    """What the tests said.

    Args:
        passed, skipped: numbers of tests.
        failed: names of the tests that failed, or the reason why they could not be run.
        left_out: why a file was not run, by its name.
        output: the end of what pytest printed about failures.
    """

    passed: int
    skipped: int
    failed: tuple[str, ...]
    left_out: dict[str, str]
    output: str = ""

    @property
    def green(self) -> bool:
        """Whether speeds may be measured: something passed and nothing failed."""
        return self.passed > 0 and not self.failed


def _missing(path: Path) -> list[str]:
    """Top-level packages that a test file imports and that are not installed; tests' own folders are not asked for."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError:
        return []  # pytest says it better
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    own = {entry.stem for entry in (ROOT / "tests").iterdir()} | {"kvquant_hf"}
    return sorted(n for n in {name.partition(".")[0] for name in names} - own if importlib.util.find_spec(n) is None)


def choose(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Test files of ``folder`` to run, and why each of the others is left out."""
    files, left_out = [], {}
    for path in sorted(folder.glob("test_*.py")):
        if path.name in AHEAD_OF_TIME:
            left_out[path.name] = "compiles for other GPUs"
        elif missing := _missing(path):
            left_out[path.name] = f"needs {', '.join(missing)}"
        else:
            files.append(path)
    return files, left_out


def run(budget: Budget, folder: Path, processes: int | None = None) -> Verdict:
    """Run the tests of ``folder``.

    Args:
        budget: time for all of them; what is not finished then counts as failed.
        folder: where ``test_*.py`` are.
        processes: at once; one for every two cores, at most 8, if None.
    """
    files, left_out = choose(folder)
    if not files:
        return Verdict(0, 0, (f"no test file of {folder.name} can run here",), left_out)
    count = processes or max(1, min(8, (os.cpu_count() or 1) // 2))
    with tempfile.TemporaryDirectory() as scratch:
        running = [_start(files, n, count, Path(scratch) / str(n)) for n in range(count)]
        return _judge(running, budget, left_out)


def _start(files: Sequence[Path], shard: int, count: int, report: Path) -> Running:
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command += ["-p", "no:cacheprovider", "-p", "gpu.shard", "-q", "--tb=short"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-p", "no:xdist"]
    # This family of reports names the file of a test.
    command += ["-o", "junit_family=xunit1", "--junit-xml", str(report.with_suffix(".xml")), *map(str, files)]
    variables = environment()
    variables |= {"SHARD": f"{shard}/{count}"}
    with report.with_suffix(".txt").open("w") as output:
        # From the tree of links: python -m puts the working directory in front of the path.
        process = subprocess.Popen(command, cwd=link_tree(), env=variables, stdout=output, stderr=output)
    return process, report


def _file(case: ElementTree.Element) -> str:
    return Path(case.get("file", "")).name


def _judge(running: Sequence[Running], budget: Budget, left_out: dict[str, str]) -> Verdict:
    passed: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    failed: list[str] = []
    output = ""
    for shard, (process, report) in enumerate(running):
        try:
            code = process.wait(timeout=max(budget.left(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            failed.append(f"process {shard + 1} of {len(running)}: not finished in time")
            continue
        text = report.with_suffix(".txt").read_text()
        xml = report.with_suffix(".xml")
        # 5: everything was deselected.  Anything else than 0 and 1 says that pytest itself stopped.
        cases = list(ElementTree.parse(xml).iter("testcase")) if xml.exists() else []
        red = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
        failed += [f"{_file(case)}::{case.get('name')}" for case in red]
        for case in cases:
            if case not in red:
                (passed if case.find("skipped") is None else skipped)[_file(case)] += 1
        if code not in (0, 1, 5) or (code == 1 and not red):
            failed.append(f"pytest stopped with exit code {code}")
        if code not in (0, 5):
            output += text[-3000:]
    # A file that skips everything has tested nothing, whatever the others say.
    failed += [f"{name}: all {count} tests were skipped" for name, count in skipped.items() if not passed[name]]
    return Verdict(passed.total(), skipped.total(), tuple(failed), left_out, output)
