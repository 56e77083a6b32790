"""Two panels: decode speed and memory against context, a line for each cache."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..contenders import DYNAMIC, OURS, USUAL_POLICIES
from ..pictures import OURS_COLOURS, THEIRS_COLOURS, new_figure, usual_place
from ..tables import SHORT, where
from .rows import Row

_MARKERS = "osD^vP*X"


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
    figure = new_figure()
    from matplotlib.ticker import FuncFormatter, NullFormatter

    dtypes = faster_dtypes(rows)
    peaks = any(row.peak is not None for row in rows)
    speed, memory = figure.subplots(1, 2)
    counts = {True: len(USUAL_POLICIES), False: 0}
    for cache, dtype in dtypes.items():
        mine = sorted(
            (r for r in rows if (r.cache, r.dtype) == (cache, dtype) and r.p50_ms), key=lambda row: row.context
        )
        ours = mine[0].family == OURS
        palette = OURS_COLOURS if ours else THEIRS_COLOURS
        usual = usual_place(cache) if ours else None
        place = counts[ours] if usual is None else usual
        style: dict[str, Any] = {
            "color": palette[place % len(palette)],
            "marker": _MARKERS[place % len(_MARKERS)],
            "markersize": 5,
            "linewidth": 2.4 if cache == DYNAMIC else 1.6,
            "linestyle": "-" if ours or cache == DYNAMIC else "--",
        }
        counts[ours] += usual is None
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
