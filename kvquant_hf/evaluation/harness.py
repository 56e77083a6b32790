"""Text read through quantized caches, in chunks, beside the exact model.

Every window of text gets a fresh cache of every contender, and the exact model its own (transformers' DynamicCache).
All read the same chunk, their logits are compared at each position, and the next chunk follows: memory is that of the
caches and of two chunks of logits, whatever the length of the text.

A chunk is a page, or a part of one (``step`` divides ``page_size``).  Pages are sealed lazily, so a chunk attends to
exactly what its tokens would attend to one by one: sealed pages for everything before the current page, exact keys and
values inside it.  Caches are made with ``prefill="quantized"``; what a chunk attends to always comes out of the cache,
and ``evaluate`` refuses a cache whose report says otherwise.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch

from ..cache import QuantizedPagedCache
from ..errors import EvaluationError, EvaluationInputError, UnsupportedModelError
from ..policies.table import POLICIES, PolicyLike, parse_policy
from ..reports.report import CacheReport
from ..transformers_api.auto import policy_for
from ..transformers_api.names import cache_in, with_cache
from .metrics import Accuracy, Scores, compare, join, summarize

EXACT = "exact"


class Storage(NamedTuple):
    """What a cache held at the end of its windows; sums over windows.

    Args:
        bytes: everything held.
        elements: key and value elements held.
        packed_bytes: bytes of sealed pages.
        sealed_elements: elements in sealed pages.
        fallback_calls: attention calls that multiplied the cache out.
    """

    bytes: int
    elements: int
    packed_bytes: int = 0
    sealed_elements: int = 0
    fallback_calls: int = 0

    @property
    def bits_per_element(self) -> float:
        """Bits held per element, everything counted."""
        return 8 * self.bytes / self.elements

    @property
    def page_bits_per_element(self) -> float | None:
        """Bits per element in sealed pages; None where there are none."""
        return 8 * self.packed_bytes / self.sealed_elements if self.sealed_elements else None

    def plus(self, other: "Storage") -> "Storage":
        """The sum."""
        return Storage(*(a + b for a, b in zip(self, other, strict=True)))


class Contender(NamedTuple):
    """A cache to be measured.

    Args:
        name: what the table calls it.
        make: makes an empty cache.
        weigh: what a filled cache holds; gets the cache and the exact model's own cache of the same tokens.
    """

    name: str
    make: Callable[[], Any]
    weigh: Callable[[Any, Any], Storage]


class Result(NamedTuple):
    """One contender: accuracy, memory, and the numbers of each position."""

    accuracy: Accuracy
    storage: Storage
    scores: Scores

    def as_dict(self) -> dict[str, Any]:
        """Accuracy and bits per element, ready for JSON."""
        return self.accuracy.as_dict() | {
            "bits_per_element": self.storage.bits_per_element,
            "page_bits_per_element": self.storage.page_bits_per_element,
            "fallback_calls": self.storage.fallback_calls,
        }


def paged(
    model: Any, policy: PolicyLike, *, page_size: int = 64, qparams: Any = None, sinks: int | None = None
) -> Contender:
    """A contender that is our cache with ``policy``, as generation has it except that a prompt attends to what was
    stored.  Its name is what :func:`written` says.  ``qparams`` and ``sinks`` are the cache's.

    Raises:
        UnknownPolicyError: unknown policy or page size.
    """
    options = {"page_size": page_size, "prefill": "quantized", "qparams": qparams, "sinks": sinks}

    def make() -> QuantizedPagedCache:
        cache = QuantizedPagedCache(model.config, policy, **options)
        cache.bind(model)
        return cache

    return Contender(written(policy, model, page_size), make, weigh_paged)


def written(policy: PolicyLike, model: Any, page_size: int) -> str:
    """What tables call a policy: its name in ``POLICIES``, or else what was written; of a budget, what was chosen too.

    Raises:
        UnknownPolicyError: unknown policy, or none within a budget.
    """
    name = parse_policy(policy).name
    chosen = policy_for(model.config, policy, page_size).name
    if chosen != name:
        return f"{name} ({chosen})"
    return policy if name not in POLICIES and isinstance(policy, str) else name


def check_was_read(report: CacheReport, tokens: int) -> None:
    """Refuse a measurement whose attention did not go through the cache.

    Args:
        report: of a cache that was made with ``prefill="quantized"``.
        tokens: per sequence, that were read into it.

    Raises:
        EvaluationError: attention calls bypassed the cache, or it holds something else.
    """
    calls = report.paged_calls + report.fallback_calls
    if report.prefill_calls or not calls or report.tokens != tokens:
        raise EvaluationError(
            f"{report.prefill_calls} of {report.prefill_calls + calls} attention calls did not read the cache, which "
            f"holds {report.tokens} of {tokens} tokens; make it with prefill='quantized' and give it to no one else."
        )


def weigh_paged(cache: QuantizedPagedCache, reference: Any) -> Storage:
    """Bytes of our cache, from its report.

    Raises:
        EvaluationError: attention did not go through the cache.
    """
    report = cache.report()
    check_was_read(report, reference.get_seq_length())
    return Storage(
        report.bytes, report.elements, report.packed_bytes, report.sealed_elements, fallback_calls=report.fallback_calls
    )


def check_step(step: int, page_size: int) -> None:
    """Raise ``EvaluationInputError`` unless chunks of ``step`` tokens fill pages of ``page_size``."""
    if step < 1 or page_size % step:
        raise EvaluationInputError(f"a step of {step} does not divide a page of {page_size} tokens; use a divisor.")


Held = dict[str, tuple[Scores, Storage]]  # by contender


class Reading:
    """A fresh cache of every contender and the exact model's own, which all read the same tokens side by side.

    Args:
        model: a causal language model in eval mode.
        contenders: what to measure; names are distinct.
        advance: called with the name of each contender after each of its chunks (``""``: the exact model).

    Raises:
        UnsupportedModelError: not a decoder-only model.
    """

    def __init__(self, model: Any, contenders: Sequence[Contender], advance: Callable[[str], object]) -> None:
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{type(model).__name__} has an encoder, so its text cannot be cut into windows; use a causal model."
            )
        self._model, self._advance = model, advance
        self._caches = [(contender, contender.make()) for contender in contenders]
        self._parts: dict[str, list[Scores]] = {contender.name: [] for contender in contenders}
        self._own: Any = None  # the cache that the model makes for itself

    def exact(self, chunk: torch.Tensor) -> torch.Tensor:
        """Logits ``[batch, tokens, vocabulary]`` of the exact model for the tokens ``[batch, tokens]`` that follow.

        Raises:
            UnsupportedModelError: the model returns no cache.
        """
        output = self._model(chunk, use_cache=True, **with_cache(self._own))
        self._own = cache_in(output)
        if self._own is None:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} returns no KV cache, so the exact model cannot read in chunks; use a "
                "model that takes a cache."
            )
        self._advance("")
        logits: torch.Tensor = output.logits
        return logits

    def contenders(self, chunk: torch.Tensor, exact: torch.Tensor, targets: torch.Tensor) -> None:
        """Let every contender read what the exact model has read, and compare.

        Args:
            chunk: tokens ``[batch, tokens]``.
            exact: what :meth:`exact` returned for them.
            targets: the tokens that follow ``[batch, tokens or fewer]``; positions without one are not compared.

        Raises:
            EvaluationError: NaN among the logits.
        """
        count = targets.shape[1]
        for contender, cache in self._caches:
            logits = self._model(chunk, use_cache=True, **with_cache(cache)).logits
            if count:
                self._parts[contender.name].append(compare(exact[:, :count], logits[:, :count], targets))
            self._advance(contender.name)

    def close(self) -> Held:
        """Scores ``[batch, positions]`` and what was held in the end.

        Raises:
            EvaluationError: a cache that was not read.
        """
        return {
            contender.name: (join(self._parts[contender.name], dim=1), contender.weigh(cache, self._own))
            for contender, cache in self._caches
        }


def of_all_windows(readings: Sequence[Held]) -> Held:
    """Readings of several windows in one: scores one below the other, storage summed."""
    held: Held = {}
    for name in readings[0]:
        scores, storages = zip(*(reading[name] for reading in readings), strict=True)
        held[name] = join(list(scores), dim=0), reduce(Storage.plus, storages)
    return held


def evaluate(
    model: Any,
    windows: torch.Tensor,
    contenders: Sequence[Contender],
    *,
    step: int = 64,
    page_size: int = 64,
    batch: int = 1,
    advance: Callable[[str], object] = lambda name: None,
) -> dict[str, Result]:
    """Read ``windows`` through every contender and compare it with the exact model at each position.

    Args:
        model: a causal language model in eval mode.
        windows: token ids ``[windows, context]``; each row is read by itself.
        contenders: what to measure; names are distinct.
        step: tokens per chunk; divides ``page_size``.
        page_size: tokens per page of the contenders.
        batch: windows read side by side; for speed, the distributions differ by rounding only.
        advance: called with the name of each contender after each of its chunks (``""``: the exact model).

    Returns:
        Results by contender, over the ``context - 1`` positions of each window that have a next token in it.

    Raises:
        EvaluationInputError: ``step`` does not divide ``page_size``.
        UnsupportedModelError: not a decoder-only model.
        EvaluationError: NaN among the logits, or a cache that was not read.
    """
    check_step(step, page_size)
    readings = []
    with torch.inference_mode():
        for rows in windows.to(model.device).split(batch):
            reading = Reading(model, contenders, advance)
            for start in range(0, rows.shape[1], step):
                chunk, targets = rows[:, start : start + step], rows[:, start + 1 : start + 1 + step]
                reading.contenders(chunk, reading.exact(chunk), targets)
            readings.append(reading.close())
    return {
        name: Result(summarize(scores, page_size), storage, scores)
        for name, (scores, storage) in of_all_windows(readings).items()
    }
