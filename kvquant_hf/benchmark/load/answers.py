"""What one request got, and when.  Times are seconds from the beginning of the load.

A server sends text, not tokens: an event of its stream has the text that a token added, and a token that adds none (a
special one, or half of a character) has no event.  How many tokens an answer has is what the server says at its end.
So the tokens of an answer are spread evenly over its events, and events that were read together share the time since
what was read before them.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from ..status import OK

REFUSED = "refused"


class Arrival(NamedTuple):
    """``events`` with text that were read together, ``at_s`` seconds after the beginning."""

    at_s: float
    events: int


class Answer(NamedTuple):
    """One request.

    Args:
        place: in the workload.
        status: ``"ok"``, ``"refused"`` (the server is full: 429) or ``"failed"``; ``reason`` says why.
        sent_s: when it was sent.
        arrivals: what was read, when; at least one if it is ok.
        end_s: when the server had said that this is the end, which it does with the last token.
        prompt_tokens, output_tokens: as the server counts them.
        text: the answer.
    """

    place: int
    status: str
    reason: str = ""
    sent_s: float = 0.0
    arrivals: tuple[Arrival, ...] = ()
    end_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: str = ""

    @property
    def ttft_s(self) -> float:
        """Seconds from sending to the first text; waiting for a turn is in it."""
        return self.arrivals[0].at_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Mean seconds per token after the first; the answer has two tokens or more."""
        return (self.end_s - self.arrivals[0].at_s) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Seconds between tokens that follow each other, one for each event after the first arrival."""
        events = sum(arrival.events for arrival in self.arrivals)
        tokens_per_event = self.output_tokens / events
        return [
            (after.at_s - before.at_s) / (after.events * tokens_per_event)
            for before, after in itertools.pairwise(self.arrivals)
            for _ in range(after.events)
        ]


def most_at_once(answers: Sequence[Answer]) -> int:
    """Answers that were begun and had not ended, at most: between their first text and their end."""
    spans = [(answer.arrivals[0].at_s, answer.end_s) for answer in answers if answer.status == OK]
    # An answer that ends as another begins makes room for it.
    steps = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    return max(itertools.accumulate(step for _, step in steps), default=0)
