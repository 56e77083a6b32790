"""A prompt that is read in one step, on its exact keys and values."""

import torch
from torch.nn import functional

from ..triton_kernels.ops import dense_attention


def attend_to_itself(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    window: int,
) -> torch.Tensor:
    """Causal attention of a whole prompt ``[1, heads, tokens, dim]`` to its own exact keys and values."""
    tokens, mask = query.shape[2], None
    if 0 < window < tokens:
        position = torch.arange(tokens, device=query.device)
        distance = position[:, None] - position
        mask = ((distance >= 0) & (distance < window))[None, None]
    if softcap is None and sinks is None:
        return functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
    return dense_attention(query, keys, values, scale=scale, mask=mask, softcap=softcap, sinks=sinks)
