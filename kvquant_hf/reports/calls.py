"""Attention calls of one cache, counted by the path they took; the first detour is said aloud."""

import warnings
from collections import Counter
from dataclasses import dataclass, field

from ..errors import KVQuantFallbackWarning, KVQuantRangeWarning


@dataclass
class CallLog:
    """Counts attention calls of one cache by the path they took.

    ``paged``: read the pages as they are stored, by what ran.  ``prefill``: first prompt, on the exact keys and values.
    ``open``: read an open page beside which nothing was packed yet, exactly, by the model's own attention function.
    ``fallbacks``: multiplied out first, by reason.  ``reason``: why the kernels did not run, where they did not.
    ``restarts``: how often a model dropped what was held and began again, by its method.  ``dropped``: which method of
    a model was given the cache and did not use it.
    ``out_of_range``: whether it has been said that keys or values were beyond what scales hold.
    """

    paged: Counter[str] = field(default_factory=Counter)
    reason: str = ""
    prefill: int = 0
    open: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    restarts: Counter[str] = field(default_factory=Counter)
    dropped: str = ""
    out_of_range: bool = False

    def attended(self, implementation: str, reason: str) -> None:
        """Count one call that read the pages with ``implementation``."""
        self.paged[implementation] += 1
        self.reason = reason or self.reason

    def fallback(self, reason: str) -> None:
        """Count one call that needed dense keys and values; the first one is said aloud."""
        if not self.fallbacks:
            warnings.warn(
                f"the quantized KV cache was multiplied out for attention ({reason}): the result is right, but slower. "
                "cache.report() counts these calls; model.set_attn_implementation('kvquant') avoids them where the "
                "model allows it.",
                KVQuantFallbackWarning,
                stacklevel=2,
            )
        self.fallbacks[reason] += 1

    def saturated(self, pages: int) -> None:
        """``pages`` pages have keys or values beyond what their scales hold; said aloud once."""
        if pages and not self.out_of_range:
            self.out_of_range = True
            warnings.warn(
                "keys or values are beyond the range in which quantized pages store them (65504, the end of the fp16 "
                "scales of most policies; 448 with fp8, 2688 with nvfp4) and were cut off at its ends; cache.report() "
                "counts such pages; use policy='exact', or a policy by layer that keeps these layers exact.",
                KVQuantRangeWarning,
                stacklevel=2,
            )
