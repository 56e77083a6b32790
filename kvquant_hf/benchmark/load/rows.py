"""What was measured of one server."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..statistics import paired_ratio, percentiles
from ..status import FAILED, OK
from .answers import REFUSED, Answer, most_at_once

Percentiles = dict[str, float] | None


class Turn(NamedTuple):
    """The answers of one server to one round's load, in the order of the workload."""

    answers: list[Answer]

    @property
    def good(self) -> list[Answer]:
        """Those that were answered."""
        return [answer for answer in self.answers if answer.status == OK]

    @property
    def seconds(self) -> float:
        """From the first request that was sent to the last answer's end."""
        return max(answer.end_s for answer in self.good) - min(answer.sent_s for answer in self.answers)

    @property
    def output_tokens(self) -> int:
        """Tokens of all answers, as the server counts them."""
        return sum(answer.output_tokens for answer in self.good)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts that were answered, as the server counts them."""
        return sum(answer.prompt_tokens for answer in self.good)


@dataclass
class LoadRow:
    """One server; times in seconds, percentiles as ``{"p50", "p90", "p99"}`` over the requests of all rounds.

    Args:
        server: its name: ``"stock"``, a policy, or what it was called with ``--url``.
        status, reason: as in ``Row``; a server that answers wrongly has ``"failed"`` and no number.
        same_answers: of ``checked_answers`` short greedy ones before the load, those equal to the first server's.
        rounds: loads that it was given.
        requests, refused, failed: in all rounds: answered; refused by the server (429), not sent again; neither.
        prompt_tokens, output_tokens: of a round's answered requests, as the server counts them; the median.
        seconds: from the first request to the last answer's end; the median of the rounds, as are the next three.
        requests_per_s, output_tokens_per_s, total_tokens_per_s: over a round's seconds; total counts prompts too.
        round_tokens_per_s: output tokens per second of each round.
        ratio: output tokens per second over those of the first server, the median over rounds of the ratio in each.
        ratio_to_exact: the same against ``exact``.
        ttft: from sending to the first text; waiting for a turn is in it.
        tpot: per token of a request after its first, its mean.
        itl: between tokens that follow each other (``answers.py`` says how tokens are told apart).
        most_at_once: answers that were begun and had not ended, at most; those included that a server dropped for a
            while to make room.
        blocks, most_used_blocks: of our servers: blocks that requests can have, and the most that they had.
    """

    server: str
    status: str = OK
    reason: str = ""
    same_answers: int | None = None
    rounds: int = 0
    requests: int = 0
    refused: int = 0
    failed: int = 0
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    seconds: float | None = None
    requests_per_s: float | None = None
    output_tokens_per_s: float | None = None
    total_tokens_per_s: float | None = None
    round_tokens_per_s: list[float] = field(default_factory=list)
    ratio: float | None = None
    ratio_to_exact: float | None = None
    ttft: Percentiles = None
    tpot: Percentiles = None
    itl: Percentiles = None
    most_at_once: int | None = None
    blocks: int | None = None
    most_used_blocks: int | None = None


def summarize_turns(row: LoadRow, turns: Sequence[Turn]) -> None:
    """Fill ``row`` with what ``turns``, one for each round, have measured."""
    answers = [answer for turn in turns for answer in turn.answers]
    row.rounds = len(turns)
    row.requests = sum(answer.status == OK for answer in answers)
    row.refused = sum(answer.status == REFUSED for answer in answers)
    row.failed = sum(answer.status == FAILED for answer in answers)
    if not turns:
        return
    silent = [turn for turn in turns if not turn.good]
    if silent:
        row.status, row.reason = FAILED, f"no request was answered: {silent[0].answers[0].reason}"
        return
    row.seconds = statistics.median(turn.seconds for turn in turns)
    row.prompt_tokens = round(statistics.median(turn.prompt_tokens for turn in turns))
    row.output_tokens = round(statistics.median(turn.output_tokens for turn in turns))
    row.requests_per_s = statistics.median(len(turn.good) / turn.seconds for turn in turns)
    row.round_tokens_per_s = [turn.output_tokens / turn.seconds for turn in turns]
    row.output_tokens_per_s = statistics.median(row.round_tokens_per_s)
    row.total_tokens_per_s = statistics.median(
        (turn.prompt_tokens + turn.output_tokens) / turn.seconds for turn in turns
    )
    good = [answer for turn in turns for answer in turn.good]
    row.ttft = percentiles([answer.ttft_s for answer in good])
    row.tpot = percentiles([answer.tpot_s for answer in good if answer.output_tokens > 1])
    row.itl = percentiles([gap for answer in good for gap in answer.itl_s])
    row.most_at_once = max(most_at_once(turn.answers) for turn in turns)


def ratio_between(turns: Sequence[Turn], reference: Sequence[Turn]) -> float | None:
    """Output tokens per second of ``turns`` over those of ``reference``, the median over the rounds that both have.

    None if there is no such round, or if one of them answered other requests: another mix cannot be compared.
    """
    if any(len(mine.good) != len(theirs.good) for mine, theirs in zip(turns, reference, strict=False)):
        return None
    times = [[turn.seconds / turn.output_tokens for turn in side if turn.good] for side in (reference, turns)]
    return paired_ratio(*times)
