"""Everything of transformers that the cache relies on, one row for each name; checked when the package is imported.

A new version of transformers is taken if every row holds there.  ``tests/test_contract.py`` sees to it that each row is
used and that each use has a row.
"""

import importlib
import inspect
from importlib.metadata import version
from typing import Any, NamedTuple

from ..errors import UnsupportedVersionError


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
    Row(_MODELS, "PreTrainedModel.tp_plan"),
    Row(_MODELS, "PreTrainedModel.tp_size"),
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

# What layers with latents rely on beside that.  Where it does not hold, latents are multiplied out, and it is said.
LATENTS = (
    Row("transformers.models.deepseek_v3.modeling_deepseek_v3", "DeepseekV3Attention.expand_kv", ("kv_nope", "k_rot")),
)

_BATCHING = "transformers.generation.continuous_batching"
_API, _PAGED = f"{_BATCHING}.continuous_api", f"{_BATCHING}.cache"
_BLOCKS, _FULL = f"{_BATCHING}.cache_allocators", "FullAttentionCacheAllocator"
_OF_A_REQUEST = ("request_id", "past_length", "query_length")

# What continuous batching relies on beside that.  Where a row does not hold, the package works and batching is refused.
BATCHING = (
    # the ways in
    Row(
        _API,
        "ContinuousMixin.init_continuous_batching",
        ("generation_config", "continuous_batching_config", "workload_hints"),
    ),
    Row(_API, "ContinuousMixin.generate_batch", ("inputs", "generation_config")),
    Row(
        _API,
        "PagedAttentionCache",
        ("config", "continuous_batching_config", "device", "distributed_helper", "dtype"),
    ),
    Row(
        "transformers.generation.configuration_utils",
        "ContinuousBatchingConfig",
        ("page_size", "num_blocks", "max_requests_per_batch"),
    ),
    # the manager
    Row(
        _BATCHING,
        "ContinuousBatchingManager",
        ("model", "generation_config", "continuous_batching_config", "workload_hints"),
    ),
    Row(_API, "ContinuousBatchingManager.switch_to_cb_friendly_attn", ("model", "auto_switch_to_flash")),
    Row(_API, "ContinuousBatchingManager.add_request", ("input_ids", "request_id", "max_new_tokens")),
    Row(_API, "ContinuousBatchingManager._create_batch_processor"),
    Row(_API, "ContinuousBatchingManager._generation_step"),
    Row(_API, "ContinuousBatchingManager._generation_loop_body", ("batch_processor", "bootstrapping")),
    Row(_API, "OutputRouter.fail_and_deliver", ("state", "error")),
    Row(f"{_BATCHING}.scheduler", "Scheduler.set_request_cancellation", ("request_id",)),
    Row(_MODELS, "PreTrainedModel.get_output_embeddings"),
    Row(_API, "ContinuousBatchingManager.start"),
    Row(_API, "ContinuousBatchingManager.stop"),
    Row(_MODELS, "PreTrainedModel.set_attn_implementation"),
    # each request's own settings
    Row("transformers.generation.configuration_utils", "GenerationConfig", ("kwargs",)),
    Row("transformers.generation.logits_process", "LogitsProcessorList"),
    Row(
        f"{_BATCHING}.cb_logits_processors",
        "ContinuousBatchingLogitsProcessorList.check_kwargs",
        ("kwargs",),
    ),
    Row(
        f"{_BATCHING}.model_runner",
        "ModelRunner.__init__",
        ("logit_processor", "cb_config", "inputs_and_outputs", "cache", "do_sample", "return_logprobs"),
    ),
    Row(f"{_BATCHING}.model_runner", "ModelRunner._sample", ("scores", "output_ids")),
    Row(_UTILS, "GenerationMixin._prepare_special_tokens", ("generation_config", "device")),
    Row(_UTILS, "GenerationMixin._get_logits_processor", ("generation_config", "input_ids_seq_length", "device")),
    # the cache
    Row(_PAGED, "PagedAttentionCache.can_store_request_tokens", ("state", "request_len", "dry_run")),
    Row(_PAGED, "PagedAttentionCache.search_prefix_match", ("request_id", "prompt_ids")),
    Row(_PAGED, "PagedAttentionCache.count_new_complete_blocks", ("state", "request_len")),
    Row(_PAGED, "PagedAttentionCache.prepare_fork_request", ("src_state", "dst_req_ids", "copy_src_and_dst")),
    Row(_PAGED, "PagedAttentionCache.perform_cache_copy", ("copy_src_and_dst",)),
    Row(
        _PAGED,
        "PagedAttentionCache.extend_read_and_write_indices",
        (*_OF_A_REQUEST, "read_index", "write_index"),
    ),
    Row(_PAGED, "PagedAttentionCache.update", ("key_states", "value_states", "layer_idx", "kwargs")),
    Row(f"{_BATCHING}.distributed", "DistributedHelper", ("tp_plan",)),
    Row(f"{_BATCHING}.utils", "find_head_dim"),
    Row(f"{_BATCHING}.utils", "find_num_key_value_heads"),
    # how much memory
    Row(
        _PAGED,
        "PagedAttentionMemoryHandler",
        ("config", "cb_config", "dtype", "bytes_per_sector", "tokens_per_sector", "bytes_per_block", "attn_types"),
    ),
    Row(_PAGED, "PagedAttentionMemoryHandler.num_sectors_from_config"),
    Row(_PAGED, "PagedAttentionMemoryHandler.bytes_per_cache_token"),
    Row(_PAGED, "PagedAttentionMemoryHandler.infer_max_batch_tokens_and_num_sectors"),
    # blocks
    Row(_BLOCKS, "CachePool", ("num_sectors", "num_allocators")),
    Row(_BLOCKS, "CachePool.free_blocks", ("index", "block_ids")),
    Row(_BLOCKS, "CachePool.get_free_blocks", ("index", "num_blocks")),
    Row(_BLOCKS, "CachePool.count_free_blocks", ("index",)),
    Row(_BLOCKS, "CachePool.num_free_sectors"),
    Row(
        _BLOCKS,
        f"{_FULL}._before_cache_tensor_init",
        ("index", "layer_indices", "tokens_per_page", "bytes_per_page", "allow_block_sharing"),
    ),
    Row(
        _BLOCKS,
        f"{_FULL}._after_cache_tensor_init",
        ("non_trash_bytes", "bytes_per_sector", "cache_tensor", "pool"),
    ),
    Row(
        _BLOCKS,
        f"{_FULL}.register_cache_tensor",
        ("bytes_per_sector", "non_trash_bytes", "cache_tensor", "pool"),
    ),
    Row(_BLOCKS, f"{_FULL}._compute_blocks_needed", ("allocated_blocks", "past_length", "query_length")),
    Row(_BLOCKS, f"{_FULL}.allocate_cache_to_request", _OF_A_REQUEST),
    Row(_BLOCKS, f"{_FULL}.acquire_prefix_blocks", ("request_id", "prefix_len", "block_ids")),
    Row(_BLOCKS, f"{_FULL}.count_shareable_blocks", ("source_request_id", "past_length")),
    Row(_BLOCKS, f"{_FULL}.count_non_shareable_blocks", ("source_request_id", "past_length")),
    Row(_BLOCKS, f"{_FULL}.fork_blocks", ("source_request_id", "dest_request_id", "past_length")),
    Row(_BLOCKS, f"{_FULL}.copy_blocks", ("source_block_ids", "dest_block_ids")),
    Row(_BLOCKS, f"{_FULL}.free_blocks", ("request_id", "no_cache")),
)

