"""A table and a figure out of the CSV file of a run, and of nothing else: both can be made again later."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

Row = dict[str, str]
_SITUATION = ("query_heads", "kv_heads", "head_dim", "batch", "context")


def _number(row: Row, name: str) -> float:
    return float(row[name])


def _ok(rows: Iterable[Row], part: str, *families: str) -> list[Row]:
    return [row for row in rows if row["part"] == part and row["family"] in families and row["status"] == "ok"]


def _distinct(rows: Iterable[Row], *names: str) -> list[tuple[str, ...]]:
    """Values of columns, numbers in ascending order where they are numbers, else as they come."""
    found = list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))
    return sorted(found, key=lambda t: [int(x) for x in t]) if all(x.isdigit() for t in found for x in t) else found


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _fastest(rows: Iterable[Row]) -> Row | None:
    return min(rows, key=lambda row: _number(row, "p50_us"), default=None)


def _against_bf16(rows: Sequence[Row], part: str) -> str:
    """One line for each situation, one column for each policy."""
    timed = _ok(rows, part, "paged", "bf16")
    policies = [name for (name,) in _distinct(_ok(rows, part, "paged"), "contender")]
    lines = []
    for situation in _distinct(timed, *_SITUATION):
        here = [row for row in timed if tuple(row[name] for name in _SITUATION) == situation]
        best = _fastest(row for row in here if row["family"] == "bf16")
        heads, kv_heads, dim, batch, context = situation
        line = [f"{heads}/{kv_heads} × {dim}, batch {batch}, {context}"]
        line.append("–" if best is None else f"{_number(best, 'p50_us'):.1f} ({best['contender']})")
        for policy in policies:
            row = next((row for row in here if (row["family"], row["contender"]) == ("paged", policy)), None)
            line.append("–" if row is None else _cell(row))
        lines.append(line)
    return _table(["heads × head_dim, batch, context", "best bf16, µs", *policies], lines)


def _cell(row: Row) -> str:
    text = f"{_number(row, 'p50_us'):.1f}"
    if row["ratio_to_bf16"]:
        text += f", {_number(row, 'ratio_to_bf16'):.2f}×"
    return text + (f", {_number(row, 'percent_of_copy'):.0f} %" if row["percent_of_copy"] else "")


def _models(rows: Sequence[Row]) -> str:
    timed = _ok(rows, "model", "paged", "bf16", "transformers")
    names = [name for (name,) in _distinct(timed, "contender")]
    lines = []
    for batch, context, layers in _distinct(timed, "batch", "context", "layers"):
        line = [f"batch {batch}, {context}, {layers} layers"]
        for name in names:
            wanted = (batch, context, layers, name)
            row = next((r for r in timed if (r["batch"], r["context"], r["layers"], r["contender"]) == wanted), None)
            text = "–"
            if row is not None:
                text = f"{_number(row, 'tokens_per_s'):.1f}, {_number(row, 'peak_bytes') / 1e9:.1f} GB"
            line.append(text)
        lines.append(line)
    return _table(["tokens/s, peak memory", *names], lines)


def _gaps(rows: Sequence[Row]) -> str:
    """How often and why there is no number."""
    reasons = Counter((row["part"], row["contender"], row["status"], row["reason"]) for row in rows)
    lines = [
        [part, contender, status, str(count), reason.replace("|", "/")]
        for (part, contender, status, reason), count in sorted(reasons.items())
        if status != "ok"
    ]
    return _table(["part", "contender", "status", "rows", "reason"], lines)


def markdown(rows: Sequence[Row], source: str) -> str:
    """The run as Markdown.

    Args:
        rows: of ``results.read``; at least one.
        source: name of the CSV file.
    """
    one = rows[0]
    clocks = f"up to {one['sm_clock_max_mhz']} MHz, " if one["sm_clock_max_mhz"] else ""
    text = [
        f"# {one['gpu']}, {one['date']}",
        f"{clocks}driver {one['driver'] or 'unknown'}, CUDA {one['cuda']}, torch {one['torch']}, Triton "
        f"{one['triton']}, transformers {one['transformers']}, commit {one['commit']}.  All numbers are from {source}; "
        "medians; benchmarks/README.md says how they were taken.",
    ]
    titles: dict[str, tuple[str, Callable[[Sequence[Row], str], str]]] = {
        "decode": ("One decode step of one layer: µs, times the fastest bf16, share of a copy", _against_bf16),
        "prefill": ("A chunk of a prompt over its history: µs, times the fastest bf16", _against_bf16),
        "append": ("Appending one token of every sequence: µs, times two indexed writes in bf16", _against_bf16),
        "append-seal": ("The same where it seals a page of every sequence", _against_bf16),
        "model": ("Llama-3-8B of random weights, decoding", lambda rows, part: _models(rows)),
    }
    for part, (title, draw) in titles.items():
        if any(row["part"] == part and row["status"] == "ok" for row in rows):
            text += [f"## {title}", draw(rows, part)]
    if any(row["status"] != "ok" for row in rows):
        text += ["## What was not measured, and why", _gaps(rows)]
    return "\n\n".join(text) + "\n"


def figure(rows: Sequence[Row], path: Path) -> None:
    """Draw how much faster than the fastest bf16 attention a decode step is, over the context.

    A column of axes for each shape, a row for each batch, a line for each policy.

    Args:
        rows: of ``results.read``.
        path: the picture, in the format of its ending.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    drawn = [row for row in _ok(rows, "decode", "paged") if row["ratio_to_bf16"]]
    shapes, batches = _distinct(drawn, "query_heads", "kv_heads", "head_dim"), _distinct(drawn, "batch")
    if not drawn:
        raise ValueError("no decode step was compared with bf16, so there is nothing to draw.")
    size = (1 + 3.2 * len(shapes), 1 + 2.2 * len(batches))
    drawing, axes = pyplot.subplots(
        len(batches), len(shapes), sharex=True, sharey=True, squeeze=False, figsize=size, layout="constrained"
    )
    lines = {}
    for r, (batch,) in enumerate(batches):
        for c, (heads, kv_heads, dim) in enumerate(shapes):
            ax = axes[r][c]
            here = [row for row in drawn if (row["query_heads"], row["kv_heads"], row["head_dim"]) == shapes[c]]
            here = [row for row in here if row["batch"] == batch]
            for (policy,) in _distinct(drawn, "contender"):
                points = sorted(
                    (int(row["context"]), _number(row, "ratio_to_bf16")) for row in here if row["contender"] == policy
                )
                color = f"C{_distinct(drawn, 'contender').index((policy,))}"
                if points:
                    (lines[policy],) = ax.plot(*zip(*points, strict=True), marker="o", color=color)
            ax.axhline(1.0, color="black", linewidth=0.8)
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens / 1024:g}k"))
            ax.set_ylim(bottom=0)
            ax.set_title(f"{heads}/{kv_heads} heads × {dim}, batch {batch}", fontsize="small")
    drawing.supxlabel("context, tokens")
    drawing.supylabel("times the fastest bf16 attention")
    drawing.suptitle(f"One decode step of one layer, {rows[0]['gpu']}, {rows[0]['date']}")
    drawing.legend(lines.values(), lines.keys(), loc="outside right upper")
    drawing.savefig(path, dpi=150)
    pyplot.close(drawing)
