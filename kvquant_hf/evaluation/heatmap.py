"""The grids of ``needle.py`` as a picture: one map per policy, depth downwards, length to the right."""

import math
from collections.abc import Mapping, Sequence

from .needle import Cell


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
    size = (1.2 + (0.6 + 0.7 * len(lengths)) * len(grids), 1.6 + 0.5 * len(depths))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the machine has
    panels = figure.subplots(1, len(grids), sharey=True, squeeze=False)[0]
    for panel, (name, row) in zip(panels, grids.items(), strict=True):
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
    panels[0].set_ylabel("text before the needle", fontsize=8)
    figure.colorbar(image, ax=panels, label="probability per token of the answer")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
