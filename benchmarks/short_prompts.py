"""What a quantized cache costs where there is nothing to gain: a short prompt and a short answer.

    python benchmarks/short_prompts.py [--policies int4,int8] [--prompt 8] [--new 64] [--rounds 9]

SmolLM2-135M answers with all caches at once, each token with one after the other, so that a busy moment meets all
alike: on shared machines speed changes within seconds.  Printed are tokens per second (medians of the rounds) and the
median over rounds of the speed beside ``DynamicCache`` in the same round, with its range.  Run it when nothing else
does.
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
PAGE = 64


class Greedy:
    """Greedy decoding with one cache, a step at a time; what each took in seconds."""

    def __init__(self, model: Any, ids: torch.Tensor, cache: Any, clock: Callable[[], float]) -> None:
        self.model, self.next, self.cache, self.clock = model, ids, cache, clock
        self.times: list[float] = []

    def step(self) -> None:
        """Read the prompt, or the token chosen last, and choose the next one."""
        start = self.clock()
        logits = self.model(self.next, **with_cache(self.cache), use_cache=True, logits_to_keep=1).logits
        self.next = logits[:, -1:].argmax(-1)
        self.times.append(self.clock() - start)


def phases(prompt: int, new: int) -> list[tuple[str, int, int]]:
    """What happens in which steps: a name, the first step and the one after the last."""
    full = max(1, PAGE + 1 - prompt)  # the step whose token does not fit in the first page
    parts = [("the prompt", 0, 1), ("until the first page is full", 1, full)]
    parts += [("the step that stores it", full, full + 1), ("after it", full + 1, new)]
    return [(label, first, min(last, new)) for label, first, last in parts if first < min(last, new)]


@torch.no_grad()  # as generate
def compare(dtype: str, policies: list[str], prompt: int, new: int, rounds: int, clock: Callable[[], float]) -> None:
    """Print a line for each cache."""
    loaded = load_model(None, dtype, hidden=True)
    model = loaded.model
    ids = torch.randint(3, 1000, (1, prompt), generator=torch.Generator().manual_seed(0))
    makers: dict[str, Callable[[], Any]] = {BASELINE: lambda: DynamicCache(config=model.config)}
    makers |= {policy: functools.partial(QuantizedPagedCache, model.config, policy) for policy in policies}
    times: dict[str, list[list[float]]] = {name: [] for name in makers}
    for turn in range(rounds + 1):
        running = {name: Greedy(model, ids, make(), clock) for name, make in makers.items()}
        for step in range(new):
            for name in list(running)[:: 1 if step % 2 else -1]:  # forwards and backwards in turn
                running[name].step()
        if turn:  # the first round warms up
            for name, greedy in running.items():
                times[name].append(greedy.times)
    for name, mine in times.items():
        ratios = sorted(sum(base) / sum(own) for base, own in zip(times[BASELINE], mine, strict=True))
        print(
            f"{dtype:9} {name:12} {new / statistics.median(map(sum, mine)):7.2f} tokens/s   "
            f"{statistics.median(ratios):.3f} x {BASELINE} ({ratios[0]:.3f} to {ratios[-1]:.3f})",
            flush=True,
        )
        for label, first, last in phases(prompt, new):
            pairs = [
                [sum(x[first:last]) / (last - first) * 1e3 for x in both]
                for both in zip(times[BASELINE], mine, strict=True)
            ]
            usual, more = (statistics.median(x) for x in zip(*((base, own - base) for base, own in pairs), strict=True))
            print(f"{'':22} {label:40} {more:+7.2f} ms a step of {usual:6.1f}")


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
