"""Another process, in which Triton compiles: it decides once for a process, and this one has its interpreter.

What the process imports takes longer than most of what it is asked for, so it stays until the end of this one, and so
do the kernels that it has compiled.
"""

import atexit
import contextlib
import functools
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class _Process:
    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.errors = Path(self.folder.name, "stderr")
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = self.folder.name
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kernels.compiler_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                cwd=Path(__file__).parent.parent,
            )
        atexit.register(self.stop)

    def ask(self, request: bytes) -> tuple[Any, Exception | None]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(request)
            self.process.stdin.flush()
            answer: tuple[Any, Exception | None] = pickle.load(self.process.stdout)
        except (BrokenPipeError, EOFError) as error:
            _process.cache_clear()  # the next one gets a new one
            self.process.wait()
            raise RuntimeError(f"the compiling process failed:\n{self.errors.read_text()}") from error
        return answer

    def stop(self) -> None:
        """No more requests: it ends, and its kernels go."""
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


@functools.cache
def _process() -> _Process:
    return _Process()


def call(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, run there: a function of a module that can be imported, on what can be pickled.

    Raises:
        AssertionError: the function raised it.
        RuntimeError: it raised anything else, or the process ended.
    """
    result, error = _process().ask(pickle.dumps((function, args)))
    if error is not None:
        raise error
    return result


def _answer(request: tuple[Callable[..., Any], tuple[Any, ...]]) -> tuple[Any, Exception | None]:
    function, args = request
    try:
        return function(*args), None
    except AssertionError as error:
        return None, AssertionError(f"{error}\n{traceback.format_exc(limit=-3)}")
    except Exception as error:  # whatever stops it is the answer
        return None, RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}")


def _main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # where compilers say what they have to say
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(_answer(request), answers)
        answers.flush()


if __name__ == "__main__":
    _main()
