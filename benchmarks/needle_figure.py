"""Needles by length and depth: ``docs/figures/needles-<model>.png``, and tables of ``docs/accuracy.md``.

    python benchmarks/needle_figure.py

Joins the files ``results/needle-*.json`` of each model, which ``kvquant needle --json`` wrote for some lengths and
caches, and draws them as ``kvquant needle --png`` draws one run.  Where several have a cache at one length,
as all have ``exact``, its cells have to be the same to the last digit: so the files are of the same prompts.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kvquant_hf.evaluation.heatmap import draw_heatmaps
from kvquant_hf.evaluation.needle import Cell
from kvquant_hf.policies.table import POLICIES

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
FIGURES = FOLDER.parent / "docs" / "figures"
SAME = ("model", "dtype", "versions", "text", "depths", "seed", "page_size", "sinks")


def join(files: Iterable[dict[str, Any]]) -> dict[str, list[Cell]]:
    """The cells of each cache, by length and depth.

    Raises:
        ValueError: the files cannot be shown in one picture.
    """
    files = list(files)
    found: dict[str, dict[tuple[int, float], Cell]] = {}
    for file in files:
        for name in SAME:
            if file[name] != files[0][name]:
                raise ValueError(f"{name} is {files[0][name]!r} in one file and {file[name]!r} in another.")
        for cache, measured in file["caches"].items():
            grid = found.setdefault(cache, {})
            for cell in (Cell(**fields) for fields in measured["cells"]):
                if grid.setdefault((cell.length, cell.depth), cell) != cell:
                    raise ValueError(f"{cache} has two outcomes at {cell.length} tokens and {cell.depth:g} %.")
    if len({tuple(sorted(grid)) for grid in found.values()}) != 1:
        raise ValueError("a cache lacks cells that another has.")
    ordered = [*(cache for cache in POLICIES if cache in found), *(cache for cache in found if cache not in POLICIES)]
    return {cache: [found[cache][place] for place in sorted(found[cache])] for cache in ordered}


def rows(grids: dict[str, Sequence[Cell]]) -> list[str]:
    """A line of Markdown per cache: found and mean nats by length, and cells as with ``exact``."""
    lengths = sorted({cell.length for cell in grids["exact"]})
    lines = [
        f"| cache | {' | '.join(f'{length:,}' for length in lengths)} | as `exact` |",
        "|---|" + "--:|" * (len(lengths) + 1),
    ]
    for cache, cells in grids.items():
        shown = []
        for length in lengths:
            column = [cell for cell in cells if cell.length == length]
            nats = sum(cell.nats for cell in column) / len(column)
            shown.append(f"{sum(cell.found for cell in column)} of {len(column)}, {nats:.3f}")
        same = sum(cell.found == other.found for cell, other in zip(cells, grids["exact"], strict=True))
        lines.append(f"| `{cache}` | {' | '.join(shown)} | {same} of {len(cells)} |")
    return lines


def main() -> None:
    """Draw the pictures, and print the tables."""
    models: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("needle-*.json")):
        file = json.loads(path.read_text(encoding="utf-8"))
        models.setdefault(file["model"], []).append(file)
    for model, files in models.items():
        grids = join(files)
        title = f"{model}, {files[0]['dtype']}\nneedles in the {files[0]['text']}"
        draw_heatmaps(grids, title, str(FIGURES / f"needles-{model}.png"))
        print("\n".join([model, "", *rows(grids), ""]))


if __name__ == "__main__":
    main()
