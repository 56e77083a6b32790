"""``pipeline``: transformers' text-generation pipeline with a quantized cache; lists are batched continuously."""

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers.pipelines
from transformers import AutoTokenizer, GenerationConfig
from transformers.pipelines import TextGenerationPipeline

from .batching import hooks
from .batching.settings import check_config
from .cache import QuantizedPagedCache
from .errors import (
    BatchingError,
    KVQuantBatchingWarning,
    UnknownPolicyError,
    UnsupportedModelError,
    UnsupportedVersionError,
)
from .files.calibration import QParams
from .policies.table import PolicyLike
from .reports.report import CacheReport
from .transformers_api.contract import PIPELINE, PIPELINE_BATCHING, require
from .transformers_api.names import with_cache
from .triton_kernels.ops import Implementation
from .weights.gguf_once import parsed_once

if TYPE_CHECKING:
    from .batching.report import BatchingReport

require(PIPELINE, "its text-generation pipeline")

# Each would stand beside the pipeline's own.
_CACHES = ("cache", "past_key_values", "cache_implementation", "cache_config")


@dataclass(frozen=True)
class PipelineReport:
    """How the last call of a pipeline was answered.

    Args:
        continuous_batching: whether its prompts were batched continuously.
        reason: why a list of them was not; empty for one prompt.
        cache: what the batching run held at its end, or the cache of the last prompt, or of the last few that were
            computed together (``batch_size``).
    """

    continuous_batching: bool
    reason: str
    cache: "CacheReport | BatchingReport"

    def __str__(self) -> str:
        how = "continuous" if self.continuous_batching else f"not continuous: {self.reason}" if self.reason else "none"
        return f"{'batching':<17} {how}\n{self.cache}"


def pipeline(
    model: Any,
    policy: PolicyLike = "int4",
    *,
    tokenizer: Any = None,
    page_size: int = 64,
    prefill: Literal["exact", "quantized"] = "exact",
    impl: Implementation = "auto",
    qparams: str | os.PathLike[str] | QParams | None = None,
    max_bytes: int | None = None,
    continuous_batching: bool | None = None,
    **kwargs: Any,
) -> "QuantizedTextGenerationPipeline":
    """transformers' text-generation pipeline with a quantized KV cache.

    One prompt, a string or a chat, goes through ``generate`` with a ``QuantizedPagedCache``.  The prompts of a list are
    batched continuously where this version of transformers, the model and the arguments of the call allow it, else
    answered one by one (or ``batch_size`` together), which a ``KVQuantBatchingWarning`` says once for each reason and
    ``pipe.report()`` repeats.  Results are those of transformers' pipeline, in its shapes and in the order of the
    prompts.

    Args:
        model: a folder, a .gguf file, a name on the hub, or a loaded model, whose generation config then loses the
            ``cache_implementation`` it may have: the pipeline brings its own cache.
        policy, page_size, prefill, impl, qparams: as for ``QuantizedPagedCache``.
        tokenizer: by default the model's own.
        max_bytes: bytes for the pages of a call; by default what they need, and for continuous batching the share of
            the free memory that transformers takes.
        continuous_batching: None: where it can be had; True: always, and what cannot be had is refused; False: never.
        kwargs: what ``transformers.pipeline`` takes (``dtype``, ``device``, ``model_kwargs`` ...), and defaults for the
            calls (``max_new_tokens``, ``do_sample``, ``batch_size`` ...).  In continuous batching ``batch_size`` bounds
            the prompts that are computed at a time; 1, the default, does not.

    Returns:
        A ``TextGenerationPipeline``.

    Raises:
        UnknownPolicyError: an unknown policy or option, or a cache beside the policy.
        UnsupportedModelError: the model has no cache that could be quantized, or no tokenizer was given or found.

    Example:
        >>> pipe = kvquant_hf.pipeline("Qwen/Qwen2.5-7B-Instruct", policy="int8")
        >>> pipe(["Hi, please introduce yourself", "Shanghai is"], max_new_tokens=100)
    """
    with ExitStack() as loading:
        if isinstance(model, (str, os.PathLike)) and Path(model).suffix == ".gguf" and Path(model).is_file():
            loading.enter_context(parsed_once())
            model, file = str(Path(model).parent), Path(model).name
            tokenizer = AutoTokenizer.from_pretrained(model, gguf_file=file) if tokenizer is None else tokenizer
            kwargs["model_kwargs"] = {**kwargs.get("model_kwargs", {}), "gguf_file": file}
        elif not isinstance(model, (str, os.PathLike)) and tokenizer is None:
            tokenizer = model.name_or_path
            if not tokenizer:
                raise UnsupportedModelError("the model does not say where its tokenizer is; give it as tokenizer=.")
        options: dict[str, Any] = {"policy": policy, "page_size": page_size, "prefill": prefill, "impl": impl}
        options |= {"qparams": qparams, "max_bytes": max_bytes}
        made: QuantizedTextGenerationPipeline = transformers.pipelines.pipeline(
            "text-generation",
            model=model,
            tokenizer=tokenizer,
            pipeline_class=QuantizedTextGenerationPipeline,
            cache_options=options,
            continuous_batching=continuous_batching,
            **kwargs,
        )
    return made


class _NotBatched(Exception):  # noqa: N818  # not an error: prompts are answered one by one
    """Why prompts are not batched continuously."""


