"""Cache layers behind the methods that transformers calls on a layer, and which layers a model gets."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, CacheLayerMixin, get_layer_types_and_kwargs

from ..errors import UnsupportedModelError
from ..layer import PagedLayer


class QuantizedPagedLayer(PagedLayer, CacheLayerMixin):
    """A ``PagedLayer`` behind the methods that transformers calls on a layer."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.initialize(key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.append(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.clear()

    def crop(self, tokens_to_remove: int) -> None:
        count = -int(tokens_to_remove)  # some decoding loops pass a tensor
        if count < 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {-count}; use crop({count}).")
        self.drop(count)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select(torch.arange(self.batch_size).repeat_interleave(repeats))


def build_layers(config: PreTrainedConfig, make_layer: Callable[[], PagedLayer]) -> list[Any]:
    """One cache layer per decoder layer: ours for full attention, transformers' own for every other kind.

    Raises:
        UnsupportedModelError: the model has no full-attention layer.
    """
    decoder = config.get_text_config(decoder=True)
    types, kwargs = get_layer_types_and_kwargs(decoder)
    if isinstance(kwargs, dict):  # 5.17 returns one dict for all layers
        kwargs = [kwargs] * len(types)
    if "full_attention" not in types:
        raise UnsupportedModelError(
            f"model type {decoder.model_type!r} has no full-attention layer to quantize (its layers are "
            f"{', '.join(sorted(set(types)))}); use transformers' own cache."
        )
    return [
        make_layer() if kind == "full_attention" else DYNAMIC_LAYER_TYPE_MAPPING[kind](**kw)
        for kind, kw in zip(types, kwargs, strict=True)
    ]


def fingerprint(config: PreTrainedConfig) -> tuple[Any, ...]:
    """What tells two models apart by their decoder's config."""
    decoder = config.get_text_config(decoder=True)
    names = (
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    return tuple(getattr(decoder, name, None) for name in names)
