"""What became of each request, in counts and times."""

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

OUTCOMES = ("finished", "failed", "cancelled", "refused")


@dataclass
class Entry:
    """One request.

    Args:
        request_id: its name.
        arrived: seconds on the clock of ``time.perf_counter``, as all times here.
        prompt_tokens: of its prompt.
        tokens: that it got.
        first, last: when the first and the newest were there.
        outcome: one of ``OUTCOMES``; empty while it runs.
    """

    request_id: str
    arrived: float = field(default_factory=time.perf_counter)
    prompt_tokens: int = 0
    tokens: int = 0
    first: float = 0.0
    last: float = 0.0
    outcome: str = ""

    def grown(self, tokens: int) -> None:
        """It has ``tokens`` now."""
        if tokens > self.tokens:
            self.tokens, self.last = tokens, time.perf_counter()
            self.first = self.first or self.last

    @property
    def ttft(self) -> float:
        """Seconds from its arrival to its first token (time to first token)."""
        return self.first - self.arrived

    @property
    def tpot(self) -> float:
        """Seconds per further token (time per output token)."""
        return (self.last - self.first) / max(1, self.tokens - 1)


class Ledger:
    """All requests of a server: those that run, and counts of those that are over.

    Everything happens on the event loop, so nothing is locked.

    Args:
        closed: called with each entry when its request is over.
        refused: called when there was no room for one.

    Attributes:
        room: requests that may be here at a time.
        live: entries of those that are, by name.
        outcomes: how many came to each of ``OUTCOMES``.
        prompt_tokens, generated_tokens: of those that are over.
    """

    def __init__(
        self, closed: Callable[[Entry], object] = lambda entry: None, refused: Callable[[], object] = lambda: None
    ) -> None:
        self.room = 1
        self.live: dict[str, Entry] = {}
        self.outcomes: Counter[str] = Counter()
        self.prompt_tokens = self.generated_tokens = 0
        self._closed, self._refused = closed, refused
        self._times: deque[float] = deque(maxlen=32)  # seconds that the newest finished ones took

    def open(self, request_id: str) -> Entry | None:
        """An entry for a request; None if there is no room."""
        if len(self.live) >= self.room:
            self.outcomes["refused"] += 1
            self._refused()
            return None
        entry = self.live[request_id] = Entry(request_id)
        return entry

    def close(self, entry: Entry, outcome: str) -> None:
        """A request is over; what it said of itself counts before ``outcome``."""
        del self.live[entry.request_id]
        entry.outcome = entry.outcome or outcome
        self.outcomes[entry.outcome] += 1
        self.prompt_tokens += entry.prompt_tokens
        self.generated_tokens += entry.tokens
        if entry.outcome == "finished":
            self._times.append(time.perf_counter() - entry.arrived)
        self._closed(entry)

    def retry_after(self) -> int:
        """Seconds after which a refused request may find room: 1 to 60."""
        typical = sorted(self._times)[len(self._times) // 2] if self._times else 1.0
        return min(60, max(1, round(typical / 2)))
