"""Whole decode steps of a Llama-3-8B of random weights: transformers' own caches and ours, speed and memory.

The cache of a context is filled with random keys and values, layer by layer, through ``cache.update``, which is what a
prompt would do to it; then the model decodes greedily, and its real forward passes are timed.  Steps follow each other
with everything that happens on the host in between.  A cache that reserves its memory is decoded with as ``generate``
does on a GPU: the forward pass compiled with transformers' own options, which replay it as a CUDA graph.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from transformers import CompileConfig, PreTrainedConfig, PreTrainedModel

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.benchmark.shapes import SHAPES, random_model
from kvquant_hf.transformers_api.names import with_cache

from .machine import clocks
from .plan import DTYPE
from .results import Observation
from .subject import random_vectors
from .tasks import Task
from .timing import Stopwatch

LLAMA_3_8B = SHAPES["llama-3-8b"].config_options()
STEPS, WARM_UP = 64, 4
# The largest cells first, for as long as there is time.
SITUATIONS = ((8, 32768), (1, 32768), (8, 8192), (1, 8192), (8, 1024), (1, 1024))
# Seconds that a cell takes at least and at most: with the forward pass as it is, and compiled.
_EAGER, _COMPILED = (10.0, 60.0), (60.0, 180.0)


class Contender(NamedTuple):
    """``make(config, tokens)`` returns an empty cache for ``tokens``; ``compiled``: the model's forward is compiled."""

    family: str
    make: Callable[[PreTrainedConfig, int], Any]
    compiled: bool = False


def contenders(policies: Sequence[str]) -> dict[str, Contender]:
    """What is compared, in the order of its worth: each policy is compiled for a minute, so the first one comes first.

    ``impl="triton"`` and not "auto": that the kernels cannot run is a result, and what runs instead is not the subject.
    """
    table = {"dynamic": Contender("bf16", lambda config, tokens: transformers.DynamicCache(config=config))}
    for policy in policies:
        table[policy] = Contender("paged", functools.partial(_paged, policy, False))
    for backend, axis in (("hqq", 1), ("quanto", 0)):
        table[f"quantized-{backend}"] = Contender("transformers", _quantized(backend, axis))
    compiled = {policy: Contender("paged", functools.partial(_paged, policy, True), True) for policy in policies}
    for policy in policies[:1]:
        table[f"{policy}-compiled"] = compiled.pop(policy)
    table["static-compiled"] = Contender(
        "bf16", lambda config, tokens: transformers.StaticCache(config=config, max_cache_len=tokens), compiled=True
    )
    return table | {f"{policy}-compiled": contender for policy, contender in compiled.items()}


def _paged(policy: str, static: bool, config: PreTrainedConfig, tokens: int) -> QuantizedPagedCache:
    reserved = {"static": True, "max_length": tokens} if static else {}
    return QuantizedPagedCache(config, policy=policy, impl="triton", **reserved)


def _quantized(backend: str, axis: int) -> Callable[[PreTrainedConfig, int], Any]:
    options = {"nbits": 4, "axis_key": axis, "axis_value": axis}
    return lambda config, tokens: transformers.QuantizedCache(backend=backend, config=config, **options)


def build(device: torch.device, **changes: int) -> PreTrainedModel:
    """The model, with random weights made on the device in bf16."""
    return random_model("llama-3-8b", DTYPE, device, **changes)


def affordable_layers(free: int, wanted: int = LLAMA_3_8B["num_hidden_layers"]) -> int:
    """The most layers (``wanted``, or halved until it fits) whose weights take at most a third of ``free`` bytes."""
    hidden, wide, dim = LLAMA_3_8B["hidden_size"], LLAMA_3_8B["intermediate_size"], LLAMA_3_8B["head_dim"]
    heads, kv_heads = LLAMA_3_8B["num_attention_heads"], LLAMA_3_8B["num_key_value_heads"]
    layer = 3 * hidden * wide + 2 * hidden * heads * dim + 2 * hidden * kv_heads * dim
    embeddings = 2 * LLAMA_3_8B["vocab_size"] * hidden
    while wanted > 1 and (wanted * layer + embeddings) * DTYPE.itemsize > free / 3:
        wanted //= 2
    return wanted


