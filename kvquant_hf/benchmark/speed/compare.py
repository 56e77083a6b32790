"""``compare``: speed and memory of KV caches side by side."""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...errors import BenchmarkInputError
from ..contenders import BASELINES, USUAL_POLICIES, Contender, Dimensions, choose, expected_bytes, working_bytes
from ..machine import available_memory, describe
from ..plan import SHARE, crowded_out, known_dtypes, out_of_reach, prompt_tokens
from ..status import OK, SKIPPED
from ..subject import Subject, in_memory
from ..tables import size
from .apart import Job, Peak, measure_apart
from .race import CHECKED, Lane, forward, race
from .results import Comparison
from .rows import Row

CONTEXTS = (1024, 4096, 8192, 32768)
DTYPES = ("float32", "bfloat16")
Advance = Callable[[str, float], object]


def compare(
    subject: Any,
    *,
    contexts: Sequence[int] = CONTEXTS,
    policies: Sequence[str] = USUAL_POLICIES,
    baselines: Sequence[str] = BASELINES,
    dtypes: Sequence[str] | None = None,
    rounds: int = 24,
    prefill_chunk: int = 512,
    peak: bool = True,
    timeout: float = 600.0,
    advance: Advance = lambda what, share: None,
) -> Comparison:
    """Time decode steps and prefill, and weigh caches, side by side.

    Args:
        subject: a ``Subject`` (``shape(...)``, ``in_memory(...)``) or a model, batch 1.
        contexts: tokens held at the end of each measurement.
        policies, baselines: our policies and transformers' caches; ``exact`` and ``dynamic`` always are.
        dtypes: every cache is measured in each; default: ``default_dtypes()``, or the dtype of a model in memory.
        rounds: decode steps of each cache.
        prefill_chunk: tokens per forward pass of a prompt.
        peak: also measure the peak memory, each cache at each context in a process of its own.
        timeout: seconds that a prompt may take, the rounds of a context together, or a process after loading.
        advance: called with what is being done and the share of all work that was done since the last call.

    Returns:
        A row for each cache, dtype and context, with a reason where there is no number.  Ctrl-C ends it early, with
        what was measured until then.

    Raises:
        BenchmarkInputError, UnknownPolicyError: something that was asked for does not exist.
        BenchmarkError: ``exact`` and ``DynamicCache`` do not agree, so no time would mean anything.
    """
    subject = subject if isinstance(subject, Subject) else in_memory(subject)
    if dtypes is None:
        held = subject.model
        dtypes = default_dtypes() if held is None else (str(held.dtype).removeprefix("torch."),)
    dtypes = known_dtypes(dtypes)
    if rounds < 1 or prefill_chunk < 1:
        raise BenchmarkInputError("rounds and prefill_chunk must be positive; leave them out for the usual ones.")
    if not contexts:
        raise BenchmarkInputError("there is no context to measure at; give one, for instance contexts=(1024,).")
    contenders = choose(policies, baselines)
    prompts = {context: prompt_tokens(context, CHECKED, rounds) for context in contexts}
    models = {dtype: subject.load(dtype) for dtype in dtypes}
    device = next(iter(models.values())).device
    result = Comparison(
        {
            "model": subject.description,
            "random_weights": subject.random_weights,
            "batch": 1,
            "contexts": list(contexts),
            "dtypes": list(dtypes),
            "rounds": rounds,
            "checked_positions": CHECKED,
            "prefill_chunk": prefill_chunk,
            "timeout_s": timeout,
        }
        | describe(device)
    )
    # Longer contexts take longer; so do processes, which read every prompt again.
    shares = {context: context / sum(prompts) / (2 if peak else 1) for context in prompts}
    try:
        _warm_up(models, subject.ids, min(prefill_chunk, *prompts.values()))
        for context, length in prompts.items():
            lanes = _lanes(result, subject, models, contenders, context, prefill_chunk)
            prompt = torch.tensor([list(subject.ids[:length])], device=device)

            def part(what: str, share: float, whole: float = shares[context]) -> None:
                advance(what, share * whole)

            with torch.inference_mode():
                race(lanes, prompt, rounds=rounds, chunk=prefill_chunk, timeout=timeout, advance=part)
            lanes.clear()
        dims = Dimensions.of(next(iter(models.values())).config)
        weights = {dtype: sum(p.nbytes for p in model.parameters()) for dtype, model in models.items()}
        models.clear()  # the processes need the room
        gc.collect()
        if peak:
            _peaks(result, subject, device, dims, weights, prefill_chunk, timeout, shares, advance)
    except KeyboardInterrupt:
        result.interrupted = True
        _say_what_is_missing(result, contenders, dtypes, contexts)
    return result


