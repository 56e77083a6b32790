"""Decode steps of all caches of one context, in turn in one process; and the prompt that fills each of them.

Every cache reads the same prompt in the same chunks, then the same ``CHECKED - 1`` tokens one by one, which are those
that ``DynamicCache`` in the same dtype chooses; the choices are compared.  Only then are steps timed: each round lets
every cache decode one token of its own, starting with another cache each time, so that whatever else the machine does
slows all alike.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ...errors import BenchmarkError
from ...transformers_api.names import with_cache
from ..contenders import DYNAMIC, EXACT, OURS, Contender
from ..machine import synchronize
from ..statistics import interleaved, paired_ratio, summarize
from ..status import FAILED, OK
from .check import judge
from .rows import Row

CHECKED = 9
# However slow, so many rounds are waited for.
FEWEST_ROUNDS = 5


class OutOfTimeError(Exception):
    """A cell has used up its time; the message says on what."""


class Deadline:
    """Seconds from now on."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def passed(self) -> bool:
        """Whether they are over."""
        return time.monotonic() > self._end

    def check(self, doing: str) -> None:
        """Raise ``OutOfTimeError`` if they are over."""
        if self.passed():
            raise OutOfTimeError(f"{doing} took more than the {self.seconds:g} s of --timeout")


class Prefilled(NamedTuple):
    """A cache that has read a prompt, the logits behind it ``[1, vocabulary]``, and the times of a ``Row``."""

    cache: Any
    logits: torch.Tensor
    prefill_s: float
    ttft_s: float


