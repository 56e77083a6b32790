"""Decode steps of a model that caches latents (MLA), beside ``DynamicCache``, which expands all of them in every step.

    python benchmarks/latent_decode.py [--policies exact,int8,int4] [--tokens 4096] [--new 16] [--rounds 3]

The layers are those of DeepSeek-V2-Lite's attention (hidden size 2048, 16 heads, latents of 512, rotary keys of 64, 128
more of each key and 128 of each value) with a small feed-forward part, few of them, with random weights.  All caches
read the same prompt and then decode with one another, each token with one cache after the other, so that a busy
moment meets all alike.  Printed are the median of a step, and the median over steps of its speed beside
``DynamicCache`` in the same step, with its range.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from short_prompts import BASELINE, Greedy
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

from kvquant_hf import QuantizedPagedCache

SIZES = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512}
SIZES |= {"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "intermediate_size": 2048}


def latent_model(layers: int, dtype: torch.dtype, **changes: Any) -> DeepseekV3ForCausalLM:
    """The model, random weights always the same."""
    sizes: dict[str, Any] = SIZES | {"vocab_size": 1024, "q_lora_rank": None, "max_position_embeddings": 131072}
    sizes |= {"num_hidden_layers": layers, "first_k_dense_replace": layers, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes | changes)).to(dtype).eval()
    model.set_attn_implementation("sdpa")
    return model


@torch.no_grad()  # as generate
def compare(
    model: Any, policies: list[str], tokens: int, new: int, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each step of each cache, and a printed line for each."""
    ids = torch.randint(3, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    makers: dict[str, Callable[[], Any]] = {BASELINE: lambda: DynamicCache(config=model.config)}
    makers |= {policy: functools.partial(QuantizedPagedCache, model.config, policy) for policy in policies}
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(rounds):
        running = {name: Greedy(model, ids, make(), clock) for name, make in makers.items()}
        for step in range(new + 2):
            for name in list(running)[:: 1 if step % 2 else -1]:  # forwards and backwards in turn
                running[name].step()
        for name, greedy in running.items():
            times[name] += greedy.times[2:]  # without the prompt, and the step that warms up
    for name, mine in times.items():
        ratios = sorted(base / own for base, own in zip(times[BASELINE], mine, strict=True))
        print(
            f"{name:12} {1e3 * statistics.median(mine):8.2f} ms a step   {statistics.median(ratios):6.2f} x {BASELINE} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})",
            flush=True,
        )
    return times


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default="exact,int8,int4,turboquant")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for dtype in args.dtypes.split(","):
        print(f"{dtype}, {args.layers} layers, {args.tokens} tokens, {torch.get_num_threads()} threads")
        model = latent_model(args.layers, getattr(torch, dtype))
        compare(model, args.policies.split(","), args.tokens, args.new, args.rounds)


if __name__ == "__main__":
    main()
