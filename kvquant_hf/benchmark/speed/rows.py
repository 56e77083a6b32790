"""What was measured of one cache in one dtype at one context.

Nothing is left out: a cache that could not run has a row with its reason.
"""

from dataclasses import dataclass

from ..status import OK


@dataclass
class Row:
    """One cache in one dtype at one context; what was not measured is None.

    Args:
        cache: its name.
        family: ``"kvquant"`` or ``"transformers"``.
        dtype: of the model, and of what the cache does not quantize.
        context: tokens held at the end of the measurement.
        status: ``"ok"``, ``"skipped"`` (not tried) or ``"failed"`` (tried); ``reason`` says why.
        prompt_tokens: tokens of the prompt, read in chunks.
        prefill_s: seconds of its forward passes, measured once.
        ttft_s: seconds until the first new token is known: making the cache, prefill, choosing.  Measured once.
        rounds: decode steps that were timed.
        p20_ms, p50_ms, p80_ms: quantiles of one decode step, in milliseconds.
        tokens_per_s: from the median step.
        ratio: speed against the fastest ``dynamic`` of this context, median of paired rounds: above 1 is faster.
        ratio_same_dtype: against ``dynamic`` in the same dtype.
        top1_agreement: share of ``checked`` positions at which the most likely token is that of ``dynamic`` in the same
            dtype, both reading the same tokens.
        stored_bytes: held by the cache at the end.
        peak_bytes: largest memory of a process of its own while it read the prompt and decoded, above what it had with
            the model loaded; ``peak_how`` says how, or why there is none.
        cuda_peak_bytes: the same of tensors on a GPU.
        implementation: what worked on our pages.
    """

    cache: str
    family: str
    dtype: str
    context: int
    status: str = OK
    reason: str = ""
    prompt_tokens: int | None = None
    prefill_s: float | None = None
    ttft_s: float | None = None
    rounds: int | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    tokens_per_s: float | None = None
    ratio: float | None = None
    ratio_same_dtype: float | None = None
    top1_agreement: float | None = None
    checked: int = 0
    stored_bytes: int | None = None
    peak_bytes: int | None = None
    peak_how: str = ""
    cuda_peak_bytes: int | None = None
    implementation: str = ""

    @property
    def peak(self) -> int | None:
        """The peak that matters: of tensors on a GPU, else of the process."""
        return self.peak_bytes if self.cuda_peak_bytes is None else self.cuda_peak_bytes

    def gave_up(self, status: str, reason: str) -> None:
        """Say why there is no number."""
        self.status, self.reason = status, " ".join(reason.split())
