"""A policy for each layer, from what a coarse codec does to the model in that layer alone.

Keys and values of a layer are two *parts*; each can have one of a few codecs, the *rungs* of a ladder.  What is wanted
is the assignment with the least KLD at a given number of bits.

1. Measure.  For each part, the mean KLD against the exact model when this part has the second rung, the *probe*, and
   everything else is exact; for each rung, the KLD when all keys, or all values, have it.  Everything goes through the
   real cache (``harness.py``).
2. Model.  KLD is zero and flat at the exact model, so that small errors of independent parts add up, and it is
   quadratic in their size, so that going from one rung to another changes it by about the same ratio in every layer:

       KLD(assignment) = sum over parts of  KLD(part, probe) * KLD(all, rung) / KLD(all, probe)

   The coarsest rung is no probe: two bits for keys are beyond what is quadratic.  SmolLM2's first layer has 150 times
   the KLD with ``int2-ranked`` that it has with ``int3-ranked``, the third one 6 times, all layers together 11 times.

3. Choose.  Every part begins on the coarsest rung; the step with the most KLD saved per bit spent is taken, as long as
   the budget lasts.  A step may skip rungs, which makes the ladder of each part convex; the last few bits that fit no
   step are left.

The sum is a model, so the assignment should be measured as a whole beside uniform policies: ``kvquant tune`` does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..cache import QuantizedPagedCache
from ..errors import EvaluationInputError
from ..policies.table import POLICIES, KVPolicy, LayerwisePolicy
from ..transformers_api.names import with_cache
from ..triton_kernels.codecs import CODECS
from .harness import evaluate, paged

KEYS = ("int2-ranked", "int3-ranked", "int4-ranked", "int8-channel")
VALUES = ("octet2", "octet3", "int4-hadamard", "int8-affine")
_INSTEAD = {"int4-ranked": "int4-channel", "octet2": "lloyd2"}  # of vectors that do not come in eights
UNIFORM = ("kv2.9", "kv3", "int4")  # policies to compare with
_SIDES = ("keys", "values")
_ABREAST = 8  # contenders beside one run of the exact model: what it costs is shared, and their caches fit in memory


class Part(NamedTuple):
    """Keys or values of one layer that is stored in pages, counted from the first."""

    side: str
    layer: int


class Vectors(NamedTuple):
    """What a part holds of a token."""

    heads: int
    head_dim: int


Parts = dict[Part, Vectors]


@dataclass(frozen=True)
class Sensitivity:
    """What was measured, mean KLD in nats.

    Args:
        parts: of each part on the probe of its side, all else exact.
        rungs: of each rung of a side in all layers, the other side exact; coarsest first.
        probes: of each side, one of its rungs.
    """

    parts: dict[Part, float]
    rungs: dict[str, dict[str, float]]
    probes: dict[str, str]

    def predicted(self, part: Part, rung: str) -> float:
        """KLD that ``part`` adds on ``rung``, by the model above."""
        of_side = self.rungs[part.side]
        return self.parts[part] * of_side[rung] / of_side[self.probes[part.side]]


def find_parts(model: Any) -> Parts:
    """The parts of ``model``, from a forward pass of one token."""
    cache = QuantizedPagedCache(model.config, "exact", prefill="quantized")
    with torch.inference_mode():
        model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=True, **with_cache(cache))
    return {
        Part(side, i): Vectors(*vectors)
        for i, store in enumerate(cache.stores)
        for side, vectors in zip(_SIDES, store.vectors, strict=True)
    }


def ladders(parts: Parts) -> dict[str, list[str]]:
    """The rungs of each side that can store its vectors, coarsest first."""
    found = {}
    for side, rungs in zip(_SIDES, (KEYS, VALUES), strict=True):
        stored = (rung if can_store(parts, side, rung) else _INSTEAD.get(rung, rung) for rung in rungs)
        found[side] = [rung for rung in stored if can_store(parts, side, rung)]
    return found


def probe_of(rungs: Sequence[str]) -> str:
    """The rung on which each part of a side is measured: the second; the first of two, as the finest shows little."""
    return rungs[1] if len(rungs) > 2 else rungs[0]


def can_store(parts: Parts, side: str, codec: str) -> bool:
    """Whether ``codec`` takes the vectors of a side."""
    return not any(
        vectors.head_dim % CODECS[codec].head_dim_multiple for part, vectors in parts.items() if part.side == side
    )


def uniform(parts: Parts) -> list[str]:
    """The policies of ``UNIFORM`` that can store the parts."""
    return [name for name in UNIFORM if all(can_store(parts, side, getattr(POLICIES[name], side)) for side in _SIDES)]


def _on(parts: Parts, side: str, rung: str, layers: Sequence[int]) -> LayerwisePolicy:
    """``rung`` on one side of ``layers``, everything else exact."""
    changed, exact = KVPolicy(**({"keys": "exact", "values": "exact"} | {side: rung})), KVPolicy("exact", "exact")
    return LayerwisePolicy([changed if i in layers else exact for i in range(len(parts) // 2)])


def questions(parts: Parts) -> dict[tuple[str, str | int], LayerwisePolicy]:
    """What :func:`measure` measures: by side and rung for all layers, by side and layer for one."""
    asked: dict[tuple[str, str | int], LayerwisePolicy] = {}
    every = range(len(parts) // 2)
    for side, rungs in ladders(parts).items():
        asked |= {(side, rung): _on(parts, side, rung, every) for rung in rungs}
        asked |= {(side, layer): _on(parts, side, probe_of(rungs), [layer]) for layer in every}
    return asked


def passes(parts: Parts, windows: torch.Tensor, page_size: int, batch: int) -> int:
    """Forward passes that :func:`measure` makes: how often it calls ``advance``."""
    contenders = len(questions(parts))
    chunks = -(-windows.shape[0] // batch) * -(-windows.shape[1] // page_size)
    return (contenders + -(-contenders // _ABREAST)) * chunks


def measure(
    model: Any,
    windows: torch.Tensor,
    parts: Parts,
    *,
    page_size: int = 64,
    batch: int = 1,
    advance: Callable[[str], object] = lambda name: None,
) -> Sensitivity:
    """Step 1 of the module's docstring.

    Args:
        model: a causal language model in eval mode.
        windows: token ids ``[windows, context]``.
        parts: those of the model.
        page_size: tokens per page.
        batch: windows read side by side.
        advance: called after each forward pass.

    Raises:
        EvaluationInputError: windows that are too short for a sealed page.
    """
    if windows.shape[1] <= page_size:
        raise EvaluationInputError(
            f"windows of {windows.shape[1]} tokens seal no page of {page_size}; use a longer --context."
        )
    asked = questions(parts)
    names = {f"{side} {what}": (side, what) for side, what in asked}
    kld: dict[tuple[str, str | int], float] = {}
    contenders = [paged(model, asked[key], page_size=page_size)._replace(name=name) for name, key in names.items()]
    for i in range(0, len(contenders), _ABREAST):
        results = evaluate(
            model,
            windows,
            contenders[i : i + _ABREAST],
            step=page_size,
            page_size=page_size,
            batch=batch,
            advance=advance,
        )
        kld |= {names[name]: result.accuracy.kld_mean for name, result in results.items()}
    found = ladders(parts)
    return Sensitivity(
        {part: kld[part] for part in parts},
        {side: {rung: kld[side, rung] for rung in rungs} for side, rungs in found.items()},
        {side: probe_of(rungs) for side, rungs in found.items()},
    )


def bits_of(rung: str, head_dim: int, page_size: int) -> float:
    """Bits per element of a rung in full pages, scales included; no rung stores anything in the model's dtype."""
    return 8 * CODECS[rung].bytes_per_token(head_dim, page_size, torch.bfloat16) / head_dim


