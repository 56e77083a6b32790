"""The model ``kvquant`` of lm-eval: its ``hf`` model, with every task running through quantized keys and values.

lm-eval's ``hf`` scores text in one forward pass that attends to keys and values as they come, so a quantized cache
changes nothing there, whatever the options; only tasks that generate would see it.  Here

* log-likelihoods (multiple choice, rolling perplexity) are computed from context and continuation read in chunks of a
  page into a cache with ``prefill="quantized"``: every token attends to what its predecessors left in the cache, as if
  it had been read alone (``harness.py`` says why), and a cache whose report says otherwise is refused;
* generation is ``generate`` with a cache of ours.  ``prefill="exact"`` is generation as users have it, where the prompt
  attends to itself as it came; with ``prefill="quantized"`` the prompt is read in chunks of a page too.

Batches of texts of different lengths need no mask: lm-eval pads what it scores on the right, no token attends to what
follows it, and padding reaches the scales of a page only when it is sealed, after the last real token has read it.
Prompts are padded on the left, with a mask that ``generate`` hands to the cache.

``BaselineLM`` is the same with a cache of transformers' own, read in the same chunks, for comparisons.

Several processes, launched with torchrun, share the documents of each task, on CPUs too; the first one has the table.

Importing this module registers the model.  lm-eval 0.4 finds models in its own table and looks for no entry points, so
plain ``lm_eval --model kvquant`` does not know it; ``kvquant lm-eval`` is that command with this module imported.
"""

import os
from abc import abstractmethod
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import GgufConfig

from ..cache import QuantizedPagedCache
from ..errors import EvaluationInputError, UnsupportedModelError
from ..policies.table import PolicyLike, parse_policy
from ..transformers_api.names import with_cache
from ..weights.gguf_once import parsed_once
from .baselines import check_cache, make_cache
from .harness import check_was_read
from .shared_prompts import SharedPrompts

_WAIT = timedelta(weeks=52)  # for other processes, at the end of a task: as in ``hf``


def _is_launched_on_cpus(pretrained: Any, options: dict[str, Any]) -> bool:
    """Whether this is one of several processes that are each to load the whole model into the CPU's memory."""
    on_cpu = options.get("device") == "cpu" or not torch.accelerator.is_available()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and on_cpu and isinstance(pretrained, str) and options.get("tp_plan") is None