def default_dtypes() -> tuple[str, ...]:
    """Both on a CPU, where the faster one depends on the cache; bfloat16 on a GPU."""
    return ("bfloat16",) if torch.cuda.is_available() else DTYPES


def _warm_up(models: dict[str, Any], ids: Sequence[int], tokens: int) -> None:
    """Read a chunk with each model, so that the first cache does not pay for what is set up once."""
    for model in models.values():
        with torch.inference_mode():
            forward(model, torch.tensor([list(ids[:tokens])], device=model.device), None)


def _lanes(
    result: Comparison,
    subject: Subject,
    models: dict[str, Any],
    contenders: Sequence[Contender],
    context: int,
    chunk: int,
) -> list[Lane]:
    """Rows for one context; lanes for those that can run."""
    model = next(iter(models.values()))
    dims = Dimensions.of(model.config)
    rows = {
        f"{c.name} {dtype}": (Row(c.name, c.family, dtype, context), c, dtype) for c in contenders for dtype in models
    }
    result.rows += [row for row, _, _ in rows.values()]
    nowhere = out_of_reach(context, subject.limit, len(subject.ids))
    needs, working = {}, 0
    for name, (row, contender, dtype) in rows.items():
        if contender.missing or nowhere:
            row.gave_up(SKIPPED, contender.missing or nowhere)
            continue
        kind = getattr(torch, dtype)
        needs[name] = expected_bytes(contender.name, dims, context, kind)
        working = max(working, working_bytes(contender.name, dims, context, chunk, kind))
    for name, reason in crowded_out(needs, working, available_memory(model.device)).items():
        rows[name][0].gave_up(SKIPPED, reason)
    return [Lane(row, contender, models[dtype]) for row, contender, dtype in rows.values() if row.status == OK]


def _peaks(
    result: Comparison,
    subject: Subject,
    device: torch.device,
    dims: Dimensions,
    weights: dict[str, int],
    chunk: int,
    timeout: float,
    shares: dict[int, float],
    advance: Advance,
) -> None:
    """Measure the memory of every row that ran."""
    with subject.load_apart() as load:
        for context, share in shares.items():
            rows = [row for row in result.rows if row.context == context and row.status == OK]
            for row in rows:
                advance(f"{row.cache} {row.dtype}: memory at {context:,} tokens, in a process of its own", 0)
                kind = getattr(torch, row.dtype)
                needed = expected_bytes(row.cache, dims, context, kind)
                needed += working_bytes(row.cache, dims, context, chunk, kind) + weights[row.dtype]
                available = available_memory(device)
                if available is not None and needed > SHARE * available:
                    found = Peak(None, f"needs {size(needed)} with the model, {size(available)} are free")
                else:
                    ids = list(subject.ids[: row.prompt_tokens])
                    threads = torch.get_num_threads()
                    ours = row.family != "transformers"
                    found = measure_apart(Job(load, row.dtype, row.cache, ours, ids, context, chunk, threads, timeout))
                row.peak_bytes, row.peak_how, row.cuda_peak_bytes = found
                advance("", share / len(rows))
            if not rows:
                advance("", share)


def _say_what_is_missing(
    result: Comparison, contenders: Sequence[Contender], dtypes: Sequence[str], contexts: Sequence[int]
) -> None:
    """After Ctrl-C: a reason for everything that was not reached."""
    there = {(row.cache, row.dtype, row.context) for row in result.rows}
    for context in contexts:
        for contender in contenders:
            for dtype in dtypes:
                if (contender.name, dtype, context) not in there:
                    result.rows.append(Row(contender.name, contender.family, dtype, context))
    for row in result.rows:
        if row.status == OK and row.p50_ms is None:
            row.gave_up(SKIPPED, "interrupted")
        elif row.status == OK and row.peak_bytes is None and not row.peak_how:
            row.peak_how = "interrupted"
