"""How ``generate`` comes to a cache of ours: by an object, by the name "kvquant", or by "quantized" and a backend.

Each function extends one of transformers and passes through whatever is not ours; ``install.py`` puts them in place.
"""

import functools
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from ..errors import UnsupportedModelError
from ..layers.static import check_before_generating
from .attention import NAME
from .heads import check_shards
from .layers import make_encoder_decoder
from .names import CACHE_ARGUMENT
from .run import CURRENT


def _tie(model: Any, cache: Any, cache_type: Any, model_kwargs: dict[str, Any], needed: int) -> None:
    """Tell a cache of ours, or the halves of an encoder-decoder's that are, which model and which padding they serve,
    and a static one how many tokens may come.

    Raises:
        CacheFullError: a static cache has no room for them.
        InterruptedForwardError: a static cache holds half of a step.
        UnsupportedModelError: the model would not use the cache, or has key/value heads that its processes cannot
            share.
        WrongModelError: it is another model's.
    """
    halves = (getattr(cache, "self_attention_cache", cache), getattr(cache, "cross_attention_cache", None))
    own = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
    for half, mask in zip(halves, (own, "attention_mask"), strict=True):
        if isinstance(half, cache_type):
            if not model._supports_default_dynamic_cache():
                raise UnsupportedModelError(
                    f"{type(model).__name__} does not use transformers' cache classes, so there is no KV cache to "
                    "quantize; generate without one."
                )
            check_shards(model)
            half.bind(model)
            half.set_padding(model_kwargs.get(mask))
            if half.max_length is not None:
                _check_static(model)
                check_before_generating(half.paged_layers, needed if mask == own else 0)
    if (run := CURRENT.get()) is not None:
        run.tie(cache, [half for half in halves if isinstance(half, cache_type)])


def _check_static(model: Any) -> None:
    """Refuse a static cache where the model looks for transformers' own by its class.

    Raises:
        UnsupportedModelError: it does (BLOOM in transformers 5.17).
    """
    method = type(model).prepare_inputs_for_generation
    if "StaticCache" in getattr(getattr(method, "__code__", None), "co_names", ()):
        raise UnsupportedModelError(
            f"{type(model).__name__} in this version of transformers prepares its inputs for StaticCache alone; leave "
            "static=True out, or install a newer transformers."
        )


def _with_length(model: Any, generation_config: Any, needed: int) -> dict[str, Any]:
    """The options of a cache, a copy; a static one gets room for ``needed`` tokens unless they say how many.

    As transformers does for its own static cache, never for fewer than in an earlier call: graphs of another length
    would have to be compiled anew.
    """
    options = dict(generation_config.cache_config or {})
    if options.get("static") and options.get("max_length") is None:
        wanted = (needed, generation_config.max_cache_len or 0, getattr(model, "_previous_max_cache_length", 0))
        options["max_length"] = model._previous_max_cache_length = max(wanted)
    return options


def prepare_cache(original: Callable[..., Any], cache_type: Any) -> Callable[..., Any]:
    """``GenerationMixin._prepare_cache_for_generation`` that also knows the name "kvquant"."""

    @functools.wraps(original)
    def prepare(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        given = model_kwargs.get(CACHE_ARGUMENT)
        wanted = generation_config.cache_implementation == NAME and generation_config.use_cache is not False
        if given is not None or not wanted:
            # transformers' own ways in: a cache that the user made, or cache_implementation="quantized".  Before 5.23
            # the latter takes "backend" out of the caller's dict, so it gets a copy.
            if generation_config.cache_config:
                options = generation_config.cache_config
                ours = generation_config.cache_implementation == "quantized" and options.get("backend") == NAME
                options = _with_length(self, generation_config, max_cache_length) if ours else dict(options)
                generation_config.cache_config = options
            result = original(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
            _tie(self, model_kwargs.get(CACHE_ARGUMENT), cache_type, model_kwargs, max_cache_length)
            return result
        cache = cache_type(self.config, **_with_length(self, generation_config, max_cache_length))
        if self.config.is_encoder_decoder:
            cache = make_encoder_decoder(cache, self.config, model_kwargs["encoder_outputs"][0].shape[1])
        _tie(self, cache, cache_type, model_kwargs, max_cache_length)
        if getattr(generation_config, "is_assistant", False):
            cache.activate_past_recording()
        model_kwargs[CACHE_ARGUMENT] = cache
        return None

    return prepare


def dispatch_backend(original: Callable[..., Any], cache_type: Any) -> Callable[..., Any]:
    """transformers' ``QuantizedCache``, except that ``backend="kvquant"`` makes ours."""

    def quantized_cache(backend: str, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> Any:
        if backend == NAME:
            return cache_type(config, *args, **kwargs)
        return original(backend, config, *args, **kwargs)

    return quantized_cache
