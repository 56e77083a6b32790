"""Bits per element against mean KLD, ours beside what others store: ``docs/figures/bits_against_kld.png``.

    python benchmarks/accuracy_figure.py

Draws ``results/accuracy-wikitext2.csv``: mean KLD of two models on WikiText-2, windows of 512 tokens in float32.  Rows
with 8 windows are those of ``docs/accuracy.md``, measured by ``kvquant eval``.  Rows of the family ``packages`` are
caches for transformers that can be installed from PyPI, measured once in the same way on the first 2 windows: fed in
chunks of 64 tokens through ``past_key_values``, bits from all tensors that grow with the text.  Packages that keep
16-bit copies of what they quantize have no place on an axis of stored bits and are left out.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
TABLE = FOLDER / "results" / "accuracy-wikitext2.csv"
FIGURE = FOLDER.parent / "docs" / "figures" / "bits_against_kld.png"
MODELS = {"smollm2": "SmolLM2-135M-Instruct", "qwen": "Qwen2.5-Coder-0.5B-Instruct (outlier keys)"}
LABELS = {
    "ours": "kvquant-hf",
    "before": "equal bits for all channels, no exact first token",
    "LMDeploy": "LMDeploy's formulae",
    "transformers": "transformers' QuantizedCache",
    "engines": "fp8 and nvfp4 of serving engines",
    "packages": "packages on PyPI",
}
MARKERS = {"ours": "o-", "before": "o", "LMDeploy": "s", "transformers": "^", "engines": "D", "packages": "x"}


def read() -> list[dict[str, str]]:
    """Rows of the table, by the names of its first line."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def points(rows: Sequence[dict[str, str]], family: str, model: str) -> list[tuple[float, float, str]]:
    """Bits, KLD and name of what was measured of a family, fewest bits first."""
    chosen = [row for row in rows if row["family"] == family and row[model]]
    return sorted((float(row["bits"]), float(row[model]), row["cache"]) for row in chosen)


def main() -> None:
    """Draw the table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read()
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the machine has
    for axes, (model, title) in zip(figure.subplots(1, 2, sharey=True), MODELS.items(), strict=True):
        for family, label in LABELS.items():
            found = points(rows, family, model)
            axes.plot([x for x, _, _ in found], [y for _, y, _ in found], MARKERS[family], label=label)
            for bits, kld, name in found if family == "ours" else ():
                axes.annotate(name, (bits, kld), textcoords="offset points", xytext=(6, 3), fontsize=7)
        axes.set_yscale("log")
        axes.set_xlim(2, 10)
        axes.set_xlabel("bits per element in full pages, scales included")
        axes.set_title(title)
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("mean KL(exact || quantized), nats")
    figure.axes[1].legend(fontsize=8)
    figure.savefig(FIGURE, dpi=110)


if __name__ == "__main__":
    main()
