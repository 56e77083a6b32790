"""Many needles of one length, each with every cache: how many a cache loses and gains, and how far it moves them.

    python benchmarks/needle_pairs.py --policies int8,int4,kv3 --out FILE.csv

`kvquant needle` hides a needle at some depths of one text.  Where a model is at its limit that is too few to tell what
a cache does from chance, so this takes several haystacks, which begin at different places of the text, each with digits
of its own.  Pairs are of the same prompt with the exact cache and with another one.
"""

import argparse
import csv
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kvquant_hf.benchmark.machine import processor
from kvquant_hf.cli.measure import long_text
from kvquant_hf.cli.models import load_model
from kvquant_hf.evaluation.needle import Cell, Prompt, find_needles, hide_needles
from kvquant_hf.evaluation.paired import mcnemar, mean_of
from kvquant_hf.policies.table import parse_policy

DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)
STEP = 4001  # characters from where one haystack begins to the next
COLUMNS = ("cache", "needles", "found", "lost", "gained", "p", "nats", "difference", "stderr", "mean_size")
CONDITIONS = ("model", "dtype", "length", "haystacks", "batch", "page_size", "processor", "torch", "transformers")


def haystacks(tokenizer: Any, text: str, length: int, count: int) -> list[Prompt]:
    """Prompts of ``count`` haystacks, every depth of one after the other."""
    parts = (hide_needles(tokenizer, text[STEP * seed :], [length], DEPTHS, seed) for seed in range(count))
    return [prompt for part in parts for prompt in part]


def row(cache: str, exact: Sequence[Cell], cells: Sequence[Cell]) -> dict[str, Any]:
    """What a cache does to the needles, against the exact one; ``mean_size`` is the mean of absolute differences."""
    differences = [cell.nats - other.nats for cell, other in zip(cells, exact, strict=True)]
    lost = sum(other.found and not cell.found for cell, other in zip(cells, exact, strict=True))
    gained = sum(cell.found and not other.found for cell, other in zip(cells, exact, strict=True))
    mean = mean_of(differences)
    found = {"cache": cache, "needles": len(cells), "found": sum(cell.found for cell in cells)}
    found |= {"lost": lost, "gained": gained, "p": mcnemar(lost, gained)}
    found |= {"nats": mean_of([cell.nats for cell in cells]).mean, "difference": mean.mean, "stderr": mean.stderr}
    return found | {"mean_size": mean_of([abs(value) for value in differences]).mean}


def line(found: dict[str, Any]) -> str:
    """A row as Markdown."""
    counts = f"{found['found']} of {found['needles']} | {found['lost']} | {found['gained']} | {found['p']:.2f}"
    change = f"{found['difference']:+.3f} ± {found['stderr']:.3f} | {found['mean_size']:.3f}"
    return f"| `{found['cache']}` | {counts} | {found['nats']:.3f} | {change} |"


def measure(
    model: Any,
    prompts: Sequence[Prompt],
    policies: Sequence[str],
    batch: int,
    out: Path | None,
    conditions: dict[str, Any],
) -> None:
    """Print a table, and write it as CSV with its ``CONDITIONS``, a cache as soon as it is measured."""
    print("| cache | found | lost | gained | p | nats | difference | its size |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    exact: list[Cell] = []
    rows = []
    for policy in dict.fromkeys(["exact", *policies]):
        cells = find_needles(model, prompts, policy, batch=batch)
        exact = exact or cells
        rows.append(row(policy, exact, cells))
        print(line(rows[-1]), flush=True)
        if out is not None:
            with out.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS + CONDITIONS)
                writer.writeheader()
                writer.writerows(found | conditions for found in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a .gguf file; default: the built-in model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--haystacks", type=int, default=8, help=f"each with {len(DEPTHS)} needles")
    parser.add_argument("--policies", default="int8,int4,kv3", help="with commas")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--out", type=Path, help="a CSV")
    arguments = parser.parse_args()
    policies = [parse_policy(name).name for name in arguments.policies.split(",")]
    loaded = load_model(arguments.model, arguments.dtype, hidden=True)
    prompts = haystacks(loaded.tokenizer, long_text(), arguments.length, arguments.haystacks)
    conditions = {"model": loaded.description, "dtype": arguments.dtype, "length": arguments.length}
    conditions |= {
        "haystacks": arguments.haystacks,
        "batch": arguments.batch,
        "page_size": 64,
        "processor": processor(),
    }
    conditions |= {package: version(package) for package in ("torch", "transformers")}
    measure(loaded.model, prompts, policies, arguments.batch, arguments.out, conditions)


if __name__ == "__main__":
    main()
