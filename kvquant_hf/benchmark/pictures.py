"""What all figures share: the kinds of file, matplotlib without a window, and the colour of each cache."""

import importlib.util
import io
from pathlib import Path
from typing import Any

from ..errors import BenchmarkInputError, MissingPackageError
from .contenders import USUAL_POLICIES

SUFFIXES = (".pdf", ".png", ".svg")
# Okabe and Ito's colours, which colour-blind readers can tell apart; transformers' own caches are grey.
OURS_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
THEIRS_COLOURS = ("#000000", "#777777", "#999999", "#555555", "#bbbbbb")


def usual_place(policy: str) -> int | None:
    """Where a usual policy stands among ``OURS_COLOURS``, in every figure; None for other names."""
    return USUAL_POLICIES.index(policy) if policy in USUAL_POLICIES else None


def check_figure(path: str) -> None:
    """Say before anything is measured that a figure could not be drawn.

    Raises:
        MissingPackageError: matplotlib is not installed.
        BenchmarkInputError: a file name of another kind.
    """
    if Path(path).suffix not in SUFFIXES:
        raise BenchmarkInputError(f"cannot draw {path!r}; name a file that ends with {', '.join(SUFFIXES)}.")
    _need_matplotlib()


def _need_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError(
            "a figure needs the package matplotlib; run: pip install matplotlib, or leave --figure out."
        )


def new_figure() -> Any:
    """An empty matplotlib ``Figure`` of the usual size.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    _need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class Picture(Figure):
        """Shows itself in a notebook, also where pyplot was never imported."""

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=100)
            return file.getvalue()

    figure = Picture(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the machine has
    return figure


def save(figure: Any, path: str) -> None:
    """Write a figure to a .png, .svg or .pdf file.

    Raises:
        BenchmarkInputError: it cannot be written.
    """
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise BenchmarkInputError(f"cannot write {path!r}: {error.strerror}; name another file.") from error
