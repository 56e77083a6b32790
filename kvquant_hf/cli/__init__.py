"""The command ``kvquant``: measuring, tuning, calibrating and trying quantized KV caches from a shell.

Text and JSON go to stdout; progress, reports and errors to stderr.  Every error is one sentence that starts with
"kvquant:" (``KVQUANT_DEBUG=1`` shows the traceback instead).  Exit code 2: wrong input, 1: failure, 130: interrupted.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer

from ..errors import (
    BenchmarkInputError,
    EvaluationInputError,
    KVQuantError,
    QParamsError,
    ServingError,
    UnknownPolicyError,
    UnsupportedModelError,
    WrongModelError,
)
from . import bench, calibrate, chat, compare, demo, generate, lm_eval, needle, policies, qparams, serve, tune, web
from .eval import evaluate
from .terminal import INTERRUPTED, CommandError, quiet, say

__all__ = ["main"]

# click's base of all errors about the command line; click itself is vendored by newer versions of typer.
_ClickError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

_WRONG_INPUT = (
    BenchmarkInputError,
    EvaluationInputError,
    QParamsError,
    ServingError,
    UnknownPolicyError,
    UnsupportedModelError,
    WrongModelError,
)

_app = typer.Typer(
    name="kvquant",
    help="KV cache for Hugging Face transformers, stored in quantized pages.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_app.command()(bench.bench)
_app.command()(calibrate.calibrate)
_app.command()(chat.chat)
_app.command()(compare.compare)
_app.command()(demo.demo)
_app.command("eval")(evaluate)  # not eval: that is Python's own
_app.command()(generate.generate)
_app.command("lm-eval", **lm_eval.PASS_ON)(lm_eval.lm_eval)
_app.command()(needle.needle)
_app.command()(policies.policies)
_app.command()(qparams.qparams)
_app.command()(serve.serve)
_app.command()(tune.tune)
_app.command()(web.web)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line ``argv`` (default: the process's own) and exit."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a model may write what the terminal cannot show
    sys.exit(_run(list(sys.argv[1:] if argv is None else argv) or ["--help"]))


def _run(args: list[str]) -> int:
    """Run one command line; the exit code.  Any error was said on stderr."""
    try:
        with quiet():
            code = typer.main.get_command(_app).main(args, prog_name="kvquant", standalone_mode=False)
        # click turns Ctrl-C into an exit code (new versions) or into Abort (old ones).
        return _failed("interrupted.", INTERRUPTED) if code == INTERRUPTED else int(code or 0)
    except (KeyboardInterrupt, typer.Abort):
        return _failed("interrupted.", INTERRUPTED)
    except Exception as error:
        if os.environ.get("KVQUANT_DEBUG"):
            raise
        return _failed(*_explain(error))


def _failed(sentence: str, code: int) -> int:
    say(sentence)
    return code


def _explain(error: Exception) -> tuple[str, int]:
    """One sentence and the exit code for anything that a command raises."""
    if isinstance(error, _ClickError):
        return error.format_message(), 2
    if isinstance(error, CommandError):
        return str(error), error.exit_code
    if isinstance(error, KVQuantError):
        return str(error), 2 if isinstance(error, _WRONG_INPUT) else 1
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}; KVQUANT_DEBUG=1 shows where.", 1
