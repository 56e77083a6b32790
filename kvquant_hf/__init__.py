"""Quantized, paged KV caches for transformers' ``generate``.

    import kvquant_hf
    model.generate(**inputs, cache_implementation="kvquant", cache_config={"policy": "int4"})
    model.generate(**inputs, cache=kvquant_hf.QuantizedPagedCache(model.config, policy="int4"))
    kvquant_hf.pipeline("Qwen/Qwen2.5-7B-Instruct", policy="int4")(["Hi, please introduce yourself", "Shanghai is"])

Before transformers 5.24 the second's ``cache`` is ``past_key_values``.  Importing the package enables it;
``disable()`` puts transformers back exactly as it was.
"""

from .versions import check_version_on_import

check_version_on_import()  # before anything is imported from transformers

from typing import TYPE_CHECKING, Any

from .batching import hooks
from .cache import QuantizedPagedCache
from .policies.table import POLICIES, KVPolicy, LayerwisePolicy
from .pools import PagePools
from .presets import Int4PagedCache, Int8PagedCache, TurboQuantPagedCache
from .transformers_api.install import install, uninstall

if TYPE_CHECKING:
    from .batching.config import QuantizedBatchingConfig
    from .pipelines import pipeline

__all__ = [
    "POLICIES",
    "Int4PagedCache",
    "Int8PagedCache",
    "KVPolicy",
    "LayerwisePolicy",
    "PagePools",
    "QuantizedPagedCache",
    "TurboQuantPagedCache",
    "disable",
    "enable",
    "pipeline",
]
if not hooks.unsupported():  # ``import *`` works with any version
    __all__ += ["QuantizedBatchingConfig"]
__version__ = "0.1.0"


def enable() -> None:
    """Make ``cache_implementation="kvquant"`` and the attention function "kvquant" known to transformers, for
    ``generate`` and for continuous batching.

    Does nothing when already enabled.
    """
    install(QuantizedPagedCache)
    hooks.install()


def disable() -> None:
    """Restore everything that :func:`enable` changed in transformers."""
    hooks.uninstall()
    uninstall()


def __getattr__(name: str) -> Any:
    """What is imported when it is first used: ``pipeline``, which needs more of transformers than a cache does, and
    ``QuantizedBatchingConfig``, whose base not every version has as we need it."""
    if name == "pipeline":
        from .pipelines import pipeline

        return pipeline
    if name != "QuantizedBatchingConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    hooks.require_support()
    from .batching.config import QuantizedBatchingConfig

    return QuantizedBatchingConfig


enable()
