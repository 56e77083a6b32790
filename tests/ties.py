"""Equal tokens on every processor: no greedy choice that is compared may be one that rounding could turn.

Attention over pages sums in another order than transformers', and every processor in one of its own.  In float32 the
logits of the tiny models then differ by 2e-6 of the largest; tests of logits allow ten times that.  A token can differ
only where the runner-up is within twice the difference, so tests make sure that there is none.
"""

import torch
from transformers import LogitsProcessor, LogitsProcessorList

ROUNDING = 2e-5  # of the largest logit


class Margins(LogitsProcessor):
    """Given to ``generate``, it finds the closest runner-up of any step, as a share of the largest logit."""

    def __init__(self) -> None:
        self.closest = float("inf")

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.see(scores)
        return scores

    def see(self, logits: torch.Tensor) -> None:
        """Logits ``[..., vocabulary]`` of which the largest are chosen; constants, of prompt lookup, are none."""
        logits = logits[logits.amax(-1) > logits.amin(-1)]
        if not len(logits):
            return
        first, second = logits.topk(2, -1).values.unbind(-1)
        largest = logits.masked_fill(logits.isinf(), 0).abs().amax(-1)
        self.closest = min(self.closest, ((first - second) / largest).min().item())

    @property
    def options(self) -> dict[str, LogitsProcessorList]:
        """The argument of ``generate``."""
        return {"logits_processor": LogitsProcessorList([self])}

    def check(self) -> None:
        """Raise ``AssertionError`` if another processor's rounding might have chosen another token."""
        assert self.closest > 2 * ROUNDING, f"a runner-up is {self.closest:.1e} off; take another prompt"
