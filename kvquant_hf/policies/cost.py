"""Bytes per token, derived from the planes that the codecs declare and from nothing else."""

from dataclasses import dataclass

import torch

from ..triton_kernels.codecs import CODECS
from .table import LayerwisePolicy, PolicyLike, parse_policy


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
    layers = parsed.layers if isinstance(parsed, LayerwisePolicy) else (parsed,)
    value_head_dim = value_head_dim or head_dim
    stored = 0.0
    for layer in layers:
        stored += CODECS[layer.keys].bytes_per_token(head_dim, page_size, dtype) / len(layers)
        stored += CODECS[layer.values].bytes_per_token(value_head_dim, page_size, dtype) / len(layers)
    elements = heads * (head_dim + value_head_dim)
    return PageCost(heads * stored, elements * dtype.itemsize, elements)
