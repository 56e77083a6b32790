"""Everything of transformers that the cache relies on, one row for each name; checked when the package is imported.

A new version of transformers is taken if every row holds there.  ``tests/test_contract.py`` sees to it that each row is
used and that each use has a row.
"""

import importlib
import inspect
from typing import Any, NamedTuple


class Row(NamedTuple):
    """``name``, dotted, in ``module``; a function has at least these ``parameters``, a table these keys (``a|b``: one
    of the two)."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The whole name."""
        return f"{self.module}.{self.name}"


_CACHE, _UTILS = "transformers.cache_utils", "transformers.generation.utils"
_MODELS, _MASKS = "transformers.modeling_utils", "transformers.masking_utils"
_FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
_ATTENTION = ("module", "query", "key", "value", "attention_mask")

CONTRACT = (
    # a cache, and what generate and models ask of one
    Row(_CACHE, "DynamicCache", ("config",)),
    Row("transformers.configuration_utils", "PreTrainedConfig.get_text_config", ("decoder",)),
    Row(_MODELS, "PreTrainedModel"),
    Row(_CACHE, "Cache.__init__", ("layers",)),
    Row(_CACHE, "Cache.update", ("key_states", "value_states", "layer_idx")),
    Row(_CACHE, "Cache.get_mask_sizes", ("query_length", "layer_idx")),
    Row(_CACHE, "Cache.get_seq_length"),
    Row(_CACHE, "Cache.crop", ("tokens_to_remove",)),
    Row(_CACHE, "Cache.reset"),
    Row(_CACHE, "Cache.activate_past_recording"),
    Row(_CACHE, "Cache.is_sliding"),
    Row(_CACHE, "EncoderDecoderCache.reset"),
    # layers
    Row(_CACHE, "CacheLayerMixin"),
    Row(_CACHE, "LinearAttentionCacheLayerMixin"),
    Row(_CACHE, "DYNAMIC_LAYER_TYPE_MAPPING"),
    Row(_CACHE, "STATIC_LAYER_TYPE_MAPPING"),
    Row(_CACHE, "get_layer_types_and_kwargs"),
    # generate
    Row("transformers.generation.configuration_utils", "ALL_CACHE_IMPLEMENTATIONS"),
    Row(_UTILS, "QuantizedCache"),
    Row(_UTILS, "GenerationMixin.generate"),
    Row(
        _UTILS,
        "GenerationMixin._prepare_cache_for_generation",
        ("generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length"),
    ),
    Row(_UTILS, "GenerationMixin.prepare_inputs_for_generation", ("input_ids", "cache|past_key_values")),
    Row(_UTILS, "GenerationMixin._update_model_kwargs_for_generation", ("outputs", "model_kwargs")),
    Row(_UTILS, "GenerationMixin._supports_default_dynamic_cache"),
    # attention functions and their masks
    Row("transformers.integrations.sdpa_attention", "sdpa_attention_forward", _ATTENTION),
    Row(_MODELS, "AttentionInterface.get_interface", ("attn_implementation", "default")),
    Row(_MODELS, "AttentionInterface.register", ("key", "value")),
    Row(_MODELS, "AttentionInterface._global_mapping", (*_FLASH, "flex_attention", "sdpa")),
    Row(_MASKS, "AttentionMaskInterface.register", ("key", "value")),
    Row(_MASKS, "AttentionMaskInterface._global_mapping"),
    Row(_MASKS, "sdpa_mask"),
    Row("transformers.utils.output_capturing", "_active_collector.get"),
)


def broken(rows: tuple[Row, ...] = CONTRACT) -> list[str]:
    """What is not as in ``rows`` with the installed transformers: the name, and what it lacks."""
    return [f"{row.path}{fault}" for row in rows if (fault := _fault(row)) is not None]


def _fault(row: Row) -> str | None:
    """What is wrong about a row; None if nothing is, empty if it does not exist."""
    try:
        found: Any = importlib.import_module(row.module)
        for part in row.name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return ""
    if not row.parameters:
        return None
    has = found if isinstance(found, dict) else inspect.signature(found).parameters
    lacking = [name for name in row.parameters if not any(other in has for other in name.split("|"))]
    return f" without {', '.join(lacking)}" if lacking else None
