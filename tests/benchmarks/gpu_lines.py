"""Which statements of a folder of Python files run, and which functions are called: what the dry run is held to.

Statements, not lines: what a line of the compiled code belongs to differs between versions of Python.  Other processes
are watched too, if they are started with ``variables`` in their environment: Python imports ``sitecustomize`` from the
path that they give, which is written beside the reports and watches until the process ends.
"""

import ast
import atexit
import inspect
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

Places = set[tuple[str, int, str]]  # file, line, and "" or the name of the function that is called there
# They compile to nothing, or to what belongs to the statements inside.
_SILENT = (ast.FunctionDef, ast.ClassDef, ast.Try, ast.Global, ast.Nonlocal, ast.Pass)


class Watch:
    """Keeps what runs in files of ``folder`` while it is on."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self.seen: Places = set()

    def _local(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.seen.add((frame.f_code.co_filename, frame.f_lineno, ""))
        return self._local

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(self._folder):
            return None
        self.seen.add((code.co_filename, code.co_firstlineno, code.co_name))
        return self._local

    def _careful(self, number: int, handler: Any) -> Any:
        """``signal.signal`` whose handlers raise nothing where this class watches: that would end the watching."""

        def later(number: int, frame: FrameType | None) -> None:
            if frame is not None and frame.f_code in (Watch._local.__code__, Watch._called.__code__, later.__code__):
                signal.setitimer(signal.ITIMER_REAL, 1e-3)
            else:
                handler(number, frame)

        return self._signal(number, later if number == signal.SIGALRM and callable(handler) else handler)

    def __enter__(self) -> "Watch":
        self._before, self._signal = sys.gettrace(), signal.signal
        signal.signal = self._careful
        sys.settrace(self._called)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)
        signal.signal = self._signal


def watch_process() -> None:
    """Watch this process to its end, and report into a file of its own; what ``sitecustomize`` calls."""
    watch = Watch(Path(os.environ["WATCHED"]))
    report = Path(os.environ["WATCH_REPORTS"]) / f"{os.getpid()}.json"
    watch.__enter__()
    threading.settrace(watch._called)
    atexit.register(lambda: report.write_text(json.dumps(sorted(watch.seen))))


def variables(watched: Path, reports: Path) -> dict[str, str]:
    """Environment variables with which a process of Python is watched; ``reports``: an empty folder."""
    (reports / "sitecustomize.py").write_text("import gpu_lines\n\ngpu_lines.watch_process()\n")
    path = [str(reports), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    where = {"WATCHED": str(watched), "WATCH_REPORTS": str(reports)}
    return {"PYTHONPATH": os.pathsep.join(filter(None, path)), **where}


def reported(reports: Path) -> Places:
    """What the other processes ran."""
    return {tuple(place) for path in reports.glob("*.json") for place in json.loads(path.read_text())}


def _functions(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _functions(constant)


def _docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def missed(folder: Path, seen: Places) -> list[str]:
    """``<file>:<line>: <source>`` of every statement inside of a function that did not run, and every function that was
    not called.  What stands outside of functions runs with the import."""
    found = []
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = {line for file, line, name in seen if file == str(path) and not name}
        called = {(line, name) for file, line, name in seen if file == str(path) and name}
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        unseen = set()
        for node in (node for function in functions for part in function.body for node in ast.walk(part)):
            if isinstance(node, ast.stmt) and not isinstance(node, _SILENT) and not _docstring(node):
                body = getattr(node, "body", None)
                last = body[0].lineno - 1 if body else node.end_lineno or node.lineno
                if lines.isdisjoint(range(node.lineno, max(last, node.lineno) + 1)):
                    unseen.add(node.lineno)
        for code in _functions(compile(text, str(path), "exec")):
            # Neither bodies of classes, nor comprehensions, which are no functions in every version of Python.
            callable_ = code.co_flags & inspect.CO_OPTIMIZED and (
                code.co_name == "<lambda>" or not code.co_name.startswith("<")
            )
            if callable_ and (code.co_firstlineno, code.co_name) not in called:
                unseen.add(code.co_firstlineno)
        source = text.splitlines()
        found += [f"{path.name}:{n}: {source[n - 1].strip()}" for n in sorted(unseen)]
    return found