_TEXT, _PARAMS = "TextGenerationPipeline", ("preprocess_params", "forward_params", "postprocess_params")

# What ``pipeline`` relies on, checked when it is first used.
PIPELINE = (
    Row("transformers.pipelines", "pipeline", ("task", "model", "tokenizer", "pipeline_class", "model_kwargs")),
    Row("transformers.pipelines", f"{_TEXT}.preprocess"),
    Row("transformers.pipelines", f"{_TEXT}.postprocess"),
    Row("transformers.pipelines", f"{_TEXT}._forward", ("model_inputs",)),
    Row("transformers.pipelines", f"{_TEXT}._sanitize_parameters"),
    Row("transformers.pipelines", f"{_TEXT}.run_single"),
    Row("transformers.pipelines", f"{_TEXT}.get_iterator", ("inputs", "num_workers", "batch_size", *_PARAMS)),
    Row("transformers", "AutoTokenizer.from_pretrained"),
)
# And to batch its prompts continuously; where a row does not hold, it answers them one by one.
PIPELINE_BATCHING = (
    Row("transformers.pipelines", f"{_TEXT}._prepare_generate_kwargs", ("generate_kwargs",)),
    Row(_UTILS, "GenerationMixin._prepare_generation_config", ("generation_config",)),
    Row(
        _API, "ContinuousMixin.continuous_batching_context_manager", ("generation_config", "continuous_batching_config")
    ),
    Row(_API, "ContinuousBatchingManager.get_result", ("timeout",)),
    Row(_API, "ContinuousBatchingManager.is_running"),
)


def require(rows: tuple[Row, ...], what: str) -> None:
    """Refuse a transformers in which one of ``rows`` does not hold.

    Raises:
        UnsupportedVersionError: there is one.
    """
    if lost := broken(rows):
        raise UnsupportedVersionError(
            f"transformers {version('transformers')} has no {'; no '.join(lost)}, which {what} relies on; use "
            "generate(), or install an older transformers."
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
