"""Two panels: decode speed and memory against context, a line for each cache."""

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import BenchmarkInputError, MissingPackageError
from ..contenders import DYNAMIC, OURS, USUAL_POLICIES
from ..tables import SHORT, where
from .rows import Row

SUFFIXES = (".pdf", ".png", ".svg")
# Okabe and Ito's colours, which colour-blind readers can tell apart; transformers' own caches are grey and dashed.
# A usual policy has the same one in every figure.
_OURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_THEIRS = ("#000000", "#777777", "#999999", "#555555", "#bbbbbb")
_MARKERS = "osD^vP*X"


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


def faster_dtypes(rows: Sequence[Row]) -> dict[str, str]:
    """The dtype in which each cache is faster at the longest context at which it was measured."""
    chosen: dict[str, tuple[int, float, str]] = {}
    for row in rows:
        if row.p50_ms is not None:
            best = chosen.get(row.cache)
            if best is None or (-row.context, row.p50_ms) < best[:2]:
                chosen[row.cache] = (-row.context, row.p50_ms, row.dtype)
    return {cache: dtype for cache, (_, _, dtype) in chosen.items()}


def draw(conditions: Mapping[str, Any], rows: Sequence[Row]) -> Any:
    """The figure of a comparison, as matplotlib's ``Figure``, each cache in its faster dtype.

    Memory is the peak of a process above the loaded model where that was measured, else what the cache holds.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    _need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    dtypes = faster_dtypes(rows)
    peaks = any(row.peak is not None for row in rows)

    class Picture(Figure):
        """Shows itself in a notebook, also where pyplot was never imported."""

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=100)
            return file.getvalue()

    figure = Picture(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the machine has
    speed, memory = figure.subplots(1, 2)
    counts = {True: len(USUAL_POLICIES), False: 0}
    for cache, dtype in dtypes.items():
        mine = sorted(
            (r for r in rows if (r.cache, r.dtype) == (cache, dtype) and r.p50_ms), key=lambda row: row.context
        )
        ours = mine[0].family == OURS
        palette = _OURS if ours else _THEIRS
        usual = ours and cache in USUAL_POLICIES
        place = USUAL_POLICIES.index(cache) if usual else counts[ours]
        style: dict[str, Any] = {
            "color": palette[place % len(palette)],
            "marker": _MARKERS[place % len(_MARKERS)],
            "markersize": 5,
            "linewidth": 2.4 if cache == DYNAMIC else 1.6,
            "linestyle": "-" if ours or cache == DYNAMIC else "--",
        }
        counts[ours] += not usual
        label = f"{cache} ({SHORT.get(dtype, dtype)})"
        speed.plot([r.context for r in mine], [r.tokens_per_s for r in mine], label=label, **style)
        weighed = [(r.context, r.peak if peaks else r.stored_bytes) for r in mine]
        points = [(context, held / 1e6) for context, held in weighed if held is not None]
        memory.plot([x for x, _ in points], [y for _, y in points], label=label, **style)
    speed.set_ylabel("decode, tokens/s")
    speed.set_title("speed: higher is better", fontsize=10)
    memory.set_ylabel("peak above the loaded model, MB" if peaks else "held by the cache, MB")
    memory.set_title("memory: lower is better", fontsize=10)
    contexts = sorted({row.context for row in rows if row.p50_ms is not None})
    for axes in (speed, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("tokens held")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if dtypes:
        figure.legend(*speed.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    each = ", each cache in its faster dtype" if len(conditions["dtypes"]) > 1 else ""
    figure.suptitle(f"{conditions['model']}, batch 1{each}\n{where(conditions['machine'])}", fontsize=10)
    return figure


def save(conditions: Mapping[str, Any], rows: Sequence[Row], path: str) -> None:
    """Write the figure to a .png, .svg or .pdf file.

    Raises:
        MissingPackageError, BenchmarkInputError: see :func:`check_figure`; or it cannot be written.
    """
    check_figure(path)
    try:
        draw(conditions, rows).savefig(path, dpi=150)
    except OSError as error:
        raise BenchmarkInputError(f"cannot write {path!r}: {error.strerror}; name another file.") from error
