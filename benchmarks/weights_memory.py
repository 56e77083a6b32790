"""4-bit weights with a 4-bit cache: what the process takes at its peak, by batch, and what the cache does to the text.

    python benchmarks/weights_memory.py --out FILE.csv --model FOLDER                      SmolLM2-135M
    python benchmarks/weights_memory.py --out FILE.csv --name N --model FOLDER --gguf F    another model
    python benchmarks/weights_memory.py --out FILE.csv --markdown                          the tables of a file

Weights: ``full``, as transformers loads them, in bfloat16; ``gguf``, packed in the file's blocks (``kvquant generate
--weights packed``); ``torchao``, its weight-only int4 for CPUs, groups of 32; ``bnb``, bitsandbytes' nf4.  Each is
loaded once, and each cell of the table is measured in a process of its own, forked from there, which begins with the
weights and no cache.  Its cache is filled with the keys and values of one prompt, the same for each sequence but stored
for each (ours piece by piece, DynamicCache at once, which is best for it: it copies all at each piece), and some tokens
are decoded: what a prefill needs beside depends on its chunks, and is not in the peak.  The peak is the high-water mark
of the process's resident memory: interpreter, libraries, weights, cache, activations.

A cell without a batch compares with the same weights' DynamicCache: mean KLD and agreement of the most likely token
over real text, read a page at a time, and the share of greedily generated tokens that are equal up to the first that is
not.  ``exact``, ours without quantization, is only there: what it differs by is rounding in bfloat16.

The file is resumed: cells that it has, under the same conditions, are not measured again.
"""

import argparse
import csv
import functools
import multiprocessing
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.benchmark.machine import PeakWatch, kilobytes, processor
from kvquant_hf.cli.measure import long_text
from kvquant_hf.cli.models import load_model, load_tokenizer
from kvquant_hf.evaluation import cut_windows, evaluate, paged
from kvquant_hf.transformers_api.names import cache_in, with_cache
from kvquant_hf.weights import load_packed, weight_bytes

WEIGHTS = ("full", "gguf", "torchao", "bnb")
CACHES = ("dynamic", "exact", "int8", "int4", "turboquant")
BATCHES = (1, 8, 16, 32, 48)
CONTEXT, PIECE, NEW_TOKENS = 1024, 256, 8
WINDOWS, PROMPTS, PROMPT_TOKENS, GENERATED = 2, 8, 128, 32
DTYPE = torch.bfloat16
KEY = ("model", "weights", "cache", "batch")
MEASURED = ("weights_bytes", "kv_bytes", "peak_bytes", "loading_peak_bytes", "empty_bytes", "step_ms")
COMPARED = ("kld_mean", "top1_agreement", "greedy_equal")
CONDITIONS = (
    *("context", "new_tokens", "dtype", "threads", "processor"),
    *("torch", "transformers", "torchao", "bitsandbytes"),
)
COLUMNS = (*KEY, "status", "reason", *MEASURED, *COMPARED, *CONDITIONS)


def memory(line: str) -> int:
    """Bytes of a line of this process's status."""
    found = kilobytes(Path("/proc/self/status").read_text(encoding="ascii"), line)
    assert found is not None, line
    return found


def load(kind: str, folder: str | None, gguf: str | None) -> Any:
    """The model with weights of a kind; a folder of None is the built-in model, whose file has both."""
    if kind == "gguf":
        return load_packed(gguf, DTYPE) if gguf else load_model(None, "bfloat16", hidden=True, weights="packed").model
    if kind == "bnb":
        if folder is None:
            raise ValueError("bitsandbytes quantizes what is in a folder; give one with --model")
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPE)
        options = {"quantization_config": nf4, "device_map": "cpu", "local_files_only": True}
        return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE, **options).eval()
    model = load_model(folder, "bfloat16", hidden=True).model
    if kind == "torchao":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import quantize_

        def layers(module: Any, name: str) -> bool:  # as transformers does, which leaves the head as it is
            return isinstance(module, torch.nn.Linear) and name != "lm_head"

        quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=32), filter_fn=layers)
    return model


def make_cache(model: Any, name: str) -> Any:
    """An empty cache."""
    if name == "dynamic":
        return DynamicCache(config=model.config)
    cache = QuantizedPagedCache(model.config, name)
    cache.bind(model)
    return cache


