"""The attention function that a model calls while its requests are batched."""

from typing import Any

import torch

from ..errors import BatchingError
from .cache import QuantizedBatchingCache
from .calls import ATTENTION


def batched_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cache: Any = None,
    stored: bool = False,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed batch; arguments and result as of transformers' attention functions.

    The plan of a step says which token belongs to whom, so there is no mask.

    Args:
        cache: ours.
        stored: whether the model has updated it; before transformers 5.24 the attention function does.
        others: nothing in it changes the result but a ``sliding_window``.

    Raises:
        BatchingError: called outside of continuous batching, or with what pages cannot honour.
    """
    if not isinstance(cache, QuantizedBatchingCache):
        raise BatchingError(
            f"the attention function {ATTENTION!r} belongs to continuous batching on quantized pages, and this call "
            "does not; wait until generate_batch() or the manager has ended, or use a copy of the model."
        )
    for name in ("dropout", "position_bias"):
        if isinstance(others.get(name), torch.Tensor) or others.get(name):
            raise BatchingError(f"attention over pages of many requests knows no {name}; use generate().")
    layer_idx: Any = module.layer_idx
    if not stored:
        cache.update(key, value, layer_idx, {})
    window = others.get("sliding_window", getattr(module, "sliding_window", None))
    output = cache.attend(
        query,
        key,
        value,
        layer_idx,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        sinks=s_aux,
        window=window or 0,
    )
    return output, None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask function that goes with it."""
