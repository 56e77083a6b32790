"""``QuantizedPagedCache``: what users construct and ``generate`` fills."""

import copy
import weakref
from collections import Counter
from typing import Any, Literal

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from .errors import InterruptedForwardError, OutOfPages, UnknownPolicyError, WrongModelError
from .layer import PagedLayer, StepGuard
from .policy import PolicyLike
from .pools import PagePools
from .report import CacheReport, CallLog
from .steps import Rotation, StepPlan
from .store import PagedStore
from .transformers_api import QuantizedPagedLayer, build_layers, fingerprint
from .triton_kernels.ops import IMPLEMENTATIONS, Implementation


class QuantizedPagedCache(DynamicCache):
    """A KV cache stored in compressed pages, for any place that takes a transformers ``Cache``.

    Full-attention layers are paged and quantized; layers of other kinds keep transformers' own cache.

    Args:
        config: the model's config.
        policy: a name (``"int4"``), ``"<keys>/<values>"``, one of LMDeploy's integers, or a ``KVPolicy``; by default
            that of ``pool``, or ``"int4"``.
        page_size: tokens per page, and the most tokens that are held exact; a multiple of 8; by default that of
            ``pool``, or 64.
        prefill: ``"exact"``: the first prompt attends to its exact keys and values while they are stored;
            ``"quantized"``: it attends to what was stored, which is what accuracy should be measured with.
        impl: what works on the pages: ``"triton"`` (GPU kernels), ``"reference"`` (plain torch), or ``"auto"``: kernels
            on a GPU, else plain torch; the report says what ran.  A forward pass raises ``ImplementationError`` where
            ``"triton"`` cannot run.
        max_pages: pages that each layer may have; ``max_bytes``: bytes of the packed pages of all layers, reserved
            ones included (open pages and page tables, which do not grow with the context, are not).  A step that needs
            more raises ``OutOfPages`` before it changes anything.  Forks (``copy.deepcopy``) share the budget.
        pool: a ``PagePools`` that several caches of one model draw from, with a budget of its own.
        offload: keep the pages in the CPU's memory and bring each layer's to the device ahead of its turn.

    Raises:
        UnknownPolicyError: unknown policy, codec or option.
        PoolMismatchError: ``pool`` was made for something else, or has the options that were given beside it.
        UnsupportedModelError: no full-attention layer in the model.

    Example:
        >>> cache = QuantizedPagedCache(model.config, policy="int4")
        >>> model.generate(**inputs, past_key_values=cache)
        >>> print(cache.report())
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        policy: PolicyLike | None = None,
        *,
        page_size: int | None = None,
        prefill: Literal["exact", "quantized"] = "exact",
        impl: Implementation = "auto",
        max_pages: int | None = None,
        max_bytes: int | None = None,
        pool: PagePools | None = None,
        offload: bool | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise UnknownPolicyError(
                f"unknown cache option {', '.join(map(repr, unknown))}; use policy, page_size, prefill, impl, "
                "max_pages, max_bytes, pool or offload."
            )
        if prefill not in ("exact", "quantized"):
            raise UnknownPolicyError(f"unknown prefill {prefill!r}; use 'exact' or 'quantized'.")
        if impl not in IMPLEMENTATIONS:
            raise UnknownPolicyError(f"unknown impl {impl!r}; use {', '.join(map(repr, IMPLEMENTATIONS))}.")
        options: dict[str, Any] = {"policy": policy, "page_size": page_size, "offload": offload}
        options |= {"max_pages": max_pages, "max_bytes": max_bytes}
        options = {name: value for name, value in options.items() if value is not None}
        self.pools = PagePools(config, **options) if pool is None else pool.check(config, **options)
        self._pools_shared = pool is not None
        self.policy, self.page_size = self.pools.policy, self.pools.page_size
        self.prefill = prefill
        self.impl = impl
        self._log = CallLog()
        guard = StepGuard()
        layer_pools = self.pools.layer_pools()
        self._plan = StepPlan(self.pools.budget)
        self._rotation = Rotation()

        def make_layer() -> PagedLayer:
            options = (self.policy, self.page_size, prefill == "exact", guard, self._log, impl)
            return QuantizedPagedLayer(*options, next(layer_pools))

        # DynamicCache only for isinstance checks inside transformers; its constructor would build its own layers.
        Cache.__init__(self, layers=build_layers(config, make_layer))
        self._fingerprint = fingerprint(config)
        self._model: weakref.ref[PreTrainedModel] | None = None

    @property
    def paged_layers(self) -> list[PagedLayer]:
        """The layers that are stored in pages."""
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    @property
    def stores(self) -> list[PagedStore]:
        """The stores of the paged layers that hold something."""
        return [layer.store for layer in self.paged_layers if layer.store is not None]

    def bind(self, model: PreTrainedModel) -> None:
        """Tie the cache to ``model``; ``generate`` does this.

        Raises:
            WrongModelError: the cache was made for another kind of model, or filled by another model.
        """
        bound = None if self._model is None else self._model()
        if fingerprint(model.config) != self._fingerprint:
            raise WrongModelError(
                f"this cache was made for the config {self._fingerprint}, the model has {fingerprint(model.config)}; "
                "make a cache from this model's config."
            )
        if bound is not None and bound is not model and self.get_seq_length() > 0:
            raise WrongModelError(
                "this cache was filled by another model; call cache.reset() or make a new cache for this one."
            )
        self._model = weakref.ref(model)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``Cache.update``.

        Raises:
            OutOfPages: the budget has no pages for this step; the cache is as it was before the step, in all layers.
        """
        self._plan.enter(self.layers, layer_idx, key_states.shape[0], key_states.shape[2])
        if self.pools.offload and isinstance(self.layers[layer_idx], PagedLayer):
            self._rotation.enter(self.layers, layer_idx)
        try:
            updated = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except OutOfPages:
            self._plan.undo(self.layers)
            raise
        self._plan.leave(self.layers, layer_idx)
        return updated

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As ``Cache.get_mask_sizes``, which models call before a step: those with layers of other kinds, which change
        without ``update``, learn here that there are no pages for it.

        Raises:
            OutOfPages: see :meth:`update`.
        """
        paged = self.paged_layers
        if self.pools.budget.bounded and len(paged) < len(self.layers) and paged[0].store is not None:
            self._plan.begin(self.layers, paged[0].batch_size, query_length)
        return super().get_mask_sizes(query_length, layer_idx)

    def reset(self) -> None:
        """Drop all tokens and give the memory back; the cache can be used again, with any batch size."""
        self._plan.end(self.layers)
        for layer in self.layers:
            layer.reset()
        fresh = StepGuard()
        for layer in self.paged_layers:
            layer.guard = fresh

    def rollback(self) -> int:
        """Drop the tokens that an interrupted forward pass left in some layers only.

        Returns:
            Tokens held afterwards.

        Raises:
            InterruptedForwardError: a layer that is not paged is ahead and cannot be cut; ``reset()`` then.
        """
        level = min(layer.length for layer in self.paged_layers)
        ahead = [layer for layer in self.layers if not isinstance(layer, PagedLayer) and layer.get_seq_length() > level]
        if ahead:
            raise InterruptedForwardError(
                f"{type(ahead[0]).__name__} cannot be taken back to {level} tokens; call cache.reset()."
            )
        for layer in self.paged_layers:
            layer.drop(layer.length - level)
        return level

    def report(self) -> CacheReport:
        """What the cache holds, in bytes measured on its tensors, and what ran on it."""
        stores = self.stores
        prints = [store.footprint() for store in stores]
        tokens = max((store.length for store in stores), default=0)
        others = [layer for layer in self.layers if not isinstance(layer, PagedLayer)]
        unused = 0 if self._pools_shared else sum(p.unused for p in prints)
        per_page = [store.elements_per_token() * store.batch_size for store in stores]
        return CacheReport(
            policy=self.policy.name,
            page_size=self.page_size,
            tokens=tokens,
            batch_size=max((store.batch_size for store in stores), default=0),
            paged_layers=len(self.paged_layers),
            other_layers=dict(Counter(type(layer).__name__ for layer in others)),
            bytes=sum(p.total - p.unused for p in prints) + unused,
            packed_bytes=sum(p.packed for p in prints),
            open_page_bytes=sum(p.open_page for p in prints),
            unused_bytes=unused,
            shared_bytes=sum(p.shared for p in prints),
            holders=max((p.holders for p in prints), default=0),
            devices=dict(sum((store.devices() for store in stores), Counter())),
            other_bytes=sum(_dense_bytes(layer) for layer in others),
            dense_bytes=sum(store.dense_bytes() for store in stores),
            dtype=str(stores[0].dtype).removeprefix("torch.") if stores else "",
            elements=sum(n * store.length for n, store in zip(per_page, stores, strict=True)),
            sealed_elements=sum(
                n * store.sealed_pages * self.page_size for n, store in zip(per_page, stores, strict=True)
            ),
            reopened_pages=sum(store.reopened_pages for store in stores),
            implementation=" and ".join(sorted(self._log.paged)),
            implementation_reason=self._log.reason,
            paged_calls=self._log.paged.total(),
            prefill_calls=self._log.prefill,
            fallback_calls=sum(self._log.fallbacks.values()),
            fallback_reasons=dict(self._log.fallbacks),
        )

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()

    def __repr__(self) -> str:
        report = self.report()
        return f"{type(self).__name__}(policy={report.policy!r}, tokens={report.tokens}, bytes={report.bytes})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedPagedCache":
        # A copy of the layers forks their pages; the model that filled them stays the same.
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            twin.__dict__[name] = value if name == "_model" else copy.deepcopy(value, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # The model is no part of a saved cache.
        return self.__dict__ | {"_model": None}


class Int8PagedCache(QuantizedPagedCache):
    """``QuantizedPagedCache`` with policy ``"int8"``."""

    def __init__(self, config: PreTrainedConfig, **options: Any) -> None:
        super().__init__(config, "int8", **options)


class Int4PagedCache(QuantizedPagedCache):
    """``QuantizedPagedCache`` with policy ``"int4"``."""

    def __init__(self, config: PreTrainedConfig, **options: Any) -> None:
        super().__init__(config, "int4", **options)


class TurboQuantPagedCache(QuantizedPagedCache):
    """``QuantizedPagedCache`` with policy ``"turboquant"``."""

    def __init__(self, config: PreTrainedConfig, **options: Any) -> None:
        super().__init__(config, "turboquant", **options)


def _dense_bytes(layer: Any) -> int:
    """Bytes of a layer of transformers' own: keys and values, and the tensors in its dicts of states."""
    held = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    held += [x for value in vars(layer).values() if isinstance(value, dict) for x in value.values()]
    return sum(x.nbytes for x in held if isinstance(x, torch.Tensor))
