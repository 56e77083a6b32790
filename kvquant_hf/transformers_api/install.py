"""What is extended in transformers, put in place and restored.

``install`` puts these in place:

* attention function and mask function "kvquant" (the mask function must go with it: without one, padding is ignored);
* the attention functions of other names, which hand packed keys and values to ours, so that models need no setting;
* ``cache_implementation="kvquant"`` in the list of valid names and in ``generate``'s cache preparation;
* ``cache_implementation="quantized", cache_config={"backend": "kvquant", ...}``;
* ``expand_kv`` of layers that cache latents, which hands packed latents to our attention (``latent.py``);
* a look at each call of ``generate``: a cache that was given and not used is said.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from transformers.generation import GenerationMixin, configuration_utils
from transformers.generation import utils as generation_utils
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from .attention import NAME, ROUTED, attention_forward, route, route_by_name
from .generate import dispatch_backend, prepare_cache
from .latent import extend_latents, restore_latents
from .run import keep_cache, watch_generate, watch_outputs

# Who has it, its name, and what takes its place, made of what was there and of our cache class.
_EXTENDED: tuple[tuple[Any, str, Callable[[Any, type], Any]], ...] = (
    (configuration_utils, "ALL_CACHE_IMPLEMENTATIONS", lambda names, _: (*names, NAME)),
    (generation_utils, "QuantizedCache", dispatch_backend),
    (GenerationMixin, "_prepare_cache_for_generation", prepare_cache),
    (GenerationMixin, "generate", lambda original, _: watch_generate(original)),
    (GenerationMixin, "prepare_inputs_for_generation", lambda original, _: keep_cache(original)),
    (GenerationMixin, "_update_model_kwargs_for_generation", lambda original, _: watch_outputs(original)),
    (AttentionInterface, "get_interface", lambda original, _: route_by_name(original)),
)
_MARK = "_kvquant_hf_installed"


class _Installed(NamedTuple):
    """What was there before; kept on a method that is extended, so that a reloaded module finds it."""

    cache_type: type
    extended: list[tuple[Any, str, Any]]
    attention: dict[str, Callable[..., Any]]


def _installed() -> _Installed | None:
    return getattr(GenerationMixin._prepare_cache_for_generation, _MARK, None)


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
        extended=[(owner, name, getattr(owner, name)) for owner, name, _ in _EXTENDED],
        attention={name: AttentionInterface._global_mapping[name] for name in ROUTED},
    )
    for owner, name, extend in _EXTENDED:
        setattr(owner, name, extend(getattr(owner, name), cache_type))
    setattr(GenerationMixin._prepare_cache_for_generation, _MARK, before)
    # Code that looks a function up without get_interface finds these.
    for name, function in before.attention.items():
        AttentionInterface.register(name, route(function))
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    extend_latents()


def uninstall() -> None:
    """Restore what :func:`install` replaced; does nothing if nothing is."""
    before = _installed()
    if before is None:
        return
    for owner, name, value in before.extended:
        setattr(owner, name, value)
    for name, function in before.attention.items():
        AttentionInterface.register(name, function)
    AttentionInterface._global_mapping.pop(NAME)
    AttentionMaskInterface._global_mapping.pop(NAME)
    restore_latents()
