"""A cache that shows what a model stores in it, and stores nothing."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig


class ObservingCache(DynamicCache):
    """For one forward pass over a whole text: attention gets the keys and values as they came.

    Args:
        config: the model's config.
        observe: called with the index of the layer, its keys and its values, both ``[batch, heads, tokens, head_dim]``.
    """

    def __init__(self, config: PreTrainedConfig, observe: Callable[[int, torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__(config=config)
        self._observe = observe

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``Cache.update`` of an empty cache."""
        self._observe(layer_idx, key_states, value_states)
        return key_states, value_states
