"""The grids of ``needle.py`` as a picture: one map per policy, depth downwards, length to the right."""

import math
from collections.abc import Mapping, Sequence

from .needle import Cell

PANELS = 4  # side by side


def draw_heatmaps(grids: Mapping[str, Sequence[Cell]], title: str, path: str) -> None:
    """Colour and number are the probability of a token of the answer, its geometric mean; a cross: not found.

    Args:
        grids: the cells of each policy, all of the same prompts.
        title: above all maps.
        path: the file; ``check_figure`` says which names are possible.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = next(iter(grids.values()))
    lengths, depths = sorted({cell.length for cell in cells}), sorted({cell.depth for cell in cells})
    across = min(PANELS, len(grids))
    down = math.ceil(len(grids) / across)
    size = (1.2 + (0.6 + 0.7 * len(lengths)) * across, 0.6 + (1 + 0.5 * len(depths)) * down)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the machine has
    panels = figure.subplots(down, across, sharey=True, squeeze=False)
    for empty in panels.flat[len(grids) :]:
        empty.set_axis_off()
    for panel, (name, row) in zip(panels.flat, grids.items(), strict=False):
        shown = {(cell.depth, cell.length): cell for cell in row}
        image = panel.imshow(
            [[math.exp(-shown[depth, length].nats) for length in lengths] for depth in depths],
            vmin=0,
            vmax=1,
            cmap="RdYlGn",
            aspect="auto",
        )
        for (depth, length), cell in shown.items():
            place = (lengths.index(length), depths.index(depth))
            text = f"{math.exp(-cell.nats):.2f}"
            panel.annotate(text if cell.found else f"×\n{text}", place, ha="center", va="center", fontsize=8)
        panel.set_title(name, fontsize=10)
        panel.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=8)
        panel.set_yticks(range(len(depths)), [f"{depth:g} %" for depth in depths], fontsize=8)
        panel.set_xlabel("tokens", fontsize=8)
    for panel in panels[:, 0]:
        panel.set_ylabel("text before the needle", fontsize=8)
    figure.colorbar(image, ax=panels, label="probability per token of the answer")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
