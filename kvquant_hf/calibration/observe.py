"""Read text through a model and keep the extremes of its keys and values, as attention gets them.

Keys are those after the rotary embedding.  What is kept is two numbers per channel and nothing of the text, not even of
the window that is being read: the cache that observes hands keys and values on and forgets them.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..errors import CalibrationError, UnsupportedModelError
from ..files.calibration import SIDES, Statistics
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


def collect(
    model: Any, windows: torch.Tensor, facts: dict[str, Any] | None = None, advance: Callable[[], object] = lambda: None
) -> Statistics:
    """Extremes of every channel of the keys and values that ``model`` makes of a text.

    Args:
        model: a causal language model in eval mode.
        windows: token ids ``[windows, tokens]``; each row is read by itself, from an empty cache.
        facts: what the file is to say of the text.
        advance: called after each window.

    Returns:
        The statistics, on the CPU.

    Raises:
        UnsupportedModelError: not a decoder-only model.
        CalibrationError: keys or values are not finite, or there are none.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} has an encoder, and a calibration reads text alone; use a causal model."
        )
    # Logits of a whole window would be the largest tensor of all.
    options = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    extremes = _Extremes()
    with torch.inference_mode():
        for row in windows.split(1):
            cache = ObservingCache(model.config, extremes.add)
            model(row.to(model.device), use_cache=True, **with_cache(cache), **options)
            extremes.check()
            advance()
    tensors = {}
    for (layer, side), (low, high) in extremes.held.items():
        absmax = torch.maximum(low.abs(), high.abs())
        for name, x in (("min", low), ("max", high), ("absmax", absmax)):
            tensors[f"layers.{layer}.{side}.{name}"] = x.cpu().clone()
    return Statistics(tensors, list(fingerprint(model.config)), facts or {})