class CacheLM(HFLM):
    """lm-eval's Hugging Face model with a fresh cache for each batch; which one, :meth:`_make_cache` says.

    Args:
        pretrained: as for ``hf``: a hub name, a folder, or a model.
        page_size: tokens per chunk of scored text.
        prefill: what the prompt of a generation task attends to in itself, ``"exact"`` or ``"quantized"``.
        **options: everything that ``hf`` takes.

    Raises:
        UnsupportedModelError: an encoder-decoder.
    """

    def __init__(self, pretrained: Any, page_size: int, prefill: str, **options: Any) -> None:
        if _is_launched_on_cpus(pretrained, options):
            # Accelerate, which ``hf`` asks, takes processes on CPUs for single ones unless told so.
            PartialState(cpu=True, timeout=_WAIT)
        with parsed_once():
            super().__init__(pretrained, **options)
        if (accelerator := getattr(self, "accelerator", None)) is not None:
            # ``hf`` shares only where there are several GPUs, and counts processes machine by machine.
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        if self.backend != "causal":
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has an encoder, so its text cannot be read in chunks; use --model hf."
            )
        self._page_size, self._prefill = page_size, prefill
        self.prompts: SharedPrompts | None = None  # where others' prompts have been read, if they have
        if self.model.generation_config is not None:
            self.model.generation_config.cache_implementation = None  # the cache is made here

    @abstractmethod
    def _make_cache(self, prefill: str) -> Any:
        """An empty cache; ``prefill`` is what a prompt attends to in itself, where the cache has a say in it."""

    def _check(self, cache: Any, prefill: str, tokens: int | None) -> None:
        """Refuse a cache that was not read; ``tokens`` per sequence were (None: generation knows)."""

    def _create_model(self, *args: Any, gguf_file: str | None = None, **options: Any) -> None:
        """As ``hf``; the weights of a GGUF file become plain ones, since packed ones need a kernel from the hub."""
        if gguf_file is not None:
            options["quantization_config"] = GgufConfig(dequantize=True)
        super()._create_model(*args, gguf_file=gguf_file, **options)

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits ``[batch, tokens, vocabulary]`` of token ids ``[batch, tokens]``, padded on the right.

        Raises:
            EvaluationError: attention did not go through the cache.
        """
        cache = self._make_cache("quantized")
        mixed = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None):
            chunks = [
                self.model(chunk, use_cache=True, **with_cache(cache)).logits
                for chunk in inps.split(self._page_size, dim=1)
            ]
        self._check(cache, "quantized", inps.shape[1])
        return torch.cat(chunks, dim=1)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """Token ids ``[batch, up to max_length]`` that continue ``context``, padded on the left.

        Raises:
            EvaluationInputError: the generation arguments name a cache of their own.
            EvaluationError: attention did not go through the cache.
        """
        if generation_kwargs.get("cache_implementation") is not None:
            raise EvaluationInputError(
                "this model brings its own cache; leave cache_implementation out of the generation arguments, or use "
                "--model hf."
            )
        cache = self._make_cache(self._prefill)
        if self._prefill == "quantized":
            generation_kwargs["prefill_chunk_size"] = self._page_size
        shared = self.prompts if self._prefill == "exact" else None
        with shared.of(self.model) if shared else nullcontext():
            output: torch.Tensor = super()._model_generate(
                context, max_length, stop, **with_cache(cache), **generation_kwargs
            )
        self._check(cache, self._prefill, None)
        return output


@register_model("kvquant")
class KVQuantLM(CacheLM):
    """lm-eval's Hugging Face model with a quantized cache.

    Args:
        pretrained: as for ``hf``: a hub name, a folder, or a model.
        policy: what to store the cache in; ``exact`` gives the numbers of ``hf`` but for rounding.
        page_size: tokens per page, and per chunk of scored text.
        prefill: what the prompt of a generation task attends to in itself, ``"exact"`` or ``"quantized"``.
        impl, sliding, sinks: as for ``QuantizedPagedCache``.
        **options: everything that ``hf`` takes.

    Raises:
        UnknownPolicyError: unknown policy or option.
        UnsupportedModelError: an encoder-decoder, or a model with nothing to quantize.
    """

    def __init__(
        self,
        pretrained: Any,
        policy: PolicyLike = "int4",
        page_size: int = 64,
        prefill: str = "exact",
        impl: str = "auto",
        sliding: str = "quantized",
        sinks: int | None = None,
        **options: Any,
    ) -> None:
        parse_policy(policy)  # a wrong name is said before the model is loaded
        super().__init__(pretrained, page_size, prefill, **options)
        self._cache_options: dict[str, Any] = {
            "policy": policy,
            "page_size": page_size,
            "impl": impl,
            "sliding": sliding,
            "sinks": sinks,
        }
        self._calls = {"paged": 0, "exact_prefill": 0, "multiplied_out": 0}
        empty = self._make_cache(prefill)  # whatever else is wrong is said now
        self._page_size, self._policy_name = empty.page_size, empty.policy.name

    def _make_cache(self, prefill: str) -> QuantizedPagedCache:
        return QuantizedPagedCache(self.model.config, prefill=prefill, **self._cache_options)  # type: ignore[arg-type]

    def _check(self, cache: QuantizedPagedCache, prefill: str, tokens: int | None) -> None:
        """Count the attention calls of a cache, and refuse one that was not read."""
        report = cache.report()
        if prefill == "quantized":
            check_was_read(report, report.tokens if tokens is None else tokens)
        self._calls["paged"] += report.paged_calls
        self._calls["exact_prefill"] += report.prefill_calls
        self._calls["multiplied_out"] += report.fallback_calls

    def get_model_info(self) -> dict[str, Any]:
        """As ``hf``, and what the cache was; lm-eval writes it beside the results."""
        from .. import __version__

        about = {
            "version": __version__,
            "policy": self._policy_name,
            "page_size": self._page_size,
            "prefill_of_generation": self._prefill,
            "attention_calls": dict(self._calls),
        }
        return super().get_model_info() | {"kvquant": about}


class BaselineLM(CacheLM):
    """lm-eval's Hugging Face model with a cache of transformers' own.

    Args:
        pretrained: as for ``hf``: a hub name, a folder, or a model.
        baseline: ``"dynamic"``, or ``"<backend>-<bits>"`` as :func:`baselines.parse_baseline` takes it.
        page_size, prefill: as for ``KVQuantLM``; with ``"quantized"`` the prompt is read in chunks, of which the first
            attends to itself as it came.
        **options: everything that ``hf`` takes.

    Raises:
        EvaluationInputError: no such baseline.
        MissingPackageError: its package is not installed.
        UnsupportedModelError: an encoder-decoder.
    """

    def __init__(
        self, pretrained: Any, baseline: str, page_size: int = 64, prefill: str = "exact", **options: Any
    ) -> None:
        check_cache(baseline)
        super().__init__(pretrained, page_size, prefill, **options)
        self._baseline = baseline

    def _make_cache(self, prefill: str) -> Any:
        return make_cache(self.model.config, self._baseline)
