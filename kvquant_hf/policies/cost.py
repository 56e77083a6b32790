"""Bytes per token, from the planes that the codecs declare and from nothing else; what ``auto`` makes of them."""

import math
from dataclasses import dataclass

import torch

from ..errors import UnknownPolicyError
from ..triton_kernels.codecs import CODECS
from .auto import LADDER, AutoPolicy
from .table import POLICIES, KVPolicy, LayerwisePolicy, PolicyLike, parse_policy


@dataclass(frozen=True)
class PageCost:
    """What one token costs in a full page.

    Args:
        bytes_per_token: stored bytes for keys and values of all ``heads``, scales included.
        dense_bytes_per_token: the same in the model's dtype.
        elements_per_token: number of key and value elements.
    """

    bytes_per_token: float
    dense_bytes_per_token: int
    elements_per_token: int

    @property
    def bits_per_element(self) -> float:
        """Stored bits per key or value element."""
        return 8 * self.bytes_per_token / self.elements_per_token

    @property
    def ratio(self) -> float:
        """How many times smaller than the model's dtype."""
        return self.dense_bytes_per_token / self.bytes_per_token


def page_cost(
    policy: PolicyLike,
    head_dim: int,
    *,
    value_head_dim: int | None = None,
    heads: int = 1,
    page_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> PageCost:
    """Cost of one token in a full page, summed over ``heads`` (multiply by layers for a model).

    Args:
        policy: anything that ``parse_policy`` takes; of a policy by layer, the mean over its layers.
        head_dim: elements per key vector; ``value_head_dim`` the same for values (default: equal).
        heads: number of key/value heads.
        page_size: tokens per page.
        dtype: the model's dtype, for the ratio and for planes stored in it.
    """
    parsed = parse_policy(policy)
    value_head_dim = value_head_dim or head_dim
    if isinstance(parsed, AutoPolicy):
        parsed = choose(parsed, ladder(head_dim, value_head_dim, page_size, dtype))
    layers = parsed.layers if isinstance(parsed, LayerwisePolicy) else (parsed,)
    stored = 0.0
    for layer in layers:
        stored += CODECS[layer.keys].bytes_per_token(head_dim, page_size, dtype) / len(layers)
        stored += CODECS[layer.values].bytes_per_token(value_head_dim, page_size, dtype) / len(layers)
    elements = heads * (head_dim + value_head_dim)
    return PageCost(heads * stored, elements * dtype.itemsize, elements)


def ladder(head_dim: int, value_head_dim: int, page_size: int, dtype: torch.dtype) -> dict[str, float]:
    """Bits per element in full pages of each policy of ``LADDER`` that can store such vectors, the most accurate first;
    arguments as of :func:`page_cost`."""
    found = {}
    for name in LADDER:
        sides = CODECS[POLICIES[name].keys], CODECS[POLICIES[name].values]
        if not any(dim % codec.head_dim_multiple for dim, codec in zip((head_dim, value_head_dim), sides, strict=True)):
            cost = page_cost(name, head_dim, value_head_dim=value_head_dim, page_size=page_size, dtype=dtype)
            found[name] = cost.bits_per_element
    return found


def choose(policy: AutoPolicy, rungs: dict[str, float]) -> KVPolicy:
    """The most accurate policy within the budget.

    Args:
        policy: the budget.
        rungs: of :func:`ladder`.

    Raises:
        UnknownPolicyError: the smallest one takes more; the message says how much.
    """
    for name, bits in rungs.items():
        if bits <= policy.bits:
            return POLICIES[name]
    smallest = min(rungs, key=lambda name: rungs[name])
    raise UnknownPolicyError(
        f"no policy has {policy.bits:g} bits per element or fewer with this model's pages; the smallest, {smallest!r}, "
        f"takes {rungs[smallest]:.3f}: give at least {math.ceil(100 * rungs[smallest]) / 100:g}."
    )
