"""One cell of docs/support.md: run a feature on an architecture with every cache, and judge what comes out.

``exact`` against ``DynamicCache``: the same tokens.  Random models have close runners-up, so equal tokens are more than
luck only where rounding cannot decide: logits in float32 may differ by 1e-4 of the largest, and the closest runner-up
of any step must be further off than twice the largest difference seen.

``int8`` against ``DynamicCache``: tokens may differ, so the measure is teacher-forced.  The exact model is led along
what ``int8`` generated, and the mean over its steps of KL(exact || int8), the Kullback-Leibler divergence of the
next-token distributions, must stay below ``MAX_KL``.  Logits that are off by a noise of standard deviation s make a
divergence of about s^2 / 2: the bound allows 0.07, where the logits of these models spread by 1.6, and int8 makes
three quarters of it for gpt-oss, a tenth for most.  Losing one of the pages costs ten times the bound and more
(``LossyCache``).  For beams, and for requests in batches, the mean log-probability per token of each returned sequence
must be the exact model's within that same noise.  And what is held must be smaller than its tokens in float32, with
pages sealed.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from stand_ins import NAMES
from support.architectures import ARCHITECTURES
from support.batches import at_once, is_a_tie, one_by_one
from support.features import FEATURES, PAGE, Runner, Turn, greedy, model_of
from transformers import Cache, DynamicCache

from kvquant_hf.batching.hooks import OLDEST, unsupported
from kvquant_hf.errors import KVQuantError
from kvquant_hf.layers.paged import PagedLayer
from kvquant_hf.reports.report import CacheReport

PAGES, FALLBACK, NONE, REFUSED, WRONG = "✓", "fallback", "–", "refused", "✗"
STATUSES = {
    PAGES: "right, and attention reads the pages",
    FALLBACK: "right, and attention reads the cache multiplied out",
    NONE: "transformers does not do it either",
    REFUSED: "refused with an error that says so",
    WRONG: "wrong",
}

RELATIVE_ROUNDING = 1e-4
MAX_KL = 2.5e-3  # the largest measured is 1.9e-3, gpt-oss with all four layers quantized; most rows stay below 0.2e-3
MAX_SCORE = (2 * MAX_KL) ** 0.5
LAYERS, ATTENTION = "layers", "attention"
BATCHING = "continuous batching"
COLUMNS = [LAYERS, ATTENTION, *FEATURES, BATCHING]


@dataclass(frozen=True)
class Outcome:
    """What a cell says.

    Args:
        text: one of ``STATUSES``, or the text of the columns on layers and attention.
        reason: where the text needs one.
        detail: numbers for who looks into it; no part of the table.
    """

    text: str
    reason: str = ""
    detail: str = ""


class Mismatch(AssertionError):  # noqa: N818  # a finding, not an error of the program
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
        if theirs.logits is not None and ours.logits is not None:
            rounding = (theirs.logits - ours.logits).abs().max()
            bound = RELATIVE_ROUNDING * theirs.logits.abs().max()
            margin = -theirs.logits.topk(2, -1).values.diff().max()
        elif theirs.scores is not None and ours.scores is not None:
            rounding = (theirs.scores - ours.scores).abs().max()
            bound = RELATIVE_ROUNDING * theirs.scores.abs().max()
            margin = theirs.scores.view(-1, 2).diff().abs().min()  # two sequences per prompt come back
        else:
            continue
        if not rounding <= bound:
            raise Mismatch("exact: other logits than DynamicCache", f"by {rounding:.2e}, allowed {bound:.2e}")
        if not margin > 2 * rounding:
            raise Mismatch("exact: a tie decides", f"margin {margin:.2e}, rounding {rounding:.2e}")


def distance(exact: Runner, turns: list[Turn]) -> float:
    """How far the turns are from the exact model led along them, as a share of what is allowed."""
    found = [0.0]
    for turn in turns:
        if turn.logits is not None:
            led = exact.lead(turn)
            found.append(kl(led[-turn.logits.shape[0] :], turn.logits) / MAX_KL)
        elif turn.scores is not None:
            led = exact.lead(turn)
            new = turn.sequences[:, -led.shape[0] :].T.unsqueeze(-1)
            scores = led.log_softmax(-1).gather(-1, new).squeeze(-1).mean(0)
            found.append((scores - turn.scores).abs().max().item() / MAX_SCORE)
    return max(found)


def check_small(reports: list[CacheReport]) -> None:
    """Raise ``Mismatch`` unless pages are sealed and everything held is smaller than the tokens in float32.

    Windows of 12 tokens are hardly more than an open page of 8; where there is nothing else, sealed pages are compared.
    """
    for report in reports:
        windows_only = sum(report.sliding_layers.values()) == report.paged_layers
        small = report.page_bits_per_element < 16 if windows_only else report.bytes < report.dense_bytes
        if not (report.packed_bytes > 0 and small):
            raise Mismatch("int8: not smaller than DynamicCache", f"{report.bytes} of {report.dense_bytes} bytes")


def reports(run: Runner) -> list[CacheReport]:
    """What the caches of a run say, copies of them included."""
    return [cache.report() for cache in run.caches]


def path(run: Runner) -> tuple[str, str]:
    """``PAGES`` or ``FALLBACK``, and the reasons of the latter; what ran in a graph is seen in the graph."""
    found, graphs = reports(run), run.operators
    reasons = sorted({reason for report in found for reason in report.fallback_reasons})
    if not reasons and graphs["multiply_out"]:
        reasons = ["in a graph"]
    in_graphs = graphs["paged_attention"] + graphs["latent_attention"]
    if not reasons and not any(report.paged_calls for report in found) and not in_graphs:
        raise Mismatch("attention never read the cache")
    return (FALLBACK, "; ".join(reasons)) if reasons else (PAGES, "")


def one_line(error: BaseException) -> str:
    """``Type: message`` for a footnote, without what is printed of modules in between."""
    message = " ".join(re.sub(r"\(\n.*\n\)", "", str(error), flags=re.DOTALL).split())
    return f"{type(error).__name__}: {message}"[:300]


def judge(check: Callable[[], Outcome]) -> Outcome:
    """The outcome of ``check``, which runs our cache."""
    try:
        return check()
    except KVQuantError as error:
        return Outcome(REFUSED, one_line(error))
    except Mismatch as error:
        return Outcome(WRONG, *map(str, error.args))
    except Exception as error:
        return Outcome(WRONG, one_line(error))


@cache
def implementation(name: str) -> tuple[str | None, str]:
    """The attention implementation to run an architecture with, and why the default falls back, if it does.

    The default (None), unless that reads the cache multiplied out and "kvquant" reads the pages.
    """
    row = ARCHITECTURES[name]
    default = Runner(row, "exact")
    greedy(default)
    status, reason = path(default)
    if status == PAGES:
        return None, ""
    ours = Runner(row, "exact", "kvquant")
    greedy(ours)
    return ("kvquant" if path(ours)[0] == PAGES else None), f"{default.implementation}: {reason}"


@cache
def evaluate(name: str, column: str) -> Outcome:
    """The cell of an architecture and a column, with the installed transformers."""
    row = ARCHITECTURES[name]
    if not row.exists:
        return Outcome(NONE, "this version of transformers does not have the architecture")
    if column == LAYERS:
        return judge(lambda: layers(name))
    if column == ATTENTION:
        return judge(lambda: attention(name))
    if column == BATCHING:
        return batching(name)
    if reason := row.missing(column):
        return Outcome(NONE, reason)
    named = column if column in NAMES else None
    run, reference = FEATURES["left-padded" if named else column].run, Runner(row, None, named)
    try:
        expected = run(reference)
    except Exception as error:
        return Outcome(NONE, f"transformers with DynamicCache: {one_line(error)}")
    if distance(reference, expected) > 0.01:  # it would be about 1e-9; int8 could not be told from it
        return Outcome(NONE, "transformers with DynamicCache: not what one call from the start gives")

    def check() -> Outcome:
        setting = named or implementation(name)[0]
        exact, int8 = Runner(row, "exact", setting), Runner(row, "int8", setting)
        check_exact(expected, run(exact))
        turns = run(int8)
        graphs = 3 if row.begins_again else 1
        if column == "compile" and not 1 <= exact.operators["graphs"] == int8.operators["graphs"] <= graphs:
            raise Mismatch("compiled anew", f"{exact.operators} {int8.operators}")
        check_small(reports(int8))
        share = distance(Runner(row, None, named), turns)
        if not 0 < share <= 1:
            raise Mismatch("int8: too far from DynamicCache", f"{share:.2f} times what is allowed")
        return Outcome(path(exact)[0], detail=f"int8 takes {share:.3f} of what is allowed")

    return judge(check)


def layers(name: str) -> Outcome:
    """The kinds of layers: paged, and transformers' own by class."""
    run = Runner(ARCHITECTURES[name], "exact")
    run.cache()
    (report,) = reports(run)
    others = (f"{count} {kind}" for kind, count in report.other_layers.items())
    return Outcome(", ".join([f"{report.paged_layers} paged", *others]))