def fill(cache: Any, model: PreTrainedModel, batch: int, tokens: int, device: torch.device) -> None:
    """Put ``tokens`` random keys and values of every sequence into every layer, one update each, like a prompt."""
    config = model.config
    shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
    keys, values = (random_vectors(*shape, device=device) for _ in range(2))
    for layer in range(config.num_hidden_layers):
        cache.update(keys, values, layer)


def decode(
    model: PreTrainedModel,
    contender: Contender,
    base: Observation,
    stopwatch: Stopwatch,
    device: torch.device,
    steps: int,
    warm_up: int,
) -> Observation:
    """Fill a cache and decode ``steps`` tokens of every sequence.

    Raises:
        ArithmeticError: the logits are not finite.
    """
    stopwatch.reset_peak()
    cache = contender.make(model.config, base.context + steps + warm_up)
    fill(cache, model, base.batch, base.context, device)
    forward: Any = model.get_compiled_call(CompileConfig()) if contender.compiled else model
    token = torch.randint(model.config.vocab_size, (base.batch, 1), device=device)
    logits = torch.empty(0)

    def step() -> None:
        nonlocal token, logits
        if contender.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        logits = forward(input_ids=token, use_cache=True, **with_cache(cache)).logits
        token = logits[:, -1:].argmax(-1)  # a tensor of its own: a replayed graph writes its outputs again

    try:
        with torch.no_grad():
            for _ in range(warm_up):
                step()
            timing, seconds = stopwatch.steps(step, steps)
            if not logits.isfinite().all():
                raise ArithmeticError("the logits are not finite")
        peak = stopwatch.peak()
    finally:
        if contender.compiled:
            torch.compiler.reset()  # another cache is another graph, and this one's holds memory
    return dataclasses.replace(
        base,
        how="compiled" if contender.compiled else "eager",
        tokens_per_s=base.batch * steps / seconds,
        peak_bytes=peak,
        **clocks(),
    ).timed(timing)


def model_tasks(
    policies: Sequence[str],
    stopwatch: Stopwatch,
    device: torch.device,
    *,
    situations: Sequence[tuple[int, int]] = SITUATIONS,
    steps: int = STEPS,
    warm_up: int = WARM_UP,
    **changes: int,
) -> list[Task]:
    """One task for each contender in each situation, those of most worth first: see ``_worth``.

    ``changes`` to the model's config are for smaller machines; the rows say how many layers there were.
    """
    changes = {"num_hidden_layers": affordable_layers(stopwatch.free())} | changes
    sizes = LLAMA_3_8B | changes
    base = Observation(
        "model", 0, 0, sizes["num_attention_heads"], sizes["num_key_value_heads"], sizes["head_dim"],
        layers=sizes["num_hidden_layers"],
    )  # fmt: skip

    @functools.cache
    def model() -> PreTrainedModel:
        return build(device, **changes)

    def measure(contender: Contender, row: Observation) -> Callable[[], list[Observation]]:
        def decoded() -> list[Observation]:
            weights = sum(weight.nbytes for weight in model().parameters())
            known = dataclasses.replace(row, weights_bytes=weights)
            return [decode(model(), contender, known, stopwatch, device, steps, warm_up)]

        return decoded

    table = contenders(policies)
    tasks = []
    for turn, (batch, context) in enumerate(situations):
        for name, contender in table.items():
            row = dataclasses.replace(base, batch=batch, context=context, family=contender.family, contender=name)
            least, most = _COMPILED if contender.compiled else _EAGER
            tasks.append((_worth(turn, name, contender, policies), Task(row, measure(contender, row), least, most)))
    return [task for _, task in sorted(tasks, key=lambda pair: pair[0])]


def _worth(turn: int, name: str, contender: Contender, policies: Sequence[str]) -> float:
    """Where a task stands, the lower the sooner: the policies but the first are compiled when the first two situations
    are measured, since that takes minutes and says what the first one said."""
    later = contender.compiled and contender.family == "paged" and name != f"{policies[0]}-compiled"
    return turn + 1.5 * later
