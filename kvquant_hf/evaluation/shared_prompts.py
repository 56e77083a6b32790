"""A prompt is read once, and every cache of a comparison begins with what it left.

With ``prefill="exact"`` the first forward pass of ``generate`` attends to keys and values as they come, whatever cache
it has, and hence computes the same for all of them.  It is made once, with a cache that only shows what it is given;
each cache then gets the same keys, values and queries, in the same order, as if the model had read the prompt with it.
Everything after the prompt is the model's own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..pages.queries import saw
from ..transformers_api.names import cache_in, with_cache
from ..transformers_api.observe import ObservingCache

# Kinds of layers that keep nothing of a prompt but keys and values.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclasses.dataclass
class _Prompt:
    """What the forward pass of one batch of prompts computed: about ``2 key/value heads + query heads`` times head_dim
    elements a token and layer, as long as the batch is measured."""

    inputs: dict[str, torch.Tensor]
    output: Any = None  # the model's
    # Layer, keys, values, in the order in which they came.
    stored: list[tuple[int, torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=list)
    queries: dict[int, list[torch.Tensor]] = dataclasses.field(default_factory=dict)

    def is_of(self, inputs: dict[str, torch.Tensor]) -> bool:
        """Whether these are the prompts, and everything that is said of them."""
        return inputs.keys() == self.inputs.keys() and all(
            torch.equal(inputs[name], own) for name, own in self.inputs.items()
        )

    def give(self, cache: Any) -> Any:
        """The model's output, as if it had read the prompts with ``cache``, which is empty."""
        for layer, keys, values in self.stored:
            # Nobody may write into what others are given; ``update`` marks the tensor that it hands on.
            handed, _ = cache.update(keys.clone(), values.clone(), layer)
            for query in self.queries.get(layer, ()):
                saw(handed, query)
        return dataclasses.replace(self.output, **with_cache(cache))


class SharedPrompts:
    """Keeps the batches of prompts that were read until it is told to forget them.

    ``read`` and ``taken`` count the batches that the model read, and those that were taken from before.
    """

    def __init__(self) -> None:
        self.read = self.taken = 0
        self._kept: list[_Prompt] = []

    def clear(self) -> None:
        """Forget the prompts."""
        self._kept.clear()

    @contextmanager
    def of(self, model: Any) -> Iterator[None]:
        """In this context the first forward pass of ``model.generate`` is made once for equal prompts.

        Nothing changes for models that keep more than keys and values of a prompt (linear attention, convolutions).
        """
        if not _only_attends(model.config):
            yield
            return
        before, model.forward = model.forward, self._sharing(model.forward, model.config)
        try:
            yield
        finally:
            del model.forward
            if model.forward != before:  # it was the instance's own already
                model.forward = before

    def _sharing(self, forward: Callable[..., Any], config: Any) -> Callable[..., Any]:
        @functools.wraps(forward)
        def shared(*args: Any, **kwargs: Any) -> Any:
            cache, ids = cache_in(kwargs), kwargs.get("input_ids")
            whole = not args and cache is not None and ids is not None and ids.shape[1] > 1
            if not whole or int(cache.get_seq_length()) > 0:
                return forward(*args, **kwargs)
            others = {name: value for name, value in kwargs.items() if value is not cache}
            inputs = {name: value for name, value in others.items() if isinstance(value, torch.Tensor)}
            prompt = next((kept for kept in self._kept if kept.is_of(inputs)), None)
            if prompt is None:
                prompt = self._read(forward, config, inputs, others)
                self._kept.append(prompt)
            else:
                self.taken += 1
            return prompt.give(cache)

        return shared

    def _read(
        self, forward: Callable[..., Any], config: Any, inputs: dict[str, torch.Tensor], others: dict[str, Any]
    ) -> _Prompt:
        prompt = _Prompt(inputs)
        observing = ObservingCache(
            config,
            lambda layer, keys, values: prompt.stored.append((layer, keys, values)),
            lambda layer, query: prompt.queries.setdefault(layer, []).append(query),
        )
        prompt.output = dataclasses.replace(forward(**others, **with_cache(observing)), **with_cache(None))
        self.read += 1
        return prompt


def _only_attends(config: Any) -> bool:
    decoder = config.get_text_config(decoder=True)
    kinds = getattr(decoder, "layer_types", None) or ()
    return _ATTENTION.issuperset(kinds) and not getattr(config, "is_encoder_decoder", False)
