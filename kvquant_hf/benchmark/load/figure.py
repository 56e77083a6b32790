"""Three panels: tokens per second, time to the first token, and time per token, a bar for each server."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..pictures import OURS_COLOURS, THEIRS_COLOURS, new_figure, usual_place
from ..tables import where
from .rows import LoadRow


def draw_load(conditions: Mapping[str, Any], rows: Sequence[LoadRow]) -> Any:
    """The figure of a load, as matplotlib's ``Figure``: medians as bars, lines up to the 99th percentile of times.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    figure = new_figure()
    measured = [row for row in rows if row.output_tokens_per_s is not None]
    names = [row.server for row in measured]
    places = [usual_place(name) for name in names]
    colours = [THEIRS_COLOURS[1] if place is None else OURS_COLOURS[place] for place in places]
    throughput, first, each = figure.subplots(1, 3)
    bars = throughput.bar(names, [row.output_tokens_per_s for row in measured], color=colours)
    throughput.bar_label(bars, ["" if row.ratio is None else f"{row.ratio:.2f}" for row in measured], fontsize=9)
    throughput.set_title(f"tokens/s (above: times {rows[0].server})\nhigher is better", fontsize=10)
    panels = (first, "ttft", "time to first token, s", 1.0), (each, "tpot", "time per token, ms", 1e3)
    for axes, what, title, factor in panels:
        times = [getattr(row, what) or {"p50": 0.0, "p99": 0.0} for row in measured]
        middle = [factor * time["p50"] for time in times]
        rest = [factor * (time["p99"] - time["p50"]) for time in times]
        axes.bar(names, middle, color=colours, yerr=[[0.0] * len(rest), rest], capsize=3)
        axes.set_title(f"{title}: median, p99\nlower is better", fontsize=10)
    for axes in (throughput, first, each):
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
        axes.tick_params(axis="x", rotation=30)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{conditions['model']}, {conditions['requests']} requests\n{where(conditions['machine'])}", fontsize=10
    )
    return figure