def forward(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits behind the last of ``ids`` ``[1, tokens]``, as ``[1, vocabulary]``."""
    # Logits of a whole chunk would be the largest tensor of all.
    options = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    output = model(ids, use_cache=True, **with_cache(cache), **options)
    return output.logits[:, -1]


def prefill(
    model: Any, contender: Contender, prompt: torch.Tensor, tokens: int, chunk: int, deadline: Deadline
) -> Prefilled:
    """Make a cache for ``tokens`` tokens and read ``prompt`` ``[1, tokens]`` in chunks.

    Raises:
        OutOfTimeError: between two chunks.
    """
    start = time.perf_counter()
    cache = contender.make(model, tokens)
    begin = time.perf_counter()
    for part in prompt.split(chunk, dim=1):
        deadline.check("reading the prompt")
        logits = forward(model, part, cache)
    synchronize(prompt.device)
    end = time.perf_counter()
    int(logits.argmax())
    return Prefilled(cache, logits, end - begin, time.perf_counter() - start)


class Lane:
    """One cache on its way: ``row`` is what will be said of it."""

    def __init__(self, row: Row, contender: Contender, model: Any) -> None:
        self.row = row
        self.contender = contender
        self.model = model
        self.cache: Any = None
        self.token = torch.empty(0)
        self.samples: list[float] = []

    def start(self, prompt: torch.Tensor, chunk: int, deadline: Deadline, teacher: torch.Tensor | None) -> torch.Tensor:
        """Read the prompt and the tokens to be checked; logits ``[CHECKED, vocabulary]`` on the CPU.

        Args:
            prompt: ``[1, tokens]``.
            chunk: tokens per forward pass.
            deadline: for all of this.
            teacher: the tokens to read, ``[CHECKED - 1]``; None: its own choices.
        """
        self.cache, logits, self.row.prefill_s, self.row.ttft_s = prefill(
            self.model, self.contender, prompt, self.row.context, chunk, deadline
        )
        self.row.prompt_tokens = prompt.shape[1]
        seen = [logits]
        for i in range(CHECKED - 1):
            deadline.check("the check")
            token = logits.argmax(-1) if teacher is None else teacher[i : i + 1]
            logits = forward(self.model, token.view(1, 1), self.cache)
            seen.append(logits)
        self.token = logits.argmax(-1).view(1, 1)
        return torch.cat(seen).float().cpu()

    def step(self) -> None:
        """Decode one token, and keep how long it took."""
        begin = time.perf_counter()
        chosen = forward(self.model, self.token, self.cache).argmax(-1)
        int(chosen)  # waits for the device
        self.samples.append(time.perf_counter() - begin)
        self.token = chosen.view(1, 1)

    def finish(self) -> None:
        """Put what was measured into the row."""
        times = summarize(self.samples)
        self.row.rounds = times.rounds
        self.row.p20_ms, self.row.p50_ms, self.row.p80_ms = (1e3 * x for x in (times.p20, times.p50, times.p80))
        self.row.tokens_per_s = 1 / times.p50
        self.row.stored_bytes = self.contender.held(self.cache)
        if self.contender.family == OURS:
            self.row.implementation = self.cache.report().implementation

    def fail(self, error: BaseException) -> None:
        """Whatever a library raises is a result here."""
        self.cache = None
        self.samples = []
        lines = str(error).strip().splitlines() or ["no message"]
        text = lines[0] if isinstance(error, OutOfTimeError) else f"{type(error).__name__}: {lines[0]}"
        self.row.gave_up(FAILED, text)


def race(
    lanes: Sequence[Lane],
    prompt: torch.Tensor,
    *,
    rounds: int,
    chunk: int,
    timeout: float,
    advance: Callable[[str, float], object] = lambda what, share: None,
) -> None:
    """Fill the rows of ``lanes``, all of one context; ``DynamicCache`` comes before the others of its dtype.

    An interruption (Ctrl-C) leaves the rounds that were finished in the rows, and is raised again.

    Args:
        lanes: what to time.
        prompt: ``[1, tokens]``.
        rounds: decode steps of each.
        chunk: tokens per forward pass of the prompt.
        timeout: seconds that each prompt may take, and all rounds together.
        advance: told what is done, and the share of the context's work that this was.

    Raises:
        BenchmarkError: ``exact`` does not choose what ``DynamicCache`` chooses.
    """
    references: dict[torch.dtype, torch.Tensor] = {}
    for lane in lanes:
        advance(f"{lane.row.cache} {lane.row.dtype}: {prompt.shape[1]:,} tokens of prompt", 0)
        dtype = lane.model.dtype
        reference = references.get(dtype)
        teacher = None if reference is None else reference[:-1].argmax(-1).to(prompt.device)
        try:
            logits = lane.start(prompt, chunk, Deadline(timeout), teacher)
        except Exception as error:
            lane.fail(error)
        else:
            if lane.row.cache == DYNAMIC:
                references[dtype] = logits
            _check(lane, references.get(dtype), logits)
        advance("", 0.5 / len(lanes))
    running = [lane for lane in lanes if lane.row.status == OK]
    try:
        _rounds(running, rounds, Deadline(timeout), advance)
    finally:
        _compare(running)


def _check(lane: Lane, reference: torch.Tensor | None, logits: torch.Tensor) -> None:
    """Note the agreement; what cannot be right is not timed."""
    verdict = judge(logits if reference is None else reference, logits)
    if reference is not None:
        lane.row.checked, lane.row.top1_agreement = len(logits), verdict.agreement
    if not verdict.finite:
        lane.fail(ArithmeticError("the logits are not finite"))
    elif lane.contender.lossless and not verdict.lossless(lane.model.dtype):
        wrong = (
            f"{lane.row.cache!r} in {lane.row.dtype} at {lane.row.context} tokens chooses other tokens than "
            f"DynamicCache ({verdict.gap:.2g} deviations apart)"
        )
        if lane.row.cache == EXACT:
            raise BenchmarkError(
                f"{wrong}, so no time would mean anything; run the tests of kvquant-hf on this machine."
            )
        lane.fail(ArithmeticError(wrong))


def _rounds(lanes: Sequence[Lane], rounds: int, deadline: Deadline, advance: Callable[[str, float], object]) -> None:
    for turn, k in interleaved(len(lanes), rounds):
        first = k == turn % len(lanes)
        if first and turn >= FEWEST_ROUNDS and deadline.passed():
            advance("", 0.5 * (1 - turn / rounds))
            return
        lane = lanes[k]
        if lane.row.status == OK:
            if first:
                advance(f"{lane.row.context:,} tokens: round {turn + 1} of {rounds}", 0.5 / rounds)
            try:
                lane.step()
            except Exception as error:
                lane.fail(error)


def _compare(lanes: Sequence[Lane]) -> None:
    """Summaries and ratios of what has run."""
    timed = [lane for lane in lanes if lane.samples]
    for lane in timed:
        lane.finish()
    dynamic = {lane.row.dtype: lane for lane in timed if lane.row.cache == DYNAMIC}
    fastest = min(dynamic.values(), key=lambda lane: lane.row.p50_ms or 0.0, default=None)
    for lane in timed:
        if fastest is not None:
            lane.row.ratio = paired_ratio(fastest.samples, lane.samples)
        if lane.row.dtype in dynamic:
            lane.row.ratio_same_dtype = paired_ratio(dynamic[lane.row.dtype].samples, lane.samples)
