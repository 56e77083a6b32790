"""What a policy costs and gains, one panel for each kind of measurement: ``docs/figures/choose.png``.

    python benchmarks/choose_figure.py

Drawn from the committed results alone, by bits per element in full pages of head_dim 64, scales included:

- mean KLD of two models on WikiText-2 (``results/accuracy-wikitext2.csv``, as ``accuracy_figure.py`` draws it);
- GSM8K: problems that a cache loses and gains against the exact one (``results/gsm8k-qwen2.5-coder-0.5b.csv``, of
  ``kvquant compare --csv``); there is no such panel while there is no such file;
- speed on a CPU: a decode step at 8,192 tokens over ``DynamicCache``'s (``results/cpu-amd-epyc-2026-11-27.csv``, each
  cache in its faster dtype), and tokens per second of a server over those of ``exact`` with the same bytes for keys and
  values (``results/cpu-amd-epyc-2026-11-29-load.csv``).  Both files are older than the codecs that ``int4`` and
  ``turboquant`` have now, whose pages are as large: these points are hollow.
"""

import csv
from pathlib import Path
from typing import Any

import accuracy_figure

RESULTS = Path(__file__).parent / "results"
GSM8K = RESULTS / "gsm8k-qwen2.5-coder-0.5b.csv"
STEPS = RESULTS / "cpu-amd-epyc-2026-11-27.csv"
LOAD = RESULTS / "cpu-amd-epyc-2026-11-29-load.csv"
FIGURE = accuracy_figure.FIGURE.with_name("choose.png")
CONTEXT = "8192"
BEFORE = ("int4", "turboquant")  # other codecs than now when speed was measured
BITS = "bits per element, scales included"


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a table, by the names of its first line."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def bits() -> dict[str, float]:
    """Bits per element of every cache that has been measured, as stored with a 16-bit model."""
    from kvquant_hf.policies.cost import page_cost
    from kvquant_hf.policies.table import POLICIES

    measured = {row["cache"]: float(row["bits"]) for row in accuracy_figure.read()}
    return measured | {name: page_cost(name, 64).bits_per_element for name in POLICIES}


def step_ratios() -> dict[str, float]:
    """How many times as fast a decode step is as ``DynamicCache``'s, by cache."""
    ratios: dict[str, float] = {}
    for row in read(STEPS):
        if row["context"] == CONTEXT and row["status"] == "ok":
            ratios[row["cache"]] = max(float(row["ratio"]), ratios.get(row["cache"], 0.0))
    return ratios


def server_ratios() -> dict[str, float]:
    """Tokens per second over those of ``exact`` in the same memory, by cache."""
    return {row["server"]: float(row["ratio_to_exact"]) for row in read(LOAD) if row["server"] != "stock"}


def main() -> None:
    """Draw the panels for which there are results."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [draw_kld, *([draw_gsm8k] if GSM8K.is_file() else []), draw_speed]
    figure = Figure(figsize=(5 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the machine has
    for axes, draw in zip(figure.subplots(1, len(panels)), panels, strict=True):
        draw(axes)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(FIGURE, dpi=110)


def draw_kld(axes: Any) -> None:
    """Mean KLD of our policies, a line for each model."""
    rows = accuracy_figure.read()
    for (model, title), marker in zip(accuracy_figure.MODELS.items(), ("o-", "s-"), strict=True):
        found = accuracy_figure.points(rows, "ours", model)
        axes.plot([x for x, _, _ in found], [y for _, y, _ in found], marker, label=title.split(" (")[0])
    for x, y, name in found:
        _name(axes, name, x, y)
    axes.set_yscale("log")
    axes.set_title("What it does to predictions")
    axes.set_xlim(2, 10)
    axes.set_xlabel(BITS)
    axes.set_ylabel("mean KL(exact || cache), nats")


def draw_gsm8k(axes: Any) -> None:
    """Problems lost and gained, a bar for each cache, fewest bits lowest.  ``dynamic``: what rounding alone does."""
    of = bits() | {"dynamic": 16.0}
    rows = [row for row in read(GSM8K) if row["cache"] != "exact" and row["filter"] == "flexible-extract"]
    rows.sort(key=lambda row: of[row["cache"]])
    lost, gained = ([int(row[column]) for row in rows] for column in ("lost", "gained"))
    places = range(len(rows))
    axes.barh(places, [-number for number in lost], color="tab:red", alpha=0.6, label="only exact solves")
    axes.barh(places, gained, color="tab:green", alpha=0.6, label="only this cache solves")
    balance = [up - down for up, down in zip(gained, lost, strict=True)]
    axes.plot(balance, places, "k|", markersize=14, label="gained - lost")
    axes.set_yticks(places, [f"{row['cache']}  {of[row['cache']]:.2f}" for row in rows], fontsize=8)
    axes.set_ylim(-2.8, len(rows) - 0.4)  # room for the legend
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_title(f"GSM8K, {int(rows[0]['n']):,} problems, Qwen2.5-Coder-0.5B")
    axes.set_xlabel("problems gained and lost against exact")


def draw_speed(axes: Any) -> None:
    """Both ratios; hollow where the codecs were others."""
    of = bits() | {"static": 16.0}
    kinds = (
        (step_ratios(), "o", f"a decode step at {int(CONTEXT):,} tokens, DynamicCache = 1"),
        (server_ratios(), "s", "tokens/s of a server in the same memory, exact = 1"),
    )
    for color, (ratios, marker, label) in zip(("tab:blue", "tab:orange"), kinds, strict=True):
        points: dict[tuple[float, float], list[str]] = {}
        for name in (name for name in ratios if name != "dynamic" and ratios[name] != 1):
            points.setdefault((of[name], round(ratios[name], 1)), []).append(name)
        for (x, _), names in points.items():
            y = ratios[names[0]]
            axes.plot([x], [y], marker, color=color, fillstyle="none" if set(names) & set(BEFORE) else "full")
            _name(axes, ", ".join(names), x, y, below=names == ["int4"])  # where another name is above
        axes.plot([], [], marker, color=color, label=label)
    axes.plot([], [], "o", color="black", fillstyle="none", label="with the codecs of before")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xlim(2, 18)
    axes.set_ylim(0, 4.4)  # room for the legend
    axes.set_title("Speed of SmolLM2-135M on two CPU cores")
    axes.set_xlabel(BITS)
    axes.set_ylabel("times as fast")


def _name(axes: Any, name: str, x: float, y: float, *, below: bool = False) -> None:
    axes.annotate(name, (x, y), textcoords="offset points", xytext=(6, -9 if below else 3), fontsize=7)


if __name__ == "__main__":
    main()
