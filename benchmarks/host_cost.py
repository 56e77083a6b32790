"""What a decode step costs the processor before the GPU's driver is called: one layer's update and attention.

    python benchmarks/host_cost.py                      microseconds per layer, beside DynamicCache and SDPA
    python benchmarks/host_cost.py --calls              Python functions called per layer, the same on any machine
    python benchmarks/host_cost.py --policies int8,exact --rounds 500

No GPU is needed: tensors are on the CPU, Triton is told that it drives an sm_90, and starting a compiled kernel does
nothing.  So all that Python, torch and Triton do up to the driver is there, memory from the allocator included, and no
arithmetic.  Of transformers' ``DynamicCache`` and ``sdpa_attention_forward`` everything is there too, the operators
themselves included; their arithmetic is made negligible by one head of 16 channels and 9 tokens.  The row "without its
operators" leaves out what torch does in ``scaled_dot_product_attention``.

Every round runs a step of each contender, of all layers, starting with another one each time.
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from transformers import DynamicCache, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from triton.backends.compiler import GPUTarget

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.triton_kernels import choice, plan, triton_attention

LAYERS, HEADS, GROUP, DIM = 32, 8, 4, 128
PROMPT, MAX_LENGTH = 200, 4096
PROCESSORS = 132
Step = Callable[[], tuple[float, float]]
clock = time.perf_counter


class _Utilities:
    """What Triton asks of a driver when it loads a compiled kernel."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": PROCESSORS, "max_num_regs": 65536, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 255, 0, 1024  # module, function, registers, spills, threads


class _Driver:
    """A driver whose GPU is not there."""

    utils = _Utilities()
    target = GPUTarget("cuda", 90, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return _start


def _start(*args: object) -> None:
    """What would start a kernel."""


def pretend() -> None:
    """From here on Triton drives a GPU that is not there, and kernels take tensors of the CPU.  For a whole process."""
    triton.runtime.driver.set_active(_Driver())
    choice.why_not = lambda device: None
    plan.processors = lambda device: PROCESSORS
    triton_attention.compiled_for = lambda tensor: None  # what tensors of a GPU are not asked


def config(heads: int = HEADS, dim: int = DIM) -> LlamaConfig:
    """Of a model with ``LAYERS`` layers and ``heads`` key/value heads of ``dim``."""
    sizes = {"num_attention_heads": heads * GROUP, "num_key_value_heads": heads, "head_dim": dim}
    return LlamaConfig(num_hidden_layers=LAYERS, hidden_size=heads * GROUP * dim, vocab_size=16, **sizes)


class _Attention(torch.nn.Module):
    """What attention functions look at."""

    is_causal = True
    num_key_value_groups = GROUP


def step_of(cache: Any, heads: int = HEADS, dim: int = DIM, mask: torch.Tensor | None = None) -> Step:
    """Decode steps of ``cache``; each returns seconds in ``update`` and seconds in attention."""
    keys, values, query = (
        torch.zeros(1, 1, n, dim, dtype=torch.bfloat16).transpose(1, 2) for n in (heads, heads, heads * GROUP)
    )
    attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", sdpa_attention_forward)
    module = _Attention()

    def step() -> tuple[float, float]:
        updating = attending = 0.0
        for layer in range(LAYERS):
            start = clock()
            k, v = cache.update(keys, values, layer)
            updated = clock()
            attend(module, query, k, v, mask, dropout=0.0, scaling=0.1)
            attending += clock() - updated
            updating += updated - start
        return updating, attending

    return step


def filled(cache: Any, tokens: int = PROMPT, heads: int = HEADS, dim: int = DIM) -> Any:
    """``cache`` with a prompt."""
    keys, values = (torch.zeros(1, heads, tokens, dim, dtype=torch.bfloat16) for _ in range(2))
    for layer in range(LAYERS):
        cache.update(keys, values, layer)
    return cache


def ours(policy: str, static: bool) -> Any:
    """A cache with a prompt, on Triton's kernels."""
    options: dict[str, Any] = {"static": True, "max_length": MAX_LENGTH} if static else {}
    cache = QuantizedPagedCache(config(), policy, impl="triton", **options)
    cache._log.out_of_range = True  # or what no kernel wrote would be looked at, as only tensors of a CPU are
    return filled(cache)


def dense_step() -> Step:
    """A step of a ``DynamicCache`` that was just made."""
    return step_of(filled(DynamicCache(config=config(1, 16)), 8, 1, 16), 1, 16)


def transformers_step() -> tuple[float, float]:
    """A step of ``DynamicCache`` and SDPA, always of the same length."""
    return dense_step()()


@contextlib.contextmanager
def without_operator() -> Iterator[None]:
    """torch's attention does nothing."""
    functional = torch.nn.functional
    original = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda query, *args, **options: query
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def without_operators() -> tuple[float, float]:
    """The same without what torch does in ``scaled_dot_product_attention``."""
    with without_operator():
        return transformers_step()


def contenders(policies: list[str]) -> dict[str, Step]:
    """Steps by name."""
    steps: dict[str, Step] = {"DynamicCache, sdpa": transformers_step, "  without its operators": without_operators}
    mask = torch.ones(1, 1, 1, MAX_LENGTH, dtype=torch.bool)
    for policy in policies:
        steps[f"{policy}, static"] = step_of(ours(policy, static=True))
        steps[f"{policy}, static, mask"] = step_of(ours(policy, static=True), mask=mask)
        steps[f"{policy}, growing"] = step_of(ours(policy, static=False))
    return steps


def measure(steps: dict[str, Step], rounds: int) -> dict[str, tuple[float, float]]:
    """Median microseconds per layer of update and of attention, over ``rounds`` interleaved rounds after 20 others."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(-20, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken = steps[name]()
            if turn >= 0:
                times[name].append(taken)
    return {
        name: tuple(statistics.median(part) / LAYERS * 1e6 for part in zip(*taken, strict=True))  # type: ignore[misc]
        for name, taken in times.items()
    }


def calls(step: Step) -> float:
    """Python functions that a step calls, per layer."""
    count = 0

    def watch(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    step()
    step()
    sys.setprofile(watch)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count / LAYERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default="int8,int4,turboquant")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--calls", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pretend()
    with torch.no_grad():
        steps = contenders(options.policies.split(","))
        if options.calls:
            steps |= {"DynamicCache, sdpa": dense_step()}
            for name, step in steps.items():
                if step is not without_operators:
                    print(f"{name:30}{calls(step):8.1f}")
            return
        measured = measure(steps, options.rounds)
    beside = sum(measured["DynamicCache, sdpa"])
    print(f"{'microseconds per layer':30}{'update':>8}{'attention':>10}{'both':>8}{'ratio':>7}")
    for name, (updating, attending) in measured.items():
        both = updating + attending
        print(f"{name:30}{updating:8.1f}{attending:10.1f}{both:8.1f}{both / beside:7.2f}")


if __name__ == "__main__":
    main()
