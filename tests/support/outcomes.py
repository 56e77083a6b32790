"""One cell of docs/support.md: run a feature on an architecture with every cache and judge what comes out.

``exact`` against ``DynamicCache``: the same tokens.  Random models have close runners-up, so this is no matter of luck
only if rounding cannot decide: float32 logits may differ by 1e-4 of the largest, and the closest runner-up of any step
must be further off than twice the largest difference seen.

``int8`` against ``DynamicCache``: tokens may differ, so the measure is teacher-forced.  The exact model is led along
what ``int8`` generated, and the mean of the Kullback-Leibler divergence of each step's next-token distribution,
KL(exact || int8), must stay below ``MAX_KL``; for beams, the mean log-probability per token of each returned sequence
must be the exact model's within ``MAX_SCORE``.  And the cache must be smaller than its tokens in float32, with pages
sealed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from kvquant_hf.errors import KVQuantError
from kvquant_hf.report import CacheReport

from support.architectures import ARCHITECTURES, Architecture
from support.features import FEATURES, NotAvailableError, Runner, Turn

PAGES, FALLBACK, NONE, REFUSED, PENDING, WRONG = "✓", "fallback", "–", "refused", "pending", "✗"
"""Right and in pages; right and multiplied out; transformers has it not; refused with a clear error; not in this
version of the package; wrong, or an error nobody planned."""

RELATIVE_ROUNDING = 1e-4
MAX_KL = 1e-3
MAX_SCORE = (2 * MAX_KL) ** 0.5


@dataclass(frozen=True)
class Outcome:
    """What a cell says: one of the words above, and a reason where it needs one."""

    status: str
    reason: str = ""
    detail: str = ""  # numbers and tracebacks; not part of the table


class Mismatch(AssertionError):
    """Two caches disagree; the first argument is for the table, the second for who looks into it."""


def kl(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(exact || other) in nats of logits ``[steps, batch, vocabulary]``."""
    p, q = exact.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def check_exact(expected: list[Turn], got: list[Turn]) -> None:
    """Raise ``Mismatch`` unless both are equal, and not by luck."""
    for theirs, ours in zip(expected, got, strict=True):
        if theirs.sequences.shape != ours.sequences.shape or not torch.equal(theirs.sequences, ours.sequences):
            raise Mismatch("exact: other tokens than DynamicCache", f"{theirs.sequences}\n{ours.sequences}")
        if theirs.logits is None and theirs.scores is None:
            continue
        if theirs.logits is None or ours.logits is None:
            assert theirs.scores is not None and ours.scores is not None
            rounding, gaps = (theirs.scores - ours.scores).abs().max(), theirs.scores.view(-1, 2).diff().abs()
            bound, margin = RELATIVE_ROUNDING * theirs.scores.abs().max(), gaps.min()
        else:
            rounding = (theirs.logits - ours.logits).abs().max()
            bound = RELATIVE_ROUNDING * theirs.logits.abs().max()
            margin = -theirs.logits.topk(2, -1).values.diff().max()
        if not rounding <= bound:
            raise Mismatch("exact: other logits than DynamicCache", f"by {rounding:.2e}, allowed {bound:.2e}")
        if not margin > 2 * rounding:
            raise Mismatch("exact: a tie decides", f"margin {margin:.2e}, rounding {rounding:.2e}")


def divergences(exact: Runner, turns: list[Turn]) -> list[float]:
    """How far each turn is from the exact model led along it: nats per token, over what its measure allows."""
    found = []
    for turn in turns:
        if turn.logits is None and turn.scores is None:
            continue
        led = exact.lead(turn)
        if turn.logits is not None:
            found.append(kl(led[-turn.logits.shape[0] :], turn.logits) / MAX_KL)
            continue
        assert turn.scores is not None
        new = turn.sequences[:, -led.shape[0] :].T.unsqueeze(-1)
        scores = led.log_softmax(-1).gather(-1, new).squeeze(-1).mean(0)
        found.append((scores - turn.scores).abs().max().item() / MAX_SCORE)
    return found


def check_close(exact: Runner, turns: list[Turn]) -> None:
    """Raise ``Mismatch`` unless the turns are what a cache with small rounding errors generates."""
    worst = max(divergences(exact, turns))
    if not 0 < worst <= 1:
        raise Mismatch("int8: too far from DynamicCache", f"{worst:.2f} times what is allowed")


def check_smaller(report: CacheReport) -> None:
    """Raise ``Mismatch`` unless pages are sealed and everything held is smaller than the tokens in float32."""
    if not (report.packed_bytes > 0 and report.bytes < report.dense_bytes):
        raise Mismatch("int8: not smaller than DynamicCache", f"{report.bytes} of {report.dense_bytes} bytes")


def path(reports: list[CacheReport]) -> tuple[str, str]:
    """``PAGES`` or ``FALLBACK``, and the reasons of the latter."""
    reasons = sorted({reason for report in reports for reason in report.fallback_reasons})
    if reasons:
        return FALLBACK, "; ".join(reasons)
    assert sum(report.paged_calls for report in reports) > 0, "attention never read the cache"
    return PAGES, ""


def first_line(error: BaseException) -> str:
    """``Type: message`` in one line, for a footnote."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {' '.join(lines[0].split())}"[:240]


def judge(check: Callable[[], tuple[str, str]]) -> Outcome:
    """The outcome of ``check``, whose errors are those of the package."""
    try:
        return Outcome(*check())
    except NotAvailableError as error:
        return Outcome(PENDING, str(error))
    except KVQuantError as error:
        return Outcome(REFUSED, first_line(error))
    except Mismatch as error:
        return Outcome(WRONG, *map(str, error.args))
    except Exception as error:
        return Outcome(WRONG, first_line(error))


@lru_cache(maxsize=None)
def evaluate(architecture: str, feature: str) -> Outcome:
    """The cell of an architecture and a feature, with the installed transformers."""
    row, run = ARCHITECTURES[architecture], FEATURES[feature].run
    if not row.exists:
        return Outcome(NONE, "this version of transformers does not have the architecture")
    try:
        expected = run(Runner(row, None))
    except Exception as error:  # transformers' own cache cannot do it either
        return Outcome(NONE, f"transformers with DynamicCache: {first_line(error)}")

    def check() -> tuple[str, str]:
        exact, int8 = Runner(row, "exact"), Runner(row, "int8")
        check_exact(expected, run(exact))
        check_close(Runner(row, None), run(int8))
        for cache in int8.caches:
            check_smaller(cache.report())
        return path([cache.report() for cache in exact.caches])

    return judge(check)
