"""The options of continuous batching on quantized pages, checked together."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers.generation.configuration_utils import ContinuousBatchingConfig

from ..errors import BatchingError, UnknownPolicyError
from ..files.calibration import QParams
from ..options import check_options
from ..policies.table import PolicyLike, parse_policy
from ..triton_kernels.ops import Implementation

# What may stand in the ``cache_config`` of a generation config.
CACHE_OPTIONS = ("policy", "bits", "page_size", "prefill", "impl", "qparams", "max_bytes", "max_requests")


@dataclass
class QuantizedBatchingConfig(ContinuousBatchingConfig):
    """transformers' ``ContinuousBatchingConfig`` for quantized pages.

    All of its options mean what they mean there; ``num_blocks`` is a measure of memory there too: so many blocks of
    ``page_size`` tokens in the model's dtype, in which more quantized ones find room.

    Args:
        policy, bits: as for ``QuantizedPagedCache``; ``"auto"`` takes bits, and no ``kv_budget``.
        page_size: tokens per page and block, and the most tokens of a request that are exact; a multiple of 8.
        prefill: ``"exact"``: a prompt that is read in one step attends to its exact keys and values while they are
            stored; ``"quantized"``: it attends to what was stored, as one does that shares its first pages with an
            earlier prompt, so that both are answered alike.
        impl: as for ``QuantizedPagedCache``.
        qparams: as for ``QuantizedPagedCache``.
        max_bytes: bytes for all pages, sealed and open; instead of ``num_blocks`` and ``max_memory_percent``.
        max_requests: requests that may hold pages at a time; others wait.  Each has an open page in the model's dtype.
            By default as many of 256 tokens as find room, and at most 64.

    Raises:
        UnknownPolicyError: an unknown policy or option.
        BatchingError: an option of transformers that quantized pages cannot honour.

    Example:
        >>> config = kvquant_hf.QuantizedBatchingConfig(policy="int4", max_bytes=2_000_000_000)
        >>> model.generate_batch(prompts, continuous_batching_config=config)
    """

    policy: PolicyLike = "int4"
    page_size: int = 64
    prefill: Literal["exact", "quantized"] = "exact"
    impl: Implementation = "auto"
    qparams: str | os.PathLike[str] | QParams | None = None
    max_bytes: int | None = None
    max_requests: int | None = None
    bits: float | None = None
    max_blocks_per_request: int | None = 0  # of FlashAttention's block tables
    use_cuda_graph: bool | tuple[bool, bool] | None = False
    use_async_batching: bool | None = False
    auto_switch_to_flash: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy, self.bits = parse_policy(self.policy, self.bits), None  # a budget is in the policy now
        check_options({}, prefill=self.prefill, impl=self.impl)
        if not isinstance(self.page_size, int) or self.page_size < 8 or self.page_size % 8:
            raise UnknownPolicyError(f"page_size must be a positive multiple of 8, got {self.page_size!r}.")
        for name in ("max_bytes", "max_requests"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UnknownPolicyError(f"{name} must be a positive integer, got {value!r}.")
        if self.max_bytes is not None and self.num_blocks is not None:
            raise UnknownPolicyError("max_bytes and num_blocks are two ways to give one budget; leave one of them out.")
        self._refuse()

    def _refuse(self) -> None:
        """Refuse what quantized pages cannot honour, each with what is lost and the remedy.

        Raises:
            BatchingError: there is such an option.
        """
        graphs = any(self.cuda_graph_booleans) or self.q_padding_interval_size or self.kv_padding_interval_size
        compiled = self.varlen_compile_config or self.decode_compile_config or self.default_compile_level
        refused = {
            "cpu_offload_space": self.cpu_offload_space != 0
            and "a request that must make room is computed again instead of copied to the CPU and back",
            "use_cuda_graph (or a padding interval)": graphs
            and "each step makes its page table on the host, so that a step costs its launches; generate() with "
            'cache_config={"static": True} can be recorded',
            "use_async_batching": self.use_async_batching
            and "the host prepares a step after the one before it has ended",
            "torch.compile": compiled and "the model runs as it is",
            "max_blocks_per_request": self.max_blocks_per_request
            and "it belongs to FlashAttention's block tables, and pages have their own",
        }
        for option, lost in refused.items():
            if lost:
                raise BatchingError(
                    f"continuous batching on quantized pages does without {option}: {lost}; leave the option out."
                )

    @classmethod
    def adopting(cls, plain: ContinuousBatchingConfig | None, options: Mapping[str, Any]) -> "QuantizedBatchingConfig":
        """The config that ``options`` of a ``cache_config`` ask for, with everything else as in ``plain``.

        Args:
            plain: a config of transformers, or None for its defaults.  Its ``page_size`` counts if it is not the
                default, which is meant for dense pages.
            options: some of ``CACHE_OPTIONS``.

        Raises:
            UnknownPolicyError, BatchingError: see the class.
        """
        options = dict(options)
        if options.pop("sinks", None):
            raise BatchingError(
                "continuous batching keeps no first tokens exact, because a prefix that requests share is pages alone; "
                "leave sinks out, or use generate()."
            )
        unknown = [name for name in options if name not in CACHE_OPTIONS]
        if unknown:
            raise UnknownPolicyError(
                f"unknown cache option {', '.join(map(repr, unknown))} for continuous batching; "
                f"use {', '.join(CACHE_OPTIONS)}."
            )
        given = {}
        for field in dataclasses.fields(ContinuousBatchingConfig) if plain is not None else ():
            value = getattr(plain, field.name)
            if value != field.default and field.name != "block_size":  # which has become page_size
                given[field.name] = value
        return cls(**{**given, **options})
