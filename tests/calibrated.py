"""Calibrated codecs in tests: ranges that differ from channel to channel, for codecs that need them."""

import torch

from kvquant_hf.triton_kernels.codecs import Codec


def with_range(codec: Codec, heads: int, head_dim: int, reach: float = 8.0) -> Codec:
    """``codec``; where it is calibrated, with a range of its own for each channel of each head, around +-``reach``."""
    if not codec.calibrated:
        return codec
    generator = torch.Generator().manual_seed(heads * head_dim)
    scale, zero = (torch.rand(heads, head_dim, generator=generator) for _ in range(2))
    return codec.given((1 + scale / 2) * 2 * reach / 255, zero - 0.5)


def range_of(codec: Codec, x: torch.Tensor) -> Codec:
    """``codec``; where it is calibrated, with the range of each channel of ``x`` ``[..., head_dim]``."""
    if not codec.calibrated:
        return codec
    rows = x.float().reshape(-1, x.shape[-1])
    low, high = rows.amin(0), rows.amax(0)
    return codec.given((high - low) / 255, (high + low) / 2)