class QuantizedTextGenerationPipeline(TextGenerationPipeline):
    """What :func:`pipeline` makes: transformers' pipeline with a cache of ours in each call.

    Args:
        cache_options: for ``QuantizedPagedCache`` and ``QuantizedBatchingConfig`` alike.
        continuous_batching: see :func:`pipeline`.
        kwargs: of ``TextGenerationPipeline``.
    """

    def __init__(self, *, cache_options: dict[str, Any], continuous_batching: bool | None, **kwargs: Any) -> None:
        _refuse_caches(kwargs)
        model = kwargs["model"]
        QuantizedPagedCache(model.config, **cache_options)  # judges the options
        model.generation_config.cache_implementation = model.generation_config.cache_config = None
        self._options = cache_options
        self._batching = continuous_batching
        self._reason = ""
        self._said: set[str] = set()
        self._report: PipelineReport | None = None
        super().__init__(**kwargs)

    def report(self) -> PipelineReport:
        """How the last call was answered, and what its cache held.

        Raises:
            BatchingError: there was none.
        """
        if self._report is None:
            raise BatchingError("there is nothing to report before the pipeline has answered a prompt; call it first.")
        return self._report

    def run_single(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers': one prompt."""
        self._reason = ""
        return super().run_single(*args, **kwargs)

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[Any]:
        """As transformers', for a list, a generator or a data set of prompts; a list is batched continuously if it can.

        Raises:
            BatchingError: it cannot, and ``continuous_batching=True``; or a prompt failed.
            OutOfPages: ``max_bytes`` have no room for one prompt.
        """
        self._reason = ""
        try:
            outputs = self._batched(inputs, batch_size, preprocess_params, forward_params)
        except (_NotBatched, UnsupportedModelError, UnsupportedVersionError) as error:
            self._reason = str(error).rstrip(".")
        else:
            return iter([self.postprocess(output, **postprocess_params) for output in outputs])
        if self._batching:
            raise BatchingError(
                f"these prompts cannot be batched continuously: {self._reason}; leave continuous_batching=True out."
            )
        if self._batching is None and self._reason not in self._said:
            self._said.add(self._reason)
            how = f"{batch_size} at a time" if batch_size > 1 else "one by one"
            warnings.warn(
                f"prompts are answered {how} instead of being batched continuously: {self._reason}.",
                KVQuantBatchingWarning,
                stacklevel=4,
            )
        arguments = (num_workers, batch_size, preprocess_params, forward_params, postprocess_params)
        iterator: Iterator[Any] = super().get_iterator(inputs, *arguments)
        return iterator

    def _sanitize_parameters(self, **kwargs: Any) -> Any:
        _refuse_caches(kwargs)
        return super()._sanitize_parameters(**kwargs)

    def _forward(self, model_inputs: Any, **generate_kwargs: Any) -> Any:
        cache = QuantizedPagedCache(self.model.config, **self._options)
        outputs = super()._forward(model_inputs, **generate_kwargs, **with_cache(cache))
        self._report = PipelineReport(False, self._reason, cache.report())
        return outputs

    def _batched(
        self, inputs: Any, batch_size: int, preprocess_params: dict[str, Any], forward_params: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """What ``_forward`` would return for each of a list of prompts.

        Raises:
            _NotBatched, UnsupportedModelError, UnsupportedVersionError: they cannot be batched.
        """
        if self._batching is False:
            raise _NotBatched("continuous_batching=False")
        if not isinstance(inputs, list):
            raise _NotBatched("a generator or a data set is read prompt by prompt")
        hooks.require_support()
        require(PIPELINE_BATCHING, "batching a pipeline's prompts")
        from .batching.prompts import answer  # it needs what was required

        config = self._settings(forward_params)
        prompts = [self.preprocess(prompt, **preprocess_params) for prompt in inputs]
        ids = [prompt["input_ids"][0].tolist() for prompt in prompts]
        if not all(ids):
            raise _NotBatched("a prompt has no tokens")
        with self.device_placement():
            answers, report = answer(self.model, ids, config, self._options, batch_size if batch_size > 1 else None)
        self._report = PipelineReport(True, "", report)
        outputs = []
        for prompt, own, sequences in zip(prompts, ids, answers, strict=True):
            longest = max(map(len, sequences))
            rows = [own + new + [config.pad_token_id or 0] * (longest - len(new)) for new in sequences]
            kept = {name: prompt[name] for name in ("input_ids", "prompt_text")}
            outputs.append({**kept, "generated_sequence": torch.tensor([rows])})
        return outputs

    def _settings(self, forward_params: dict[str, Any]) -> GenerationConfig:
        """What ``generate`` would make of the arguments.

        Raises:
            _NotBatched: continuous batching would not do some of it.
        """
        asked = self._prepare_generate_kwargs(forward_params)
        config, others = self.model._prepare_generation_config(asked.pop("generation_config", None), **asked)
        lost = [name for name, value in others.items() if value and name != "tokenizer"]
        lost += [name for name in ("return_dict_in_generate", "token_healing") if getattr(config, name, None)]
        if config.max_new_tokens is None:
            lost.append("max_length")
        if lost:
            raise _NotBatched(f"continuous batching has no {', '.join(lost)}")
        try:
            check_config(config)
        except BatchingError as error:
            raise _NotBatched(str(error).partition(";")[0]) from error
        return config


def _refuse_caches(kwargs: dict[str, Any]) -> None:
    """Refuse a cache of the caller's, which would stand beside ours.

    Raises:
        UnknownPolicyError: there is one.
    """
    if given := [name for name in _CACHES if kwargs.get(name) is not None]:
        raise UnknownPolicyError(
            f"the pipeline makes its cache from policy= and its other options; leave out {', '.join(given)}."
        )
