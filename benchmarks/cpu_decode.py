"""Decode steps of SmolLM2-135M on the CPU, ours beside DynamicCache and SDPA, interleaved: medians and ratios.

    python benchmarks/cpu_decode.py                        whole steps at 512, 2k and 7.9k tokens
    python benchmarks/cpu_decode.py --attention            attention of one layer, 8 heads x 128, group 4, 32k tokens
    python benchmarks/cpu_decode.py --prefill 4096         a prompt's prefill, and the part of it that stores
    python benchmarks/cpu_decode.py --linear               step time against context, its line and R2
    python benchmarks/cpu_decode.py --profile              where the Python time of a step goes
    python benchmarks/cpu_decode.py --busy ...             processor time of one thread instead of wall time of two

Caches are filled with random keys and values: a step takes the same time whatever it reads.  Every round runs each
contender once, starting with another one each time.
"""

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.cli.models import load_model
from kvquant_hf.transformers_api.names import with_cache

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
clock = time.perf_counter
Contenders = dict[str, Callable[[], object]]


def interleaved(contenders: Contenders, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each contender in each round; the first call of each is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for run in contenders.values():
        run()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            contenders[name]()
            times[name].append((clock() - start) * 1e3)
    return times


def copy_bandwidth() -> float:
    """Bytes per second that a copy of 64 MiB reads and writes, best of 9."""
    source = torch.ones(1 << 24)
    target = torch.empty_like(source)
    best = min(interleaved({"copy": lambda: target.copy_(source)}, 9)["copy"])
    return 2 * source.nbytes / best * 1e3


def fill(cache: Any, config: Any, tokens: int, dtype: torch.dtype) -> None:
    """``tokens`` random tokens in every layer, a few thousand at a time."""
    heads = config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for first in range(0, tokens, 2048):
        count = min(2048, tokens - first)
        keys, values = (torch.randn(1, heads, count, dim).to(dtype) for _ in range(2))
        for layer in range(config.num_hidden_layers):
            cache.update(keys, values, layer)


def step_of(model: Any, cache: Any) -> Callable[[], object]:
    """One decode step; the cache grows by a token each time."""
    token = torch.tensor([[17]])
    return lambda: model(token, use_cache=True, **with_cache(cache))


def whole_steps(models: dict[str, Any], policies: list[str], context: int, rounds: int) -> dict[str, float]:
    """Medians of a step by contender, with the table printed."""
    contenders: Contenders = {}
    stored = {}
    for name, model in models.items():
        dense = DynamicCache(config=model.config)
        fill(dense, model.config, context, DTYPES[name])
        contenders[f"DynamicCache {name}"] = step_of(model, dense)
        for policy in policies:
            cache = QuantizedPagedCache(model.config, policy)
            fill(cache, model.config, context, DTYPES[name])
            contenders[f"{policy} {name}"] = step_of(model, cache)
            stored[f"{policy} {name}"] = cache
    times = interleaved(contenders, rounds)
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    best = min(ms for name, ms in medians.items() if name.startswith("DynamicCache"))
    print(
        f"\ncontext {context}: median ms of {rounds} rounds, the fastest, ratio to the faster "
        "DynamicCache, to its own dtype's"
    )
    for name, ms in medians.items():
        own = medians[f"DynamicCache {name.rpartition(' ')[2]}"]
        held = f"{stored[name].report().bytes / 1e6:8.1f} MB" if name in stored else ""
        print(f"{name:24} {ms:8.1f} {min(times[name]):8.1f} {best / ms:6.2f} {own / ms:6.2f} {held}", flush=True)
    for policy in policies:
        ours = min(ms for name, ms in medians.items() if name.startswith(f"{policy} "))
        print(f"{policy}: {best / ours:.2f} x, faster dtype against faster dtype", flush=True)
    return medians


def attention_alone(policies: list[str], context: int, rounds: int) -> None:
    """One layer's update and attention, 8 key/value heads of 128, group 4."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=1, vocab_size=8
    )
    bandwidth = copy_bandwidth()
    contenders: Contenders = {}
    sizes = {}
    for name, dtype in DTYPES.items():
        query, new = torch.randn(1, 32, 1, 128).to(dtype), torch.randn(1, 8, 1, 128).to(dtype)
        for policy in ("DynamicCache", *policies):
            cache = DynamicCache(config=config) if policy == "DynamicCache" else QuantizedPagedCache(config, policy)
            fill(cache, config, context, dtype)
            if policy != "DynamicCache":
                sizes[f"{policy} {name}"] = cache.report().packed_bytes
            contenders[f"{policy} {name}"] = _attention(cache, query, new, policy == "DynamicCache")
    times = interleaved(contenders, rounds)
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    best = min(ms for name, ms in medians.items() if name.startswith("DynamicCache"))
    print(
        f"attention alone, {context} tokens; a copy moves {bandwidth / 1e9:.1f} GB/s; ms, fastest, "
        "ratio, percent of the floor"
    )
    for name, ms in medians.items():
        floor = sizes[name] / bandwidth * 1e3 if name in sizes else float("nan")
        print(f"{name:24} {ms:8.2f} {min(times[name]):8.2f} {best / ms:6.2f} {100 * floor / ms:6.0f} %", flush=True)


def _attention(cache: Any, query: torch.Tensor, new: torch.Tensor, dense: bool) -> Callable[[], object]:
    from kvquant_hf.layers.attention import attend

    def run() -> torch.Tensor:
        keys, values = cache.update(new, new, 0)
        if dense:
            return torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        return attend(query, keys, values, mask=None, scale=None, causal=True)

    return run


def prefill(models: dict[str, Any], policies: list[str], tokens: int, rounds: int) -> None:
    """The forward pass of a prompt without storing anything of ours, and what storing it costs."""
    ids = torch.randint(100, 40000, (1, tokens))
    for name, model in models.items():
        contenders: Contenders = {"prefill": lambda model=model: model(ids, logits_to_keep=1)}
        for policy in policies:
            contenders[policy] = lambda model=model, policy=policy, dtype=DTYPES[name]: fill_once(
                model.config, policy, tokens, dtype
            )
        times = interleaved(contenders, rounds)
        medians = {key: statistics.median(samples) for key, samples in times.items()}
        print(f"prefill of {tokens} tokens, {name}: {medians['prefill']:.0f} ms with DynamicCache")
        for policy in policies:
            share = statistics.median(a / b for a, b in zip(times[policy], times["prefill"], strict=True))
            print(f"  storing as {policy:14} {medians[policy]:8.1f} ms, {100 * share:.1f} % of the prefill", flush=True)


def fill_once(config: Any, policy: str, tokens: int, dtype: torch.dtype) -> None:
    """Store a prompt of ``tokens`` tokens in one piece."""
    cache = QuantizedPagedCache(config, policy)
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    keys, values = _prompt(heads, tokens, dim, dtype)
    for layer in range(config.num_hidden_layers):
        cache.update(keys, values, layer)


_prompts: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}


def _prompt(heads: int, tokens: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    key = (heads, tokens, dim, dtype)
    if key not in _prompts:
        # As a model hands them over: heads and tokens transposed.
        pair = [torch.randn(1, tokens, heads, dim).to(dtype).transpose(1, 2) for _ in range(2)]
        _prompts[key] = (pair[0], pair[1])
    return _prompts[key]


def linear(model: Any, policies: list[str], rounds: int) -> None:
    """The line through step time against context."""
    contexts = [1024, 2048, 4096, 8192, 16384]
    x = torch.tensor(contexts, dtype=torch.float64)
    for policy in policies:
        contenders = {}
        for context in contexts:
            cache = QuantizedPagedCache(model.config, policy)
            fill(cache, model.config, context, next(iter(DTYPES.values())))
            contenders[str(context)] = step_of(model, cache)
        y = torch.tensor([statistics.median(t) for t in interleaved(contenders, rounds).values()], dtype=torch.float64)
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        rest = y - y.mean() - slope * (x - x.mean())
        r2 = 1 - rest.square().sum() / (y - y.mean()).square().sum()
        steps = ", ".join(f"{c}: {ms:.1f}" for c, ms in zip(contexts, y.tolist(), strict=True))
        print(f"{policy}: {steps} ms; {1e3 * slope:.3f} us per token, R2 {r2:.4f}", flush=True)


def profile(model: Any, policy: str, context: int, name: str) -> None:
    """The functions in which 20 steps spend their Python time."""
    cache = QuantizedPagedCache(model.config, policy)
    fill(cache, model.config, context, DTYPES[name])
    step = step_of(model, cache)
    step()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(20):
        step()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(45)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="512,2048,7900", help="tokens held before the first step")
    parser.add_argument("--policies", default="int8,int4,turboquant")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--busy", action="store_true", help="processor time of one thread: for a machine that is shared"
    )
    parser.add_argument("--attention", action="store_true")
    parser.add_argument("--prefill", type=int, metavar="TOKENS")
    parser.add_argument("--linear", action="store_true")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    if arguments.busy:
        global clock
        clock = time.thread_time
    torch.set_num_threads(1 if arguments.busy else arguments.threads)
    torch.manual_seed(0)
    policies = arguments.policies.split(",")
    with torch.no_grad():
        if arguments.attention:
            return attention_alone(policies, 32768, arguments.rounds)
        models = {name: load_model(None, name_of(name)).model for name in arguments.dtypes.split(",")}
        first = next(iter(models))
        if arguments.prefill:
            prefill(models, policies, arguments.prefill, arguments.rounds)
        elif arguments.linear:
            linear(models[first], policies, arguments.rounds)
        elif arguments.profile:
            profile(models[first], policies[0], int(arguments.contexts.split(",")[0]), first)
        else:
            for context in map(int, arguments.contexts.split(",")):
                whole_steps(models, policies, context, arguments.rounds)
    return None


def name_of(dtype: str) -> str:
    """The command's name of a dtype."""
    return str(DTYPES[dtype]).removeprefix("torch.")


if __name__ == "__main__":
    main()