def mean_bits(policy: LayerwisePolicy, parts: Parts, page_size: int) -> float:
    """Bits per element of ``policy`` in full pages, all keys and values together."""
    sizes = {part: vectors.heads * vectors.head_dim for part, vectors in parts.items()}
    spent = sum(
        sizes[part] * bits_of(getattr(policy.layers[part.layer], part.side), vectors.head_dim, page_size)
        for part, vectors in parts.items()
    )
    return spent / sum(sizes.values())


def choose(sensitivity: Sensitivity, parts: Parts, budget: float, page_size: int = 64) -> LayerwisePolicy:
    """Step 3 of the module's docstring.

    Args:
        sensitivity: what was measured.
        parts: those of the model.
        budget: bits per element in full pages, the mean over all keys and values, that are not exceeded.
        page_size: tokens per page.

    Raises:
        EvaluationInputError: the coarsest rungs take more than ``budget``.
    """

    def cost(part: Part, rung: str) -> float:
        return parts[part].heads * parts[part].head_dim * bits_of(rung, parts[part].head_dim, page_size)

    elements = sum(vectors.heads * vectors.head_dim for vectors in parts.values())
    held = {part: next(iter(sensitivity.rungs[part.side])) for part in parts}
    left = budget * elements - sum(cost(part, rung) for part, rung in held.items())
    if left < 0:
        raise EvaluationInputError(
            f"the coarsest codecs take {budget - left / elements:.2f} bits per element and the budget is {budget:g}; "
            "use a larger --budget."
        )
    while True:
        steps = []
        for part, rung in held.items():
            for finer in sensitivity.rungs[part.side]:
                bits = cost(part, finer) - cost(part, rung)
                saved = sensitivity.predicted(part, rung) - sensitivity.predicted(part, finer)
                if 0 < bits <= left + 1e-9 * elements and saved > 0:
                    steps.append((saved / bits, part, finer, bits))
        if not steps:
            break
        _, part, finer, bits = max(steps)
        held[part] = finer
        left -= bits
    return LayerwisePolicy([KVPolicy(held[Part("keys", i)], held[Part("values", i)]) for i in range(len(parts) // 2)])