def held_bytes(cache: Any) -> int:
    """Bytes of keys and values and of all that is kept for them."""
    if isinstance(cache, QuantizedPagedCache):
        return int(cache.report().bytes)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def measure(model: Any, prompt: list[tuple[torch.Tensor, torch.Tensor]], name: str, batch: int) -> dict[str, Any]:
    """One cell: a full cache and some decode steps."""
    watch = PeakWatch()  # which gives back what loading left in the allocator
    cache = make_cache(model, name)
    with torch.inference_mode():
        piece = CONTEXT if name == "dynamic" else PIECE
        for first in range(0, CONTEXT, piece):
            for index, sides in enumerate(prompt):
                keys, values = (side[:, :, first : first + piece].expand(batch, -1, -1, -1) for side in sides)
                cache.update(keys, values, index)
        token, times = torch.arange(100, 100 + batch)[:, None], []
        for _ in range(NEW_TOKENS):
            start = time.perf_counter()
            logits = model(input_ids=token, **with_cache(cache)).logits
            times.append(time.perf_counter() - start)
            token = logits[:, -1:].argmax(-1)
    times.sort()
    return {
        "kv_bytes": held_bytes(cache),
        "peak_bytes": watch.base + watch.peak(),
        "step_ms": times[len(times) // 2] * 1e3,
    }


def compare(model: Any, windows: torch.Tensor, prompts: torch.Tensor, names: list[str]) -> dict[str, Any]:
    """The cells without a batch: caches beside DynamicCache, with the same weights."""
    others = [name for name in names if name != "dynamic"]
    results = evaluate(model, windows, [paged(model, name) for name in others])
    text = generate(model, prompts, "dynamic")
    found = {"dynamic": {"kld_mean": 0.0, "top1_agreement": 1.0, "greedy_equal": 1.0}}
    for name in others:
        accuracy = results[name].accuracy.as_dict()
        equal = (generate(model, prompts, name) == text).long().cumprod(1).double().mean().item()
        found[name] = {column: accuracy[column] for column in COMPARED[:2]} | {"greedy_equal": equal}
    return found


def generate(model: Any, prompts: torch.Tensor, name: str) -> torch.Tensor:
    """Greedy continuations ``[prompts, GENERATED]``; an end of text is a token like any other."""
    found = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        min_new_tokens=GENERATED,
        max_new_tokens=GENERATED,
        **with_cache(make_cache(model, name)),
    )
    return found[:, prompts.shape[1] :]


