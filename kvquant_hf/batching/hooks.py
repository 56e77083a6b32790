"""How continuous batching comes to quantized pages, put in place and restored.

Three ways in, and one thing to see to: that our name in a generation config never runs uncompressed.

    generate_batch(..., cache_implementation="kvquant", cache_config={...}), or the same in its generation config
    generate_batch(..., continuous_batching_config=QuantizedBatchingConfig(...))
    init_continuous_batching and continuous_batching_context_manager with either

transformers has no place to register a cache for it.  ``init_continuous_batching`` is what all of them call, and
``continuous_api.PagedAttentionCache`` is the name under which a processor makes its cache; both are extended.
"""

import copy
import functools
import importlib
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from packaging.version import Version
from transformers.generation import GenerationMixin
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..errors import BatchingError, KVQuantError, UnsupportedVersionError
from ..transformers_api.attention import NAME
from ..transformers_api.contract import BATCHING, broken
from .calls import ATTENTION, REFUSED

OLDEST = "5.23"
_API = "transformers.generation.continuous_batching.continuous_api"
_MARK = "_kvquant_hf_before"


def unsupported() -> str:
    """Why continuous batching cannot have quantized pages with this transformers; empty if it can."""
    found = Version(version("transformers"))
    if found.release[:2] < Version(OLDEST).release:
        return (
            f"continuous batching on quantized pages needs transformers {OLDEST} or newer, found {found}; "
            f"run: pip install 'transformers>={OLDEST}'"
        )
    if lost := broken(BATCHING):
        return (
            f"transformers {found} has no {'; no '.join(lost)}, which continuous batching on quantized pages relies "
            "on; generate() works, or install an older transformers."
        )
    return ""


def require_support() -> None:
    """Refuse where transformers is too old, or too new.

    Raises:
        UnsupportedVersionError: it is.
    """
    if reason := unsupported():
        raise UnsupportedVersionError(reason)


def _is_ours(config: Any) -> bool:
    """By its name: a transformers that is too old has no class to derive it from, and one that was made before a
    reload of the package counts."""
    return any(base.__name__ == "QuantizedBatchingConfig" for base in type(config).__mro__)


def _asked(generation_config: Any) -> dict[str, Any] | None:
    """The options of a generation config that asks for our pages; None if it does not."""
    options = dict(getattr(generation_config, "cache_config", None) or {})
    name = getattr(generation_config, "cache_implementation", None)
    if name == NAME:
        return options
    return options if name == "quantized" and options.pop("backend", None) == NAME else None


def _wanted(generation_config: Any, plain: Any, models: Any) -> Any:
    """The config of ours that a call asks for; None if it asks for none.

    Args:
        generation_config: of the call.
        plain: a config of transformers or of ours, or None.
        models: the model's own generation config, which says what the call's leaves open, as for ``generate``.

    Raises:
        UnsupportedVersionError: it does, and transformers is too old or too new.
        BatchingError: options stand in two places.
        UnknownPolicyError: an unknown policy or option.
    """
    plain = getattr(generation_config, "continuous_batching_config", None) if plain is None else plain
    options = _asked(models if getattr(generation_config, "cache_implementation", None) is None else generation_config)
    if options is None and not _is_ours(plain):
        return None
    require_support()
    if not _is_ours(plain):
        from .config import QuantizedBatchingConfig

        return QuantizedBatchingConfig.adopting(plain, options or {})
    if options:
        raise BatchingError(
            "the generation config has a cache_config and there is a QuantizedBatchingConfig beside it; give the "
            "options in one of them."
        )
    return plain


