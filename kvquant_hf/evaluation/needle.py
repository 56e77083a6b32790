"""A needle in a haystack: is a fact that was read long ago still found when the cache that holds it is quantized?

A prompt of ``length`` tokens is the beginning of a text with one made-up sentence put into it at some depth, a question
about that sentence at the end, and the answer, five digits drawn with a seed.  All of it is read in chunks of a page
through a cache with ``prefill="quantized"``, so that every key that a token attends to comes out of the cache.

The needle is found where every token of the answer is the most likely one given those before it (teacher forcing).
That is the case exactly where greedy generation writes the answer next, and it takes one pass over the prompt.  How far
a cell is from the other outcome shows in ``nats``, the mean of -log p over the tokens of the answer.

Prompts are the same for all policies, so their cells can be compared one by one.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from ..cache import QuantizedPagedCache
from ..errors import EvaluationError, EvaluationInputError
from ..policies.table import PolicyLike, parse_policy
from ..transformers_api.names import with_cache
from .harness import check_was_read
from .text import first_tokens

DIGITS = 5
NEEDLE = "\n\nThe code that opens the blue gate is {digits}.\n\n"
QUESTION = "\n\nQuestion: What is the code that opens the blue gate?\nAnswer: The code that opens the blue gate is"
ANSWER = " {digits}"


class Prompt(NamedTuple):
    """One cell of the grid before it is read.

    Args:
        ids: the tokens, the answer's at the end.
        answer_tokens: how many of them are the answer.
        digits: the answer.
        length, depth: tokens in all; percent of the haystack that comes before the needle.
    """

    ids: list[int]
    answer_tokens: int
    digits: str
    length: int
    depth: float


@dataclass(frozen=True)
class Cell:
    """One needle: whether it was found, and the mean -log p of the tokens of its answer."""

    length: int
    depth: float
    digits: str
    found: bool
    nats: float

    def as_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def draw_digits(seed: int, length: int, depth: float) -> str:
    """The answer of one cell; no two cells of a grid are likely to share it."""
    return str(random.Random(f"{seed} {length} {depth:g}").randrange(10 ** (DIGITS - 1), 10**DIGITS))


def hide_needles(
    tokenizer: Any, text: str, lengths: Sequence[int], depths: Sequence[float], seed: int = 0
) -> list[Prompt]:
    """The prompts of a grid, lengths in the outer loop.

    The needle is put between two tokens of the text, as a paragraph of its own.  Every prompt begins with the special
    token that the tokenizer begins a text with, if it has one.

    Args:
        tokenizer: the model's.
        text: the haystack; its beginning is used.
        lengths: tokens per prompt, everything counted.
        depths: in percent: 0 is before the text, 100 right before the question.
        seed: of the digits.

    Raises:
        EvaluationInputError: a depth that is no percentage, a length with no room for needle and question, or too
            little text.
    """
    for depth in depths:
        if not 0 <= depth <= 100:
            raise EvaluationInputError(f"a depth is a percentage from 0 to 100, got {depth:g}; use --depths 0,50,100.")
    encode = lambda part: tokenizer(part, add_special_tokens=False).input_ids  # noqa: E731
    first, haystack, question = first_tokens(tokenizer), encode(text), encode(QUESTION)
    prompts = []
    for length in lengths:
        for depth in depths:
            digits = draw_digits(seed, length, depth)
            needle, answer = encode(NEEDLE.format(digits=digits)), encode(ANSWER.format(digits=digits))
            room = length - sum(map(len, (first, needle, question, answer)))
            if room < 1:
                raise EvaluationInputError(
                    f"needle, question and answer take {length - room} tokens, so a prompt of {length} has no "
                    f"haystack; use --lengths {length - room + 1} or more."
                )
            if room > len(haystack):
                raise EvaluationInputError(
                    f"the text has {len(haystack)} tokens, and a prompt of {length} needs {room}; give a longer --text "
                    "or smaller --lengths."
                )
            cut = round(room * depth / 100)
            ids = [*first, *haystack[:cut], *needle, *haystack[cut:room], *question, *answer]
            prompts.append(Prompt(ids, len(answer), digits, length, depth))
    return prompts


def find_needles(
    model: Any,
    prompts: Sequence[Prompt],
    policy: PolicyLike,
    *,
    page_size: int = 64,
    sinks: int | None = None,
    batch: int = 1,
    advance: Callable[[str], object] = lambda name: None,
) -> list[Cell]:
    """Read every prompt through caches with ``policy``.

    Args:
        model: a causal language model in eval mode.
        prompts: of :func:`hide_needles`.
        policy: what to store the cache in.
        page_size: tokens per page, and per forward pass.
        sinks: as for the cache.
        batch: prompts of one length that are read side by side.
        advance: called with the name of the policy after each forward pass.

    Returns:
        A cell per prompt, in order.

    Raises:
        EvaluationError: NaN among the logits, or a cache that was not read.
    """
    name = parse_policy(policy).name
    options: dict[str, Any] = {"page_size": page_size, "prefill": "quantized", "sinks": sinks}
    cells = []
    with torch.inference_mode():
        for rows in _batches(prompts, batch):
            cache = QuantizedPagedCache(model.config, policy, **options)
            cache.bind(model)
            logits = _last_logits(model, rows, cache, lambda: advance(name))
            check_was_read(cache.report(), rows[0].length - 1)
            cells += [_judge(prompt, row) for prompt, row in zip(rows, logits, strict=True)]
    return cells


def passes(prompts: Sequence[Prompt], page_size: int, batch: int) -> int:
    """Forward passes that :func:`find_needles` makes for one policy."""
    return sum(-(-(rows[0].length - 1) // page_size) for rows in _batches(prompts, batch))


def _batches(prompts: Sequence[Prompt], batch: int) -> list[list[Prompt]]:
    """Neighbours of one length, at most ``batch`` of them."""
    groups = (list(group) for _, group in itertools.groupby(prompts, key=lambda prompt: prompt.length))
    return [group[i : i + batch] for group in groups for i in range(0, len(group), batch)]


def _last_logits(model: Any, rows: list[Prompt], cache: Any, advance: Callable[[], object]) -> torch.Tensor:
    """Logits of the positions that predict the longest answer of the batch, ``[batch, answer, vocabulary]``."""
    ids = torch.tensor([prompt.ids[:-1] for prompt in rows], device=model.device)  # nothing follows the last token
    wanted = ids.shape[1] - max(prompt.answer_tokens for prompt in rows)  # the first position that is judged
    # Logits of the whole prompt would be the largest tensor of all.
    fewest = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    kept = []
    for start in range(0, ids.shape[1], cache.page_size):
        chunk = ids[:, start : start + cache.page_size]
        needed = start + chunk.shape[1] > wanted
        logits = model(chunk, use_cache=True, **with_cache(cache), **({} if needed else fewest)).logits
        if needed:
            kept.append(logits[:, max(0, wanted - start) :])
        advance()
    return torch.cat(kept, dim=1)


def _judge(prompt: Prompt, logits: torch.Tensor) -> Cell:
    """The cell of one prompt, from logits ``[at least answer_tokens, vocabulary]`` that end with the answer's."""
    scores = logits[-prompt.answer_tokens :].double()
    answer = torch.tensor(prompt.ids[-prompt.answer_tokens :], device=scores.device)
    nats = -scores.log_softmax(-1).gather(1, answer.unsqueeze(1)).mean()
    if nats.isnan():
        raise EvaluationError("there is NaN among the logits, so no needle can be found; use --dtype float32.")
    found = bool((scores.argmax(-1) == answer).all())
    return Cell(prompt.length, prompt.depth, prompt.digits, found, float(nats))
