"""Bits per element against mean KLD, or KLD along the way of a continuation, as a picture."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import EvaluationInputError, MissingPackageError
from .harness import EXACT, Result

SUFFIXES = (".pdf", ".png", ".svg")
_STEPS = 40  # of a curve along the way
# Where a point's name stands, and its alignment; points that lie close to each other take them in turn.
_PLACES = (((6, 4), "left"), ((-6, -4), "right"), ((6, -11), "left"))


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


def points_of(results: Mapping[str, Result]) -> tuple[dict[str, tuple[float, float]], str]:
    """Bits per element and mean KLD of every contender but ``exact``, and what these bits are."""
    storages = {name: result.storage for name, result in results.items() if name != EXACT}
    in_pages = {name: storage.page_bits_per_element for name, storage in storages.items()}
    label = "bits per element in full pages, scales included"
    bits = {name: of_pages for name, of_pages in in_pages.items() if of_pages is not None}
    if len(bits) < len(in_pages):
        label = "bits per element of everything held, scales and exact tokens included"
        bits = {name: storage.bits_per_element for name, storage in storages.items()}
    return {name: (bits[name], results[name].accuracy.kld_mean) for name in bits}, label


def draw(results: Mapping[str, Result], title: str, path: str) -> None:
    """A point for every contender but ``exact``, whose KLD (the noise floor) is told in the axis label.

    Bits are those of full pages, or of everything held if one of the caches has no pages: the same for all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the machine has
    axes = figure.add_subplot()
    points, label = points_of(results)
    last, place = (0.0, 0.0), 0
    for name, (bits, kld) in sorted(points.items(), key=lambda point: -point[1][1]):
        crowded = abs(last[0] - bits) < 1 and last[1] < 1.7 * kld
        last, place = (bits, kld), (place + 1) % len(_PLACES) if crowded else 0
        offset, side = _PLACES[place]
        axes.scatter(bits, kld)
        axes.annotate(name, (bits, kld), textcoords="offset points", xytext=offset, ha=side)
    axes.set_yscale("log")
    axes.set_xlabel(label)
    floor = f"; noise floor {results[EXACT].accuracy.kld_mean:.1e}" if EXACT in results else ""
    axes.set_ylabel(f"mean KL(exact || quantized), nats{floor}")
    axes.set_title(title)
    axes.margins(x=0.25, y=0.12)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)


def draw_way(klds: Mapping[str, torch.Tensor], prompt: int, title: str, path: str) -> None:
    """A curve for every contender: KLD along a continuation, mean over windows and over a fortieth of the positions.

    Args:
        klds: float64 ``[windows, positions]`` by contender, in nats; the first position follows ``prompt`` tokens.
        prompt: tokens before.
        title: above the picture.
        path: the file; ``check_figure`` says which names are possible.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the machine has
    axes = figure.add_subplot()
    for name, kld in klds.items():
        steps = kld.mean(dim=0).tensor_split(min(_STEPS, kld.shape[1]))
        ends = torch.tensor([len(step) for step in steps]).cumsum(0)
        axes.plot((prompt + ends).tolist(), [float(step.mean()) for step in steps], label=name)
    axes.set_yscale("log")  # what rounding made negative is left out
    axes.set_xlabel("tokens read")
    axes.set_ylabel("mean KL(exact || quantized), nats")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)
