"""What was measured of one cache in one dtype at one batch size."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..contenders import DYNAMIC
from ..statistics import percentiles
from ..status import OK
from .batching import Served

Percentiles = dict[str, float] | None


@dataclass
class ServingRow:
    """One cache in one dtype; times in seconds, percentiles as ``{"p50", "p90", "p99"}``.

    Args:
        cache, family, dtype, status, reason: as in ``Row``.
        batch_size: requests per batch that were asked for; None: as many as fit into the budget.
        batches: how many there were, ``largest_batch`` requests in the largest.
        requests, refused: requests that were answered, and that do not fit into the budget even alone.
        output_tokens: tokens that requests asked for; what a batch writes beyond them does not count.
        seconds: from the first to the last token, all batches.
        requests_per_s, tokens_per_s: over ``seconds``.
        ratio: ``tokens_per_s`` over that of ``dynamic`` in the first dtype, at the same batch size and budget.
        ttft: to the first token, from the beginning of the request's batch; ``ttft_queued``: from the beginning of all.
        tpot: per token of a request after its first, its mean.
        itl: between tokens that follow each other.
        stored_bytes: held by the cache at the end of a batch, the largest; ``expected_bytes`` what was reckoned.
    """

    cache: str
    family: str
    dtype: str
    batch_size: int | None
    status: str = OK
    reason: str = ""
    batches: int = 0
    largest_batch: int = 0
    requests: int = 0
    refused: int = 0
    output_tokens: int = 0
    seconds: float | None = None
    requests_per_s: float | None = None
    tokens_per_s: float | None = None
    ratio: float | None = None
    ttft: Percentiles = None
    ttft_queued: Percentiles = None
    tpot: Percentiles = None
    itl: Percentiles = None
    stored_bytes: int | None = None
    expected_bytes: int | None = None


def summarize_answers(row: ServingRow, answers: Sequence[Served]) -> None:
    """Counts, rates and percentiles of ``row`` from what each request got; ``row.seconds`` is known."""
    row.requests = len(answers)
    row.output_tokens = sum(len(answer.times_s) for answer in answers)
    if row.seconds:
        row.requests_per_s, row.tokens_per_s = row.requests / row.seconds, row.output_tokens / row.seconds
    row.ttft = percentiles([answer.ttft_s for answer in answers])
    row.ttft_queued = percentiles([answer.waited_s + answer.ttft_s for answer in answers])
    row.tpot = percentiles([answer.tpot_s for answer in answers])
    row.itl = percentiles([gap for answer in answers for gap in answer.itl_s])


def ratio_to_dynamic(row: ServingRow, rows: Sequence[ServingRow], dtype: str) -> float | None:
    """Tokens per second over those of ``dynamic`` in ``dtype`` at the same batch size; None if there is none."""
    found = (r for r in rows if (r.cache, r.dtype, r.batch_size) == (DYNAMIC, dtype, row.batch_size))
    other = next(found, None)
    if other is None or not row.tokens_per_s or not other.tokens_per_s or row.requests != other.requests:
        return None  # a budget that refuses some of the requests changes the mix
    return row.tokens_per_s / other.tokens_per_s
