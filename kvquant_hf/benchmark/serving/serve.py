"""Many requests in static batches through ``model.generate``: the same budget of memory for every cache.

All requests are there from the beginning.  A cache that takes fewer bytes per token gets larger batches out of the same
budget; that is what this measures.  Bytes are reckoned before a batch runs (``expected_bytes``, an upper bound) and
weighed when it is done.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...errors import BenchmarkInputError
from ...transformers_api.names import with_cache
from ..contenders import USUAL_POLICIES, Contender, Dimensions, choose, expected_bytes
from ..machine import available_memory, describe, synchronize
from ..plan import SHARE, known_dtypes
from ..status import FAILED, SKIPPED
from ..subject import Subject, in_memory
from ..tables import size
from .batching import Batch, Served, fill_batches, served
from .results import Serving
from .rows import ServingRow, ratio_to_dynamic, summarize_answers
from .workload import Request


class _Clock:
    """A stopping criterion that never stops and notes when each token was there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        synchronize(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def serve(
    subject: Any,
    requests: Sequence[Request],
    *,
    kv_budget: int | None = None,
    batch_sizes: Sequence[int | None] = (None,),
    policies: Sequence[str] = USUAL_POLICIES,
    dtypes: Sequence[str] = ("bfloat16",),
    about: str = "",
    advance: Callable[[str, float], object] = lambda what, share: None,
) -> Serving:
    """Answer ``requests`` with every cache, in batches.

    Args:
        subject: a ``Subject`` or a model.
        requests: the workload (``draw_requests``, ``read_requests``), in the order of arrival.
        kv_budget: bytes that the cache of a batch may take; None: any, then ``batch_sizes`` must be given.
        batch_sizes: requests per batch; None: as many as fit into the budget.
        policies: ours; ``dynamic`` and ``exact`` always are.
        dtypes: every cache is measured in each.
        about: what the workload is, for the record.
        advance: called with what is being done and the share of all work done since the last call.

    Returns:
        A row for each batch size, cache and dtype.  Measured once, one after the other.

    Raises:
        BenchmarkInputError, UnknownPolicyError: something that was asked for does not exist or does not fit the model.
    """
    subject = subject if isinstance(subject, Subject) else in_memory(subject)
    dtypes = known_dtypes(dtypes)
    if kv_budget is None and None in batch_sizes:
        raise BenchmarkInputError(
            "batches have neither a size nor a budget; use --kv-budget 1GB or --batch-sizes 8,16."
        )
    longest = max(request.prompt_tokens for request in requests) + max(request.output_tokens for request in requests)
    limit = min(x for x in (subject.limit, len(subject.ids)) if x is not None)
    if longest > limit:
        raise BenchmarkInputError(
            f"a batch may hold {longest} tokens and the model or the text has {limit}; use a smaller --max-prompt or "
            "--max-output."
        )
    models = {dtype: subject.load(dtype) for dtype in dtypes}
    device = next(iter(models.values())).device
    contenders = choose(policies, [])
    result = Serving(
        {
            "model": subject.description,
            "random_weights": subject.random_weights,
            "workload": about,
            "requests": len(requests),
            "prompt_tokens": sum(request.prompt_tokens for request in requests),
            "output_tokens": sum(request.output_tokens for request in requests),
            "kv_budget_bytes": kv_budget,
            "batch_sizes": list(batch_sizes),
            "dtypes": list(dtypes),
        }
        | describe(device)
    )
    plan = [(most, contender, dtype) for most in batch_sizes for dtype in dtypes for contender in contenders]
    result.rows = [ServingRow(c.name, c.family, dtype, most) for most, c, dtype in plan]
    done = 0
    try:
        for row, (_, contender, dtype) in zip(result.rows, plan, strict=True):
            work = advance, 1 / len(plan)
            try:
                _serve_row(row, contender, models[dtype], subject, requests, kv_budget, *work)
            except Exception as error:
                lines = str(error).strip().splitlines() or ["no message"]
                row.status, row.reason = FAILED, f"{type(error).__name__}: {lines[0]}"
            done += 1
            row.ratio = ratio_to_dynamic(row, result.rows, dtypes[0])
    except KeyboardInterrupt:
        result.interrupted = True
        for row in result.rows[done:]:
            row.status, row.reason = SKIPPED, "interrupted"
    return result


def _serve_row(
    row: ServingRow,
    contender: Contender,
    model: Any,
    subject: Subject,
    requests: Sequence[Request],
    budget: int | None,
    advance: Callable[[str, float], object],
    share: float,
) -> None:
    """Run the whole workload with one cache and fill its row."""
    dims = Dimensions.of(model.config)

    def cost(batch: int, tokens: int) -> int:
        return expected_bytes(contender.name, dims, tokens, model.dtype, batch)

    # Batches of a given size are not cut smaller to fit: that they do not is the result.
    batches, refused = fill_batches(requests, cost, None if row.batch_size else budget, row.batch_size)
    row.refused = len(refused)
    row.expected_bytes = max((cost(len(b.requests), b.tokens) for b in batches), default=None)
    available = available_memory(model.device)
    reason = ""
    if not batches:
        reason = f"no request fits into the budget of {size(budget)}"
    elif budget is not None and (row.expected_bytes or 0) > budget:
        reason = f"batches of {row.batch_size} need {size(row.expected_bytes)}, the budget is {size(budget)}"
    elif available is not None and (row.expected_bytes or 0) > SHARE * available:
        reason = f"needs {size(row.expected_bytes)} of memory, {size(available)} are free"
    if reason:
        row.status, row.reason = SKIPPED, reason
        advance("", share)
        return
    answers: list[Served] = []
    held = 0
    begin = time.perf_counter()
    for batch in batches:
        advance(f"{contender.name} {row.dtype}: {len(batch.requests)} requests side by side", 0)
        start = time.perf_counter()
        times, cache = run_batch(model, contender, batch, subject.ids)
        answers += served(batch, start - begin, [t - start for t in times])
        held = max(held, contender.held(cache))
        del cache
        advance("", share / len(batches))
    row.seconds = max(a.waited_s + a.times_s[-1] for a in answers)
    summarize_answers(row, answers)
    row.batches, row.largest_batch, row.stored_bytes = len(batches), max(len(b.requests) for b in batches), held


def run_batch(model: Any, contender: Contender, batch: Batch, ids: Sequence[int]) -> tuple[list[float], Any]:
    """Answer one batch; the times (``perf_counter``) at which each further token was there, and the filled cache.

    Every request reads the first of ``ids``, padded on the left, and writes to the end of the longest answer.
    """
    longest = batch.prompt_tokens
    pad = int(ids[0])
    lengths = [request.prompt_tokens for request in batch.requests]
    rows = [[pad] * (longest - n) + list(ids[:n]) for n in lengths]
    masks = [[0] * (longest - n) + [1] * n for n in lengths]
    cache = contender.make(model, batch.tokens)
    clock = _Clock(model.device)
    with _without_end(model, pad):
        model.generate(
            torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(masks, device=model.device),
            **with_cache(cache),
            max_new_tokens=batch.output_tokens,
            do_sample=False,
            stopping_criteria=[clock],
        )
    return clock.times, cache


@contextmanager
def _without_end(model: Any, pad: int) -> Iterator[None]:
    """Every answer as long as asked for, whatever the model's own settings."""
    settings = model.generation_config
    model.generation_config = type(settings)(pad_token_id=pad, eos_token_id=None, bos_token_id=None)
    try:
        yield
    finally:
        model.generation_config = settings
