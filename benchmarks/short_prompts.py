"""What a quantized cache costs where there is nothing to gain: a short prompt and a short answer.

    python benchmarks/short_prompts.py [--policies int4,int8] [--prompt 8] [--new 64] [--rounds 9]

SmolLM2-135M answers with each cache in turn, so that a busy moment meets all alike; printed are tokens per second
(medians of the rounds) and the median over rounds of the speed beside ``DynamicCache`` in the same round.  Run it when
nothing else does.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.cli.models import load_model
from kvquant_hf.transformers_api.names import with_cache

BASELINE = "DynamicCache"


def seconds(model: Any, ids: torch.Tensor, cache: Any, new: int, clock: Callable[[], float]) -> float:
    """Seconds of one call of ``generate``, the cache made beforehand."""
    start = clock()
    model.generate(ids, **with_cache(cache), max_new_tokens=new, min_new_tokens=new, do_sample=False)
    return clock() - start


def compare(dtype: str, policies: list[str], prompt: int, new: int, rounds: int, clock: Callable[[], float]) -> None:
    """Print a line for each cache."""
    loaded = load_model(None, dtype, hidden=True)
    model = loaded.model
    ids = torch.randint(3, 1000, (1, prompt), generator=torch.Generator().manual_seed(0))
    makers: dict[str, Callable[[], Any]] = {BASELINE: lambda: DynamicCache(config=model.config)}
    makers |= {policy: functools.partial(QuantizedPagedCache, model.config, policy) for policy in policies}
    times: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(rounds + 1):
        for name in list(makers)[:: 1 if turn % 2 else -1]:  # forwards and backwards in turn
            taken = seconds(model, ids, makers[name](), new, clock)
            if turn:  # the first round warms up
                times[name].append(taken)
    for name, mine in times.items():
        ratio = statistics.median(base / own for base, own in zip(times[BASELINE], mine, strict=True))
        print(
            f"{dtype:9} {name:12} {new / statistics.median(mine):7.2f} tokens/s   {ratio:.3f} x {BASELINE}", flush=True
        )


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default="int4,int8,turboquant")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--prompt", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time instead of wall time: for busy machines"
    )
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    for dtype in args.dtypes.split(","):
        compare(dtype, args.policies.split(","), args.prompt, args.new, args.rounds, clock)


if __name__ == "__main__":
    main()
