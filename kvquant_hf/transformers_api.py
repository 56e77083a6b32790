"""Everything that depends on transformers' own signatures: the cache layer, the attention function, the patched names.

Tested range: 5.17 to 5.23.  When transformers changes, this is the file to change.

``install`` puts these in place, each of which passes through whatever is not ours, and ``uninstall`` restores them:

* attention function and mask function "kvquant" (the mask function must go with it: without one, padding is ignored);
* the attention function "sdpa" hands packed keys and values to ours, so that models need no setting;
* ``cache_implementation="kvquant"`` in the list of valid names and in ``generate``'s cache preparation;
* ``cache_implementation="quantized", cache_config={"backend": "kvquant", ...}``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, CacheLayerMixin, get_layer_types_and_kwargs
from transformers.generation import configuration_utils
from transformers.generation import utils as generation_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from .attention import attend
from .carrier import KVTensor, dense
from .errors import UnsupportedModelError
from .layer import PagedLayer

NAME = "kvquant"


# -- cache layers ------------------------------------------------------------------------------------------------------


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

    def offload(self) -> None:
        self.move(torch.device("cpu"))

    def prefetch(self) -> None:
        self.move(self.home)


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


# -- attention ---------------------------------------------------------------------------------------------------------

# Arguments of an attention call that change its result and that pages cannot honour.
_UNKNOWN_TO_PAGES = ("indices", "block_indices", "cache")


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function "kvquant"; arguments and result as transformers' ``sdpa_attention_forward``."""
    packed = isinstance(key, KVTensor) and isinstance(value, KVTensor)
    foreign = [name for name in _UNKNOWN_TO_PAGES if kwargs.get(name) is not None]
    if dropout > 0:
        foreign.append("dropout")
    special = softcap is not None or s_aux is not None
    if foreign or not (packed or special):
        reason = f"argument {foreign[0]!r}" if foreign else "keys or values were changed after the cache"
        options = {"softcap": softcap, "s_aux": s_aux, "position_bias": position_bias, "is_causal": is_causal}
        options = {name: option for name, option in options.items() if option is not None}
        return sdpa_attention_forward(
            module,
            query,
            dense(key, reason),
            dense(value, reason),
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            **options,
            **kwargs,
        )
    output = attend(
        query,
        key,
        value,
        mask=attention_mask,
        scale=scaling,
        causal=is_causal if is_causal is not None else getattr(module, "is_causal", True),
        softcap=softcap,
        sinks=s_aux,
        position_bias=position_bias,
    )
    return output.transpose(1, 2).contiguous(), None


def _route_packed(original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' "sdpa", except that packed keys and values go to :func:`attention_forward`."""

    def sdpa(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        function = attention_forward if isinstance(key, KVTensor) else original
        return function(module, query, key, value, *args, **kwargs)

    return sdpa


# -- generate ----------------------------------------------------------------------------------------------------------


def _prepare_cache(original: Callable[..., Any], cache_type: Any) -> Callable[..., Any]:
    """``GenerationMixin._prepare_cache_for_generation`` that also knows the name "kvquant"."""

    def prepare(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        given = model_kwargs.get("past_key_values")
        wanted = generation_config.cache_implementation == NAME and generation_config.use_cache is not False
        if given is not None or not wanted:
            # transformers' own ways in: a cache that the user made, or cache_implementation="quantized".  Before 5.23
            # the latter takes "backend" out of the caller's dict, so it gets a copy.
            if generation_config.cache_config:
                generation_config.cache_config = dict(generation_config.cache_config)
            result = original(self, generation_config, model_kwargs, *args, **kwargs)
            cache = model_kwargs.get("past_key_values")
            cache = getattr(cache, "self_attention_cache", cache)
            if isinstance(cache, cache_type):
                cache.bind(self)
            return result
        if not self._supports_default_dynamic_cache():
            raise UnsupportedModelError(
                f"{type(self).__name__} does not use transformers' cache classes, so there is no KV cache to quantize; "
                "leave cache_implementation out."
            )
        cache = cache_type(self.config, **(generation_config.cache_config or {}))
        cache.bind(self)
        if self.config.is_encoder_decoder:
            cache = EncoderDecoderCache(cache, DynamicCache(config=self.config.get_text_config(decoder=True)))
        if getattr(generation_config, "is_assistant", False):
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache
        return None

    return prepare


def _dispatch_backend(original: Callable[..., Any], cache_type: Any) -> Callable[..., Any]:
    """transformers' ``QuantizedCache``, except that ``backend="kvquant"`` makes ours."""

    def quantized_cache(backend: str, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> Any:
        if backend == NAME:
            return cache_type(config, *args, **kwargs)
        return original(backend, config, *args, **kwargs)

    return quantized_cache


_MARK = "_kvquant_hf_installed"


class _Installed(NamedTuple):
    """What was there before; kept on the patched method, so that a reloaded module finds it."""

    cache_type: type
    names: tuple[str, ...]
    prepare: Callable[..., Any]
    quantized: Any
    sdpa: Callable[..., Any]


def _installed() -> _Installed | None:
    return getattr(generation_utils.GenerationMixin._prepare_cache_for_generation, _MARK, None)


def install(cache_type: type) -> None:
    """Put everything in place (see the module's docstring); does nothing if it is.

    Args:
        cache_type: the cache class, called as ``cache_type(config, **cache_config)``.
    """
    current = _installed()
    if current is not None:
        if current.cache_type is cache_type:
            return
        uninstall()  # left by this package before a reload
    before = _Installed(
        cache_type=cache_type,
        names=configuration_utils.ALL_CACHE_IMPLEMENTATIONS,
        prepare=generation_utils.GenerationMixin._prepare_cache_for_generation,
        quantized=generation_utils.QuantizedCache,
        sdpa=AttentionInterface._global_mapping["sdpa"],
    )
    prepare = _prepare_cache(before.prepare, cache_type)
    setattr(prepare, _MARK, before)
    configuration_utils.ALL_CACHE_IMPLEMENTATIONS = (*before.names, NAME)
    generation_utils.GenerationMixin._prepare_cache_for_generation = prepare
    generation_utils.QuantizedCache = _dispatch_backend(before.quantized, cache_type)
    AttentionInterface.register("sdpa", _route_packed(before.sdpa))
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def uninstall() -> None:
    """Restore what :func:`install` replaced; does nothing if nothing is."""
    before = _installed()
    if before is None:
        return
    configuration_utils.ALL_CACHE_IMPLEMENTATIONS = before.names
    generation_utils.GenerationMixin._prepare_cache_for_generation = before.prepare
    generation_utils.QuantizedCache = before.quantized
    AttentionInterface.register("sdpa", before.sdpa)
    AttentionInterface._global_mapping.pop(NAME)
    AttentionMaskInterface._global_mapping.pop(NAME)
