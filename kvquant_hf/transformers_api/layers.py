"""Cache layers behind the methods that transformers calls on a layer, and which layers a model gets."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
    get_layer_types_and_kwargs,
)

from ..errors import InterruptedForwardError, RollbackError, UnsupportedModelError
from ..layers.paged import PagedLayer
from ..layers.sliding import SlidingPagedLayer
from ..layers.static import StaticPagedLayer
from ..pages.pool import LayerPool
from ..policies.table import KVPolicy
from .latent import know


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


class QuantizedSlidingLayer(SlidingPagedLayer, QuantizedPagedLayer):
    """A ``SlidingPagedLayer`` behind the methods that transformers calls on a layer."""

    is_sliding = True

    @property
    def _sliding_window_tensor(self) -> torch.Tensor:
        """The window, for those who iterate over a cache."""
        return torch.tensor(self.window)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self.first_of_next_step
        return self.length + query_length - first, first

    def get_max_length(self) -> int:
        return self.window

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.settle()


class QuantizedStaticLayer(StaticPagedLayer, QuantizedPagedLayer):
    """A ``StaticPagedLayer`` behind the methods that transformers calls on a layer."""

    is_compileable = True

    def get_seq_length(self) -> Any:
        """A scalar on the device once there are tokens, so that no graph depends on its value; 0 before."""
        return 0 if self.store is None else self.store.held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_length, 0

    def get_max_length(self) -> int:
        return self.max_length


class QuantizedStaticSlidingLayer(QuantizedStaticLayer):
    """The same for a layer with a window; transformers asks which layers' masks have one."""

    is_sliding = True


# From a cache's point of view a chunk is a window: only the mask differs, and that is transformers'.
_WINDOWED = ("sliding_attention", "chunked_attention")


def _kinds_of(config: PreTrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    """Kind and options of each layer of the decoder, as transformers names them."""
    types, kwargs = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    if isinstance(kwargs, dict):  # 5.17 returns one dict for all layers
        kwargs = [kwargs] * len(types)
    return list(zip(types, kwargs, strict=True))


def windows_of(config: PreTrainedConfig) -> list[int]:
    """Tokens that each layer with keys and values of its own sees; 0: all of them."""
    kinds = _kinds_of(config)
    paged = [(kind, options) for kind, options in kinds if kind == "full_attention" or kind in _WINDOWED]
    return [options["sliding_window"] if kind in _WINDOWED else 0 for kind, options in paged]


def build_layers(
    config: PreTrainedConfig,
    policies: Iterator[KVPolicy],
    arguments: tuple[Any, ...],
    pools: Iterator[LayerPool],
    quantize_windows: bool,
    max_length: int | None,
) -> list[Any]:
    """One cache layer per decoder layer: ours where there are keys and values, transformers' own for other kinds.

    Args:
        config: the model's config.
        policies: a policy for each layer of ours.
        arguments: those of ``PagedLayer`` between its policy and its pool.
        pools: a pool for each layer of ours.
        quantize_windows: whether layers with a window or in chunks are ours too.
        max_length: tokens for which static layers reserve memory; None for layers that grow.

    Raises:
        UnsupportedModelError: no layer could be ours.
    """
    know(config)
    kinds = _kinds_of(config)
    layers: list[Any] = []
    for kind, options in kinds:
        window = options["sliding_window"] if kind in _WINDOWED else 0
        if kind != "full_attention" and not (window and quantize_windows):
            reserved = {} if max_length is None else {"max_cache_len": max_length}
            layers.append(
                (STATIC_LAYER_TYPE_MAPPING if reserved else DYNAMIC_LAYER_TYPE_MAPPING)[kind](**reserved, **options)
            )
        elif max_length is not None:
            kind_of_layer = QuantizedStaticSlidingLayer if window else QuantizedStaticLayer
            layers.append(kind_of_layer(max_length, window, next(policies), *arguments))
        else:
            drawing = (next(policies), *arguments, next(pools))
            layers.append(QuantizedSlidingLayer(window, *drawing) if window else QuantizedPagedLayer(*drawing))
    if not any(isinstance(layer, PagedLayer) for layer in layers):
        types = {kind for kind, _ in kinds}
        remedy = "sliding='quantized'" if any(kind in _WINDOWED for kind in types) else "transformers' own cache"
        raise UnsupportedModelError(
            f"model type {config.get_text_config(decoder=True).model_type!r} has no layer to quantize (its layers are "
            f"{', '.join(sorted(types))}); use {remedy}."
        )
    first = next(layer for layer in layers if isinstance(layer, PagedLayer))
    if isinstance(first, StaticPagedLayer):
        first.leads = True
    return layers


def check_crop(layers: list[Any], count: int) -> None:
    """Refuse to take back the last ``count`` tokens before any layer has changed.

    Raises:
        RollbackError: a layer does not hold what came before them.
    """
    for layer in layers:
        linear = isinstance(layer, LinearAttentionCacheLayerMixin)
        if isinstance(layer, PagedLayer):
            layer.check_drop(count)
        elif linear and not any(layer.has_previous_state.values()):
            pass  # nothing in it
        elif linear and not layer.is_croppable:
            raise RollbackError(
                f"{type(layer).__name__} keeps one state for all tokens and cannot take back {count} of them; call "
                "cache.reset() and read the text again."
            )
        elif not getattr(layer, "record_past", True) and (linear or layer.get_seq_length() >= layer.get_max_length()):
            raise RollbackError(
                f"{type(layer).__name__} has not kept what came before the last {count} tokens; call "
                "cache.activate_past_recording() before the tokens that may be taken back."
            )


def check_rollback(layers: list[Any], level: int) -> None:
    """Refuse to take layers back to ``level`` tokens where that cannot be done, or not be known.

    Raises:
        InterruptedForwardError: a layer of transformers' own is ahead, or does not count its tokens.
    """
    for layer in layers:
        if isinstance(layer, PagedLayer):
            continue
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            ahead = any(layer.has_previous_state.values())
        else:
            ahead = isinstance(layer, CacheLayerMixin) and layer.get_seq_length() > level
        if ahead:
            raise InterruptedForwardError(
                f"{type(layer).__name__} cannot be taken back to {level} tokens; call cache.reset()."
            )


def make_encoder_decoder(cache: Any, config: PreTrainedConfig, read: int) -> EncoderDecoderCache:
    """``cache`` for self attention, and one with the same options for cross attention, which is filled once.

    Args:
        cache: an empty ``QuantizedPagedCache``.
        config: the model's config.
        read: tokens that the encoder has read.
    """
    cross: Any = copy.deepcopy(cache)  # empty: nothing is shared, counters included
    if cache.max_length is not None:
        cross.max_length = read
        for layer in cross.paged_layers:
            layer.max_length = read
    if any(cache.is_sliding):
        # Such models replace the cross half by an object of its class with arguments of DynamicCache (T5Gemma).
        cross = DynamicCache(config=config.get_text_config(decoder=True))
    return EncoderDecoderCache(cache, cross)
