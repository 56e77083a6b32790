"""Read text through a model and keep the extremes of its keys and values, and the second moments of its queries.

Keys and queries are those that attention gets, after the rotary embedding.  What is kept is two numbers per channel and
one matrix per head, and nothing of the text, not even of the window that is being read: the cache that observes hands
keys and values on and forgets them.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..errors import CalibrationError, UnsupportedModelError
from ..files.calibration import SIDES, Statistics, names_of_moments
from ..pages.moments import Moments, products, takes
from ..policies.fingerprint import fingerprint
from ..transformers_api.names import with_cache
from ..transformers_api.observe import ObservingCache


class _Extremes:
    """Running minima and maxima per layer and side, float32 ``[heads, head_dim]`` where the model is."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take the new keys and values ``[batch, heads, tokens, head_dim]`` of one layer into account."""
        for side, x in zip(SIDES, (keys, values), strict=True):
            low, high = x.amin((0, 2)).float(), x.amax((0, 2)).float()
            if (layer, side) in self.held:
                before = self.held[layer, side]
                low, high = torch.minimum(before[0], low), torch.maximum(before[1], high)
            self.held[layer, side] = low, high

    def check(self) -> None:
        """Refuse to go on with what is no range.

        Raises:
            CalibrationError: there is NaN or infinity in it, or nothing.
        """
        if not self.held:
            raise CalibrationError("the model never updated the cache that it was given; use another model.")
        for (layer, side), extremes in self.held.items():
            if not all(bool(x.isfinite().all()) for x in extremes):
                raise CalibrationError(f"{side} of layer {layer} are not finite; calibrate with --dtype float32.")


class _Queries:
    """Running sums of q q^T per layer, float32 ``[heads, head_dim, head_dim]`` where the model is, and their tokens."""

    def __init__(self, extremes: _Extremes) -> None:
        self._extremes = extremes  # whose keys have come before
        self.held: dict[int, torch.Tensor] = {}
        self._tokens: dict[int, int] = {}

    def add(self, layer: int, query: torch.Tensor) -> None:
        """Take queries ``[batch, query_heads, tokens, head_dim]`` of one layer into account; those of other heads than
        its keys say nothing of these."""
        heads, head_dim = self._extremes.held[layer, SIDES[0]][0].shape
        if takes(query, heads, head_dim):
            new = products(query, heads).sum(0)
            self.held[layer] = self.held[layer] + new if layer in self.held else new
            self._tokens[layer] = self._tokens.get(layer, 0) + query.shape[0] * query.shape[2]

    def check(self) -> None:
        """Refuse to go on with what is no number.

        Raises:
            CalibrationError: there is NaN or infinity in it.
        """
        for layer, total in self.held.items():
            if not bool(total.isfinite().all()):
                raise CalibrationError(f"queries of layer {layer} are not finite; calibrate with --dtype float32.")

    def moments(self) -> dict[int, Moments]:
        """Those of one token, of every layer that has keys, on the CPU; none where a layer's queries were not seen."""
        if {layer for layer, _ in self._extremes.held} != self.held.keys():
            return {}
        return {layer: Moments.of(total.cpu() / self._tokens[layer]) for layer, total in self.held.items()}


def collect(
    model: Any, windows: torch.Tensor, facts: dict[str, Any] | None = None, advance: Callable[[], object] = lambda: None
) -> Statistics:
    """Extremes of every channel of the keys and values that ``model`` makes of a text, and moments of the queries.

    Args:
        model: a causal language model in eval mode.
        windows: token ids ``[windows, tokens]``; each row is read by itself, from an empty cache.
        facts: what the file is to say of the text.
        advance: called after each window.

    Returns:
        The statistics, on the CPU; without moments if the model's attention does not show the queries of all layers.

    Raises:
        UnsupportedModelError: not a decoder-only model.
        CalibrationError: keys, values or queries are not finite, or there are none.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} has an encoder, and a calibration reads text alone; use a causal model."
        )
    # Logits of a whole window would be the largest tensor of all.
    options = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    extremes = _Extremes()
    queries = _Queries(extremes)
    with torch.inference_mode():
        for row in windows.split(1):
            cache = ObservingCache(model.config, extremes.add, queries.add)
            model(row.to(model.device), use_cache=True, **with_cache(cache), **options)
            extremes.check()
            queries.check()
            advance()
    tensors = {}
    for (layer, side), (low, high) in extremes.held.items():
        absmax = torch.maximum(low.abs(), high.abs())
        for name, x in (("min", low), ("max", high), ("absmax", absmax)):
            tensors[f"layers.{layer}.{side}.{name}"] = x.cpu().clone()
    for layer, moments in queries.moments().items():
        tensors |= dict(zip(names_of_moments(layer), moments, strict=True))
    return Statistics(tensors, list(fingerprint(model.config)), facts or {})
