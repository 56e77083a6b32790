"""A cache that shows what a model stores in it, and stores nothing."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig

from ..pages.queries import listen

_Queries = Callable[[int, torch.Tensor], object]


class _Layer:
    """Who is told of the queries of one layer."""

    def __init__(self, layer: int, tell: _Queries) -> None:
        self._layer, self._tell = layer, tell

    def saw(self, query: torch.Tensor) -> None:
        self._tell(self._layer, query)


class ObservingCache(DynamicCache):
    """For one forward pass over a whole text: attention gets the keys and values as they came.

    Args:
        config: the model's config.
        observe: called with the index of the layer, its keys and its values, both ``[batch, heads, tokens, head_dim]``.
        queries: called with the index of the layer whose keys they attend to and queries ``[batch, query_heads, tokens,
            head_dim]``, where attention shows them (``attention.py``); they come after their keys.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        observe: Callable[[int, torch.Tensor, torch.Tensor], None],
        queries: _Queries = lambda layer, query: None,
    ) -> None:
        super().__init__(config=config)
        self._observe, self._queries = observe, queries
        self._told: dict[int, _Layer] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``Cache.update`` of an empty cache."""
        self._observe(layer_idx, key_states, value_states)
        listen(key_states, self._told.setdefault(layer_idx, _Layer(layer_idx, self._queries)))
        return key_states, value_states
