"""Right before fast: whether a cache chooses the tokens that ``DynamicCache`` chooses."""

from typing import NamedTuple

import torch

# Two ways to add up the same products differ by rounding, and rounding may decide a near tie.  A lossless cache may
# choose another token only if the reference puts it this close to its own choice, in standard deviations of the
# logits, times the dtype's epsilon: 0.5 in bfloat16, 8e-6 in float32.  A wrong key changes logits by a deviation or so.
TIE_EPSILONS = 64


class Verdict(NamedTuple):
    """``agreement``: share of equal choices; ``gap``: the largest distance between the reference's logits of its choice
    and of the other's, in standard deviations of its logits; ``finite``: no NaN and no infinity."""

    agreement: float
    gap: float
    finite: bool

    def lossless(self, dtype: torch.dtype) -> bool:
        """Whether all choices are equal, near ties aside."""
        return self.finite and self.gap <= TIE_EPSILONS * torch.finfo(dtype).eps


def judge(reference: torch.Tensor, logits: torch.Tensor) -> Verdict:
    """Compare choices position by position.

    Args:
        reference: logits of ``DynamicCache``, ``[positions, vocabulary]``.
        logits: of the other, over the same tokens.
    """
    reference, logits = reference.float(), logits.float()
    finite = bool(logits.isfinite().all() and reference.isfinite().all())
    theirs, ours = reference.argmax(-1, keepdim=True), logits.argmax(-1, keepdim=True)
    gaps = (reference.gather(-1, theirs) - reference.gather(-1, ours)) / reference.std(-1, keepdim=True)
    return Verdict(float((theirs == ours).float().mean()), float(gaps.max()), finite)
