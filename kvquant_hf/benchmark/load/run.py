"""Load on several servers in turn, round by round."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..contenders import EXACT
from ..machine import describe
from ..serving.workload import Request
from ..statistics import interleaved
from ..status import FAILED, SKIPPED
from .client import Prompt, Target, drive, send_times
from .gate import OUTPUT_TOKENS, PROMPT_TOKENS, PROMPTS, judge_servers
from .prompts import exact_prompts
from .results import Load
from .rows import LoadRow, Turn, ratio_between, summarize_turns
from .servers import report_of


@dataclasses.dataclass(frozen=True)
class Plan:
    """What every server is given.

    Args:
        requests: the workload, in the order of arrival.
        rate: requests per second, arriving as a Poisson process; None: all at once.
        concurrency: most connections at a time; None: any number.
        rounds: loads for each server; every round has the same lengths and other texts.
        timeout: seconds that a server may be silent before a request counts as failed.
    """

    requests: Sequence[Request]
    rate: float | None = None
    concurrency: int | None = None
    rounds: int = 3
    timeout: float = 600.0


def load(
    targets: Sequence[Target],
    plan: Plan,
    tokenizer: Any,
    ids: Sequence[int],
    conditions: dict[str, Any],
    advance: Callable[[str, float], object] = lambda what, share: None,
) -> Load:
    """Give each of ``targets`` the load of ``plan``, one at a time and in turn, a round after the other.

    An interruption (Ctrl-C) leaves the rounds that were finished.

    Args:
        targets: running servers; ratios are against the first, and against ``exact`` if it is among them.
        plan: the load.
        tokenizer: that of the model.
        ids: a long text as token ids, without special ones; prompts are windows of it.
        conditions: what is to be said of the model and of how the servers were started.
        advance: called with what is being done and the share of all work done since the last call.

    Raises:
        BenchmarkInputError: the text is too short for the prompts.
    """
    lengths = [request.prompt_tokens for request in plan.requests]
    texts = [exact_prompts(tokenizer, ids, lengths, seed) for seed in range(plan.rounds)]
    questions = exact_prompts(tokenizer, ids, [PROMPT_TOKENS] * PROMPTS, plan.rounds)
    result = Load(
        conditions
        | {
            "requests": len(plan.requests),
            "prompt_tokens": sum(lengths),
            "output_tokens": sum(request.output_tokens for request in plan.requests),
            "rate_per_s": plan.rate,
            "concurrency": plan.concurrency,
            "rounds": plan.rounds,
            "checked_answers": PROMPTS,
        }
        | describe(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        [LoadRow(target.name) for target in targets],
    )
    turns: dict[str, list[Turn]] = {target.name: [] for target in targets}
    try:
        right = _judge(result.rows, targets, questions, plan, conditions.get("dtype"), advance)
        _take_turns(right, texts, plan, turns, advance)
        for row, target in zip(result.rows, targets, strict=True):
            _note_blocks(row, report_of(target))
    except KeyboardInterrupt:
        result.interrupted = True
    for row in result.rows:
        if row.status != FAILED:
            _finish(row, turns, targets[0].name, result.interrupted)
    return result


def _judge(
    rows: Sequence[LoadRow],
    targets: Sequence[Target],
    questions: Sequence[str],
    plan: Plan,
    dtype: str | None,
    advance: Callable[[str, float], object],
) -> list[Target]:
    """The servers that answer rightly; the rows of the others say why not."""
    verdicts = judge_servers(
        targets,
        [Prompt(text, OUTPUT_TOKENS) for text in questions],
        rounding=dtype != "float32",  # of a server that ran already nobody knows: 16 bits
        timeout=plan.timeout,
        advance=lambda what: advance(what, 0),
    )
    for row in rows:
        verdict = verdicts[row.server]
        row.same_answers = verdict.same
        if verdict.reason:
            row.status, row.reason = FAILED, verdict.reason
    return [target for target in targets if not verdicts[target.name].reason]


def _take_turns(
    targets: Sequence[Target],
    texts: Sequence[Sequence[str]],
    plan: Plan,
    turns: dict[str, list[Turn]],
    advance: Callable[[str, float], object],
) -> None:
    """Fill ``turns``: in each round every server has its load once, another one first each time."""
    share = 1 / max(1, plan.rounds * len(targets) * len(plan.requests))
    for turn, k in interleaved(len(targets), plan.rounds):
        target = targets[k]
        advance(f"{target.name}: load {turn + 1} of {plan.rounds}", 0)
        requests = zip(texts[turn], plan.requests, strict=True)
        answers = drive(
            target,
            [Prompt(text, request.output_tokens) for text, request in requests],
            send_times(len(plan.requests), plan.rate, turn),
            concurrency=plan.concurrency,
            timeout=plan.timeout,
            answered=lambda answer: advance("", share),
        )
        turns[target.name].append(Turn(answers))


def _note_blocks(row: LoadRow, report: dict[str, Any]) -> None:
    """What our server says of its blocks."""
    row.most_used_blocks = report.get("most_used_blocks")
    row.blocks = (report.get("cache") or {}).get("blocks")


def _finish(row: LoadRow, turns: dict[str, list[Turn]], first: str, interrupted: bool) -> None:
    """Numbers and ratios of a server that answers rightly."""
    mine = turns[row.server]
    if interrupted and not mine:
        row.status, row.reason = SKIPPED, "interrupted"
        return
    summarize_turns(row, mine)
    row.ratio = ratio_between(mine, turns[first])
    row.ratio_to_exact = ratio_between(mine, turns.get(EXACT, []))
