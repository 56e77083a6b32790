"""Bits per element against mean KLD, as a picture."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from ..errors import EvaluationInputError, MissingPackageError
from .harness import EXACT, Result

SUFFIXES = (".pdf", ".png", ".svg")


def check_figure(path: str, option: str = "--figure") -> None:
    """Say before anything is measured that a figure could not be drawn.

    Args:
        path: the file to be drawn.
        option: how the user asked for it.

    Raises:
        MissingPackageError: matplotlib is not installed.
        EvaluationInputError: a file name of another kind.
    """
    if Path(path).suffix not in SUFFIXES:
        raise EvaluationInputError(f"cannot draw {path!r}; name a file that ends with {', '.join(SUFFIXES)}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError(
            f"{option} needs the package matplotlib; run: pip install matplotlib, or leave it out."
        )


def draw(results: Mapping[str, Result], title: str, path: str) -> None:
    """A point for every contender but ``exact``, whose KLD (the noise floor) is told in the axis label.

    Bits are those of full pages, or of everything held for caches that have no pages.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the machine has
    axes = figure.add_subplot()
    for name, result in results.items():
        if name == EXACT:
            continue
        bits = result.storage.page_bits_per_element or result.storage.bits_per_element
        axes.scatter(bits, result.accuracy.kld_mean)
        axes.annotate(name, (bits, result.accuracy.kld_mean), textcoords="offset points", xytext=(6, 4))
    axes.set_yscale("log")
    axes.set_xlabel("bits per element, scales included")
    floor = f"; noise floor {results[EXACT].accuracy.kld_mean:.1e}" if EXACT in results else ""
    axes.set_ylabel(f"mean KL(exact || quantized), nats{floor}")
    axes.set_title(title)
    axes.margins(x=0.25)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)