def extend_init(original: Callable[..., Any]) -> Callable[..., Any]:
    """``init_continuous_batching`` that also makes our manager."""

    @functools.wraps(original)
    def init_continuous_batching(
        self: Any,
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        generation_config_used = self.generation_config if generation_config is None else generation_config
        ours = _wanted(generation_config_used, continuous_batching_config, self.generation_config)
        kept = getattr(self, "_cached_continuous_batching_manager", None)
        kept_config = getattr(kept, "continuous_batching_config", None)
        if kept is not None and (ours is not None or _is_ours(kept_config)):
            _check_kept(kept_config, ours)
        if ours is None or kept is not None:
            return original(self, generation_config, continuous_batching_config, *args, **kwargs)
        from .manager import QuantizedBatchingManager

        if generation_config_used.eos_token_id is None:
            generation_config_used = copy.copy(generation_config_used)
            generation_config_used.eos_token_id = -1  # none, to the processor
        return QuantizedBatchingManager(self, generation_config_used, copy.copy(ours), *args, **kwargs)

    return init_continuous_batching


def _check_kept(kept: Any, wanted: Any) -> None:
    """Refuse a manager that was kept from an earlier call, where it would store otherwise than is asked for now.

    Raises:
        BatchingError: it would.
    """
    names = [config.policy.name if _is_ours(config) else "no quantized pages" for config in (kept, wanted)]
    same = _is_ours(kept) and _is_ours(wanted) and (kept.policy, kept.page_size) == (wanted.policy, wanted.page_size)
    if not same:
        raise BatchingError(
            f"the model has a manager from an earlier call, with {names[0]}, and this call asks for {names[1]}; call "
            "model.destroy_cached_continuous_batching_manager() before it."
        )


def extend_generate_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    """``generate_batch``, which drops arguments that it does not know: those that ask for our pages are heard, and a
    prompt that does not fit, and what ends the run, is an error."""

    @functools.wraps(original)
    def generate_batch(self: Any, inputs: Any, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in ("cache_implementation", "cache_config") if name in kwargs}
        if given:
            generation_config = copy.copy(self.generation_config if generation_config is None else generation_config)
            for name, value in given.items():
                setattr(generation_config, name, value)
        refused: list[KVQuantError] = []
        token = REFUSED.set(refused)
        try:
            results = original(self, inputs, generation_config, *args, **kwargs)
        finally:
            REFUSED.reset(token)
        if refused:
            raise refused[0]
        return results

    return generate_batch


def extend_cache(original: Any) -> Callable[..., Any]:
    """What a processor makes its cache with: ours for a config of ours."""

    @functools.wraps(original)
    def make(*args: Any, continuous_batching_config: Any, **kwargs: Any) -> Any:
        from .cache import QuantizedBatchingCache

        made: Any = QuantizedBatchingCache if _is_ours(continuous_batching_config) else original
        return made(*args, continuous_batching_config=continuous_batching_config, **kwargs)

    return make


def _owner(name: str) -> Any:
    """The class that has a method of ``GenerationMixin``."""
    return next((base for base in GenerationMixin.__mro__ if name in vars(base)), None)


def install() -> None:
    """Put everything in place; does nothing if it is.  Where transformers is too old or too new, the ways in are
    guarded, and nothing else."""
    owner = _owner("init_continuous_batching")
    if owner is None or hasattr(owner.init_continuous_batching, _MARK):
        return
    extended = [(owner, name, extend) for name, extend in _EXTENDED.items() if name in vars(owner)]
    supported = not unsupported()
    if supported:
        extended.append((importlib.import_module(_API), "PagedAttentionCache", extend_cache))
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in extended]
    for holder, name, extend in extended:
        setattr(holder, name, extend(getattr(holder, name)))
    setattr(owner.init_continuous_batching, _MARK, before)
    if supported:
        from .attention import batched_attention, no_mask

        AttentionInterface.register(ATTENTION, batched_attention)
        AttentionMaskInterface.register(ATTENTION, no_mask)


_EXTENDED = {"init_continuous_batching": extend_init, "generate_batch": extend_generate_batch}


def uninstall() -> None:
    """Restore what :func:`install` replaced; does nothing if nothing is."""
    owner = _owner("init_continuous_batching")
    for holder, name, value in getattr(getattr(owner, "init_continuous_batching", None), _MARK, ()):
        setattr(holder, name, value)
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(ATTENTION, None)
