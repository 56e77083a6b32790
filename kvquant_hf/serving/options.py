"""What a server is asked for."""

import os
from dataclasses import dataclass
from typing import Any

from ..batching.config import QuantizedBatchingConfig
from ..errors import ServingError
from ..policies.table import PolicyLike

DEFAULT_SHARE = 0.5  # of the memory that is free


@dataclass(frozen=True)
class ServeOptions:
    """The options of ``kvquant serve``.

    Args:
        policy, page_size, prefill, qparams: as for ``QuantizedPagedCache``; a budget of ``"auto"`` is in the policy.
        kv_budget: bytes of all pages (int), or a share of the memory that is free (float); None: half of it.
        max_concurrent: requests that are computed at a time; None: as many of 256 tokens as find room, at most 64.
        queue: requests that may wait beside them.
        max_batch_tokens: tokens of a step.  Longer prompts are read in chunks, between which others get their tokens.
        max_tokens: new tokens of a request that does not say how many.
        continuous_batching: whether requests are batched; otherwise they are answered in turn.
        api_key: what requests must bear, or None.
        cors: whether pages of other origins may ask.
        allow_any_model: whether a request may name another model, which is then loaded.

    Raises:
        ServingError: a value makes no sense.
    """

    policy: PolicyLike = "int4"
    page_size: int = 64
    prefill: str = "exact"
    qparams: str | os.PathLike[str] | None = None
    kv_budget: int | float | None = None
    max_concurrent: int | None = None
    queue: int = 128
    max_batch_tokens: int = 1024
    max_tokens: int = 1024
    continuous_batching: bool = True
    api_key: str | None = None
    cors: bool = False
    allow_any_model: bool = False

    def __post_init__(self) -> None:
        budget = self.kv_budget
        if isinstance(budget, float) and not 0 < budget < 1:
            raise ServingError(f"a KV budget is bytes, or a share between 0 and 1 of the free memory; got {budget}.")
        if budget is not None and budget <= 0:
            raise ServingError(f"a KV budget must be positive, got {budget}.")
        least = {"max_concurrent": 1, "queue": 0, "max_batch_tokens": 1, "max_tokens": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ServingError(f"{name} must be at least {smallest}, got {value}.")
        alone = [name for name in ("kv_budget", "max_concurrent") if getattr(self, name) is not None]
        if alone and not self.continuous_batching:
            raise ServingError(
                f"{' and '.join(alone)} bound what is batched, and requests are answered in turn; leave it out, or "
                "serve with continuous batching."
            )
        if self.api_key is not None and not self.api_key.strip():
            raise ServingError("the API key is empty; leave it out, or give one.")

    def cache_options(self) -> dict[str, Any]:
        """Arguments of ``QuantizedPagedCache``."""
        return {
            "policy": self.policy,
            "page_size": self.page_size,
            "prefill": self.prefill,
            "qparams": self.qparams,
        }

    def batching_config(self) -> QuantizedBatchingConfig:
        """The config of the batching manager.

        Raises:
            UnknownPolicyError, QParamsError: an option of the cache is unknown.
        """
        budget: dict[str, Any] = {"max_memory_percent": DEFAULT_SHARE}
        if self.kv_budget is not None:
            name = "max_bytes" if isinstance(self.kv_budget, int) else "max_memory_percent"
            budget = {name: self.kv_budget}
        return QuantizedBatchingConfig(
            **self.cache_options(),
            **budget,
            max_requests=self.max_concurrent,
            max_batch_tokens=self.max_batch_tokens,
        )