def attention(name: str) -> Outcome:
    """How attention reads the paged layers by default, and whether "kvquant" has to be asked for."""
    setting, reason = implementation(name)
    if not reason:
        return Outcome("pages")
    note = ARCHITECTURES[name].note
    return Outcome('pages with "kvquant"' if setting else "multiplied out", f"{note} ({reason})" if note else reason)


def batching(name: str) -> Outcome:
    """Requests in blocks: ``exact`` against each alone with ``DynamicCache``, ``int8`` against the exact model."""
    row = ARCHITECTURES[name]
    if (reason := unsupported()) and OLDEST in reason:
        return Outcome(REFUSED, f"UnsupportedVersionError: {reason.partition(', found')[0]}")

    def check() -> Outcome:
        turns, report = at_once(Runner(row, "exact"))
        expected = one_by_one(Runner(row, None))
        for theirs, ours in zip(expected, turns, strict=True):
            if not torch.equal(theirs.sequences, ours.sequences):
                raise Mismatch("exact: other tokens than DynamicCache", f"{theirs.sequences}\n{ours.sequences}")
            if is_a_tie(theirs):
                raise Mismatch("exact: a tie decides")
        turns, packed = at_once(Runner(row, "int8"))
        share = distance(Runner(row, None), turns)
        if not 0 < share <= 1:
            raise Mismatch("int8: too far from DynamicCache", f"{share:.2f} times what is allowed")
        if not packed.bytes_per_block < packed.dense_bytes_per_block:
            raise Mismatch("int8: not smaller than DynamicCache")
        if not report.paged_calls or not packed.paged_calls:
            raise Mismatch("attention never read the blocks")
        return Outcome(PAGES, detail=f"int8 takes {share:.3f} of what is allowed")

    return judge(check)


# -- what a lost page would do -----------------------------------------------------------------------------------------


class LossyCache(DynamicCache):
    """Reads zeros for the second page of every layer that is paged in ours."""

    paged: tuple[int, ...] = ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        read = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx in self.paged:
            read = read[0].clone(), read[1].clone()
            for x in read:
                x[:, :, PAGE : 2 * PAGE] = 0
        return read


class LossyRunner(Runner):
    """Runs features on a ``LossyCache``."""

    def cache(self) -> Cache:
        ours = Runner(self.architecture, "exact").cache()
        own = getattr(ours, "self_attention_cache", ours)
        lossy = LossyCache(config=model_of(self.architecture.name).config)
        lossy.paged = tuple(i for i, layer in enumerate(own.layers) if isinstance(layer, PagedLayer))
        if own is ours:
            return lossy
        ours.self_attention_cache = lossy
        return ours


def cost_of_a_lost_page(name: str) -> float:
    """The distance between the exact model and one that has lost a page, as a share of what is allowed."""
    row = ARCHITECTURES[name]
    return distance(LossyRunner(row, None), greedy(Runner(row, None))[:1])