def forked(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` finds in a process of its own, or why it did not."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def run() -> None:
        try:
            sending.send({"status": "ok"} | work())
        except Exception as error:
            sending.send({"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0][:300]})

    process = context.Process(target=run)
    process.start()
    sending.close()
    try:
        return dict(receiving.recv())
    except EOFError:
        process.join()
        return {"status": "failed", "reason": f"the process ended with {process.exitcode}"}
    finally:
        process.join()


def measure_all(
    kind: str, cells: list[tuple[str, int | None]], arguments: Any, write: Callable[[dict[str, Any]], None]
) -> None:
    """All cells of one kind of weights; in a process of its own."""
    empty = memory("VmRSS")
    try:
        model = load(kind, arguments.model, arguments.gguf)
        loading = memory("VmHWM")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        for name, batch in cells:
            write({"cache": name, "batch": batch, "status": "failed", "reason": reason})
        return
    tokenizer, text = load_tokenizer(arguments.model), long_text()
    windows = cut_windows(tokenizer, text, CONTEXT, WINDOWS)
    prompts = cut_windows(tokenizer, text, PROMPT_TOKENS, PROMPTS)
    with torch.inference_mode():
        read = cache_in(model(input_ids=windows[:1], **with_cache(DynamicCache(config=model.config)), logits_to_keep=1))
    prompt = [(layer.keys, layer.values) for layer in read.layers]
    facts = {"weights_bytes": weight_bytes(model), "loading_peak_bytes": loading, "empty_bytes": empty}
    if texts := [name for name, batch in cells if batch is None]:
        found = forked(lambda: compare(model, windows, prompts, texts))
        outcome = {word: found[word] for word in ("status", "reason") if word in found}
        for name in texts:
            write({"cache": name, "batch": None} | facts | outcome | found.get(name, {}))
    for name, batch in cells:
        if batch is not None:
            found = forked(functools.partial(measure, model, prompt, name, batch))
            write({"cache": name, "batch": batch} | facts | found)


def conditions() -> dict[str, str]:
    """What each row says of how it was measured."""
    names = ("torch", "transformers", "torchao", "bitsandbytes")
    packages = {name: version(name) if find_spec(name) else "" for name in names}
    facts = {"context": CONTEXT, "new_tokens": NEW_TOKENS, "dtype": DTYPE, "threads": torch.get_num_threads()}
    return {name: str(value) for name, value in (facts | {"processor": processor()} | packages).items()}


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows that there are."""
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines())) if file.exists() else []


def tables(rows: list[dict[str, str]]) -> str:
    """Markdown: for each model MiB by batch, and beside it what weights and cache take and what the cache changes."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        batches = " | ".join(f"{batch}" for batch in BATCHES)
        lines += [f"{model}: peak of the process in MiB, by batch", ""]
        lines.append(f"| weights | MB | cache | {batches} | KV MB at {BATCHES[-1]} | mean KLD | top-1 | greedy |")
        lines.append(f"|---|--:|---|{'--:|' * (len(BATCHES) + 4)}")
        for kind in WEIGHTS:
            for cache in CACHES:
                cells = {
                    row["batch"]: row
                    for row in rows
                    if (row["model"], row["weights"], row["cache"]) == (model, kind, cache) and row["status"] == "ok"
                }
                if str(BATCHES[-1]) not in cells or "" not in cells:
                    continue
                last, text = cells[str(BATCHES[-1])], cells[""]
                found = [cells.get(str(batch), {}).get("peak_bytes") for batch in BATCHES]
                peaks = " | ".join(f"{float(peak) / 2**20:,.0f}" if peak else "" for peak in found)
                lines.append(
                    f"| `{kind}` | {float(last['weights_bytes']) / 1e6:,.0f} | `{cache}` | {peaks} | "
                    f"{float(last['kv_bytes']) / 1e6:,.0f} | {float(text['kld_mean']):.2g} | "
                    f"{float(text['top1_agreement']):.1%} | {float(text['greedy_equal']):.1%} |"
                )
        floors = [
            f"`{row['weights']}` {float(row['kld_mean']):.2g}, {float(row['top1_agreement']):.1%}, "
            f"{float(row['greedy_equal']):.1%}"
            for row in rows
            if (row["model"], row["cache"], row["status"]) == (model, "exact", "ok")
        ]
        lines += ["", f"Rounding alone (`exact`; mean KLD, top-1, greedy): {'; '.join(floors)}.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the CSV")
    parser.add_argument("--name", default="SmolLM2-135M", help="what the rows call the model")
    parser.add_argument("--model", help="folder with the weights in bfloat16; default: the built-in model")
    parser.add_argument("--gguf", help="file with the packed weights; default: the built-in model's")
    parser.add_argument("--weights", default=",".join(WEIGHTS), help="with commas")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="with commas")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the CSV and measure nothing")
    arguments = parser.parse_args()
    rows = read_rows(arguments.out)
    if arguments.markdown:
        print(tables(rows))
        return
    same = conditions()
    known = {tuple(row[name] for name in KEY) for row in rows if {name: row[name] for name in CONDITIONS} == same}
    batches = [None, *(int(batch) for batch in arguments.batches.split(","))]
    if not rows:
        arguments.out.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    for kind in arguments.weights.split(","):
        cells = [
            (cache, batch)
            for cache in CACHES
            for batch in batches
            if (batch is None or cache != "exact")
            and (arguments.name, kind, cache, "" if batch is None else str(batch)) not in known
        ]

        def write(row: dict[str, Any], kind: str = kind) -> None:
            with arguments.out.open("a", encoding="utf-8", newline="") as lines:
                csv.DictWriter(lines, COLUMNS).writerow({"model": arguments.name, "weights": kind} | row | same)
            print(kind, *(f"{name}={value}" for name, value in row.items() if value is not None), flush=True)

        if cells:
            process = multiprocessing.get_context("fork").Process(
                target=measure_all, args=(kind, cells, arguments, write)
            )
            process.start()
            process.join()


if __name__ == "__main__":
    main()
