"""One call of ``generate``: which cache it was given, and whether the model used it.

A model may drop a cache without a word.  Phi-3 with long-context scaling does, at the length at which its rotary
embedding changes: what is cached does not hold beyond it, so its ``prepare_inputs_for_generation`` hands on None, and
the model makes a ``DynamicCache``.  Ours is emptied and handed on instead.  For whatever else drops it: when
``generate`` ends, a cache that the model did not fill, or gave up for another, is said aloud and in its report.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from transformers.generation import GenerationMixin

from ..errors import KVQuantDroppedCacheWarning
from ..reports.calls import CallLog
from .names import CACHE_ARGUMENT, cache_in


class Run:
    """A call of ``generate``."""

    def __init__(self) -> None:
        self.given: Any = None  # what the model was given
        self.ours: Sequence[Any] = ()  # caches of ours in it: one, or the halves of an encoder-decoder's
        self.prepared = False  # whether the model's preparation of its inputs came by
        self.taken = ""  # the kind of cache that it came back with instead

    def tie(self, given: Any, ours: Sequence[Any]) -> None:
        """The model is given ``given`` now, in which ``ours`` are ours."""
        self.given, self.ours = given, ours

    def restart(self, method: str, attention_mask: Any) -> Any:
        """The cache, emptied: the model's ``method`` begins again, with all tokens."""
        for cache in self.ours:
            recording = any(getattr(layer, "record_past", False) for layer in cache.layers)
            if int(cache.get_seq_length()) > 0:
                _log_of(cache).restarts[method] += 1
            cache.reset()
            if recording:
                cache.activate_past_recording()
        if self.given is not self.ours[0]:
            self.given.reset()  # an encoder-decoder's remembers which layers were filled
        self.ours[0].set_padding(attention_mask)
        return self.given

    def came_back(self, cache: Any) -> None:
        """A forward pass returned ``cache``, or None."""
        halves = (cache, getattr(cache, "self_attention_cache", None))
        if self.ours and cache is not None and not any(own is half for own in self.ours for half in halves):
            self.taken = type(cache).__name__

    def end(self, model: Any) -> None:
        """``generate`` is about to return: say what was given and not used."""
        for cache in self.ours:
            if not self.taken and int(cache.get_seq_length()) > 0:
                continue
            own = type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
            method = "prepare_inputs_for_generation" if own and not self.prepared else "forward"
            what = f"went on with a {self.taken}" if self.taken else "filled no cache"
            dropped = f"{type(model).__name__}.{method} dropped it and {what}"
            _log_of(cache).dropped = dropped
            warnings.warn(
                f"generate() was given a quantized KV cache and did not use it: {dropped}; nothing was compressed in "
                "this call.",
                KVQuantDroppedCacheWarning,
                stacklevel=3,
            )
            return


def _log_of(cache: Any) -> CallLog:
    """What the layers of a cache of ours share to count calls."""
    log: CallLog = cache.paged_layers[0].log
    return log


# Of the calls of generate that are under way in this thread, the innermost: an assistant has one of its own.
CURRENT: ContextVar[Run | None] = ContextVar("kvquant_hf_run", default=None)


def watch_generate(original: Callable[..., Any]) -> Callable[..., Any]:
    """``GenerationMixin.generate`` that ends with :meth:`Run.end`."""

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = Run()
        token = CURRENT.set(run)
        try:
            result = original(self, *args, **kwargs)
        finally:
            CURRENT.reset(token)
        if run.ours:
            run.came_back(cache_in(result) if hasattr(result, "get") else None)
            run.end(self)
        return result

    return generate


def keep_cache(original: Callable[..., Any]) -> Callable[..., Any]:
    """``GenerationMixin.prepare_inputs_for_generation``, which a model's own calls in the end: a cache of ours that was
    replaced by None on the way is emptied and handed on."""

    @functools.wraps(original)
    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = CURRENT.get()
        if run is not None and run.ours:
            run.prepared = True
            names = [name for name in (CACHE_ARGUMENT, "past_key_values") if name in kwargs]
            if names and cache_in(kwargs) is None and kwargs.get("use_cache", True):
                own = "decoder_attention_mask" if self.config.is_encoder_decoder else "attention_mask"
                kwargs[names[0]] = run.restart(f"{type(self).__name__}.prepare_inputs_for_generation", kwargs.get(own))
        return original(self, *args, **kwargs)

    return prepare_inputs_for_generation


def watch_outputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """``GenerationMixin._update_model_kwargs_for_generation``, which sees what each forward pass returns."""

    @functools.wraps(original)
    def update(self: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        run = CURRENT.get()
        if run is not None and run.ours:
            run.came_back(cache_in(outputs))
        return original(self, outputs, *args, **kwargs)

    return update
