"""``QuantizedPagedCache``: what users construct and ``generate`` fills."""

import copy
import os
import weakref
from typing import Any, Literal

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from .errors import OutOfPages, WrongModelError
from .files.cache import load_cache, save_cache
from .files.calibration import QParams, hand_over
from .layers.guard import StepGuard
from .layers.paged import PagedLayer
from .layers.steps import Rotation, StepPlan
from .options import check_options, check_sinks, check_static
from .pages.store import PagedStore
from .policies.fingerprint import fingerprint
from .policies.table import AnyPolicy, PolicyLike
from .pools import PagePools
from .reports.calls import CallLog
from .reports.inventory import take_inventory
from .reports.report import CacheReport
from .transformers_api.layers import build_layers, check_crop, check_rollback
from .triton_kernels.ops import Implementation


class QuantizedPagedCache(DynamicCache):
    """A KV cache stored in compressed pages, for any place that takes a transformers ``Cache``.

    Layers with full attention and with a sliding window are paged and quantized; layers of other kinds keep
    transformers' own cache.

    Args:
        config: the model's config.
        policy: a name (``"int4"``), ``"<keys>/<values>"``, one of LMDeploy's integers, a ``KVPolicy``, or by layer: a
            ``LayerwisePolicy`` or a file of ``kvquant tune``; by default that of ``pool``, or ``"int4"``.  ``"auto"``:
            the most accurate of ours within ``bits`` per element of full pages (``"auto:3.5"``), or ``kv_budget`` bytes
            (``"2GiB"``; a ``max_bytes`` too) for ``max_length`` tokens, by default as many as the model has positions.
        page_size: tokens per page, and the most tokens that are held exact; a multiple of 8; by default that of
            ``pool``, or 64.
        prefill: ``"exact"``: the first prompt attends to its exact keys and values while they are stored;
            ``"quantized"``: it attends to what was stored, which is what accuracy should be measured with.
        impl: what works on the pages: ``"triton"`` (GPU kernels), ``"cpu"`` (compiled at first use), ``"reference"``
            (plain torch), or ``"auto"``: the device's kernels where they run, else plain torch; the report says what
            ran.  A forward pass raises ``ImplementationError`` where the kernels asked for cannot run.
        sinks: first tokens of each sequence that are kept in the model's dtype beside their page, which quantization
            would cost most; fewer than a page.  By default 1 with our own codecs, 0 with ``exact`` and with formulae of
            LMDeploy.
        sliding: layers with a sliding window or in chunks: ``"quantized"``: pages of the last window of tokens;
            ``"exact"``: transformers' own layer.
        max_pages: pages that each layer may have; ``max_bytes``: bytes of the packed pages of all layers, reserved
            ones included (open pages and page tables, which do not grow with the context, are not).  A step that needs
            more raises ``OutOfPages`` before it changes anything.  Forks (``copy.deepcopy``) share the budget.
        pool: a ``PagePools`` that several caches of one model draw from, with a budget of its own.
        offload: keep the pages in the CPU's memory and bring each layer's to the device ahead of its turn.
        qparams: what ``kvquant qparams`` wrote, a folder or a file, or a ``calibration.QParams``: for ``int8-static``,
            and for policies that round keys by queries, such as ``kv3``, what is known of these beforehand.
        static: reserve everything for ``max_length`` tokens with the first prompt, for ``torch.compile`` and CUDA
            graphs: ``generate`` compiles by itself on a GPU.  More tokens raise ``CacheFullError``.

    Raises:
        UnknownPolicyError: unknown policy, codec or option.  QParamsError: ``qparams`` missing, unreadable, not taken.
        PoolMismatchError: ``pool`` was made for something else, or has the options that were given beside it.
        UnsupportedModelError: no layer of the model can be quantized.
        WrongModelError: a policy by layer that is for another model.

    Example:
        >>> cache = QuantizedPagedCache(model.config, policy="int4")
        >>> model.generate(**inputs, cache=cache)  # before transformers 5.24: past_key_values=cache
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
        sliding: Literal["quantized", "exact"] = "quantized",
        sinks: int | None = None,
        max_pages: int | None = None,
        max_bytes: int | None = None,
        pool: PagePools | None = None,
        offload: bool | None = None,
        qparams: str | os.PathLike[str] | QParams | None = None,
        static: bool = False,
        max_length: int | None = None,
        bits: float | None = None,
        kv_budget: int | str | None = None,
        **unknown: Any,
    ) -> None:
        check_options(unknown, prefill=prefill, impl=impl, sliding=sliding)
        dynamic = {"max_pages": max_pages, "max_bytes": max_bytes, "kv_budget": kv_budget, "offload": offload}
        self.max_length = check_static(static, max_length, dynamic | {"pool": pool})
        options: dict[str, Any] = dynamic | {"policy": policy, "page_size": page_size, "bits": bits}
        options |= {} if static else {"max_length": max_length}
        options = {name: value for name, value in options.items() if value is not None}
        self.pools = PagePools(config, **options) if pool is None else pool.check(config, **options)
        self._pools_shared = pool is not None
        self.policy, self.page_size = self.pools.policy, self.pools.page_size
        self.prefill, self.impl, self.sliding = prefill, impl, sliding
        self.sinks = check_sinks(sinks, self.page_size)
        self._log = CallLog()
        self._plan, self._rotation = StepPlan(self.pools.budget), Rotation()
        self._planned = not static and (self.pools.budget.bounded or self.pools.offload)
        arguments = (self.page_size, prefill == "exact", StepGuard(), self._log, impl, self.sinks)
        policies, pools = self.policy.by_layer(), self.pools.layer_pools()
        layers = build_layers(config, policies, arguments, pools, sliding == "quantized", self.max_length)
        self._fingerprint = fingerprint(config)
        self.qparams = hand_over(qparams, self.policy.name, layers, self._fingerprint)
        # DynamicCache only for isinstance checks inside transformers; its constructor would build its own layers.
        Cache.__init__(self, layers=layers)
        self.policy.check_layers(len(self.paged_layers))
        # reset() puts copies of these in place: before 5.23 some of transformers' layers keep their length.
        self._unused = {i: copy.deepcopy(x) for i, x in enumerate(layers) if not isinstance(x, PagedLayer)}
        self._latent_rank = getattr(config.get_text_config(decoder=True), "kv_lora_rank", None)
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

    def set_padding(self, attention_mask: torch.Tensor | None) -> None:
        """Say which tokens are padding, so that they take no part in the scales of their pages; ``generate`` does this.
        What is attended to is not decided here: the model needs the mask as well.

        Args:
            attention_mask: ``[batch, tokens]``, 0 where a token is padding; for the tokens held and those to come,
                counted from the first.  None: no padding.
        """
        padding = None
        if attention_mask is not None and attention_mask.dim() == 2 and not bool(attention_mask.all()):
            padding = attention_mask.eq(0).cpu().numpy()
        for layer in self.paged_layers:
            layer.padding = padding

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``Cache.update``.

        Raises:
            OutOfPages: the budget has no pages for this step; the cache is as it was before the step, in all layers.
        """
        if not self._planned:  # nor anything that a graph should follow
            return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
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
        if self.pools.budget.bounded:
            paged = self.paged_layers
            if len(paged) < len(self.layers) and paged[0].store is not None:
                self._plan.begin(self.layers, paged[0].batch_size, query_length)
        return super().get_mask_sizes(query_length, layer_idx)

    def reset(self) -> None:
        """Drop all tokens and give the memory back; the cache can be used again, with any batch size."""
        self._plan.end(self.layers)
        for i, layer in self._unused.items():
            self.layers[i] = copy.deepcopy(layer)
        fresh = StepGuard()
        for layer in self.paged_layers:
            layer.clear()
            layer.guard = fresh

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens, as transformers does; 0: only give back what was kept for it.

        Raises:
            RollbackError: a layer does not hold what came before them; no layer has changed.
        """
        if tokens_to_remove < 0:
            check_crop(self.layers, -int(tokens_to_remove))
        super().crop(tokens_to_remove)

    def rollback(self) -> int:
        """Drop the tokens that an interrupted forward pass left in some layers only.

        Returns:
            Tokens held afterwards.

        Raises:
            InterruptedForwardError: a layer that is not paged is ahead, or does not count tokens; ``reset()`` then.
        """
        level = min(layer.length for layer in self.paged_layers)
        check_rollback(self.layers, level)
        for layer in self.paged_layers:
            layer.drop(layer.length - level)
        return level

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a safetensors file: the packed pages in use, each once, and the open pages.

        A file that is there is replaced, once the new one is complete.

        Raises:
            InterruptedForwardError: the last forward pass did not finish.
            SavedCacheError: a layer of transformers' own holds what cannot be saved, or writing failed.
            FileNotFoundError: no such folder.
        """
        save_cache(self, path, self._fingerprint)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: PreTrainedConfig,
        *,
        device: str | torch.device = "cpu",
        impl: Implementation = "auto",
        offload: bool = False,
    ) -> "QuantizedPagedCache":
        """Read a cache that :meth:`save` wrote; no page is quantized again, and generation goes on as it would have.

        Args:
            path: the file.
            config: the config of the model that filled the cache.  Its shape is compared, its weights are not.
            device: where the cache is to live: the model's device.
            impl, offload: as for a new cache; the file does not say.

        Raises:
            WrongModelError: the cache was filled by a model with another config.
            SavedCacheError: not a saved cache, truncated, changed, of an incompatible version, or of another policy.
            FileNotFoundError: no such file.
        """

        def make(policy: AnyPolicy, options: dict[str, Any]) -> QuantizedPagedCache:
            if cls is QuantizedPagedCache:  # the others have their own policy
                options = options | {"policy": policy}
            return cls(config, impl=impl, offload=offload, **options)

        return load_cache(make, path, fingerprint(config), torch.device(device))

    def report(self) -> CacheReport:
        """What the cache holds, in bytes measured on its tensors, and what ran on it."""
        others = [layer for layer in self.layers if not isinstance(layer, PagedLayer)]
        about = (self.policy.name, self.page_size, self.paged_layers, others, self._log)
        return take_inventory(*about, self._pools_shared, self._latent_rank)

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
