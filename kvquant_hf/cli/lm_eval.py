"""``kvquant lm-eval``: lm-eval's own command line, which knows the model ``kvquant`` here."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from ..errors import MissingPackageError
from .models import builtin_file
from .terminal import say

# Options, --help included, are lm-eval's.
PASS_ON: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}
ABOUT = """\
Everything after `kvquant lm-eval` is passed on to lm-eval, which knows one more model here:

  --model kvquant --model_args policy=int4,pretrained=MODEL
      Every task runs through the quantized cache.  policy, page_size, prefill, impl, sliding and sinks are those of the
      cache; everything else is as for --model hf.  Without pretrained: the built-in SmolLM2-135M-Instruct.
"""
GENERATION_ONLY = (
    "with --model {model}, the quantized cache reaches tasks that generate only: log-likelihood tasks (multiple "
    "choice, perplexity) run without one and would show no effect; use --model kvquant for them."
)


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval's own command line, with the model kvquant: every task runs through a quantized cache."""
    check_installed()
    if not context.args or {"-h", "--help"} & set(context.args):
        print(ABOUT)
    with _arguments(["lm-eval", *context.args]), _watched():
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()


def check_installed() -> None:
    """Raise ``MissingPackageError`` where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingPackageError("this command needs the package lm-eval; run: pip install 'kvquant-hf[lm-eval]'.")


@contextmanager
def _arguments(argv: list[str]) -> Iterator[None]:
    """lm-eval reads the process's command line."""
    before, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _watched() -> Iterator[None]:
    """Register the model, and look at what lm-eval's command has made of its arguments before it evaluates anything."""
    import lm_eval

    from ..evaluation import lm_eval_model  # noqa: F401  # registers the model

    original = lm_eval.simple_evaluate
    lm_eval.simple_evaluate = _prepared(original)
    try:
        yield
    finally:
        lm_eval.simple_evaluate = original


def _prepared(simple_evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """``simple_evaluate`` with the built-in model where none is named, and a warning where results would mislead."""

    def evaluate(*, model: str, model_args: dict[str, Any], gen_kwargs: dict[str, Any], **options: Any) -> Any:
        if model == "kvquant" and "pretrained" not in model_args:
            file = builtin_file()
            model_args = model_args | {"pretrained": str(file.parent), "gguf_file": file.name}
        if model != "kvquant" and _names_our_cache(gen_kwargs):
            say(GENERATION_ONLY.format(model=model))
        return simple_evaluate(model=model, model_args=model_args, gen_kwargs=gen_kwargs, **options)

    return evaluate


def _names_our_cache(gen_kwargs: dict[str, Any] | None) -> bool:
    """Whether ``generate`` is to make a cache of ours."""
    given = gen_kwargs or {}
    backend = (given.get("cache_config") or {}).get("backend")
    return "kvquant" in (given.get("cache_implementation"), backend)
