"""No server is timed that answers wrongly.

Each answers the same few prompts of more than a page, one at a time, greedily.  All must write as many tokens as were
asked for.  ``exact`` stores what transformers' server stores and must write the same texts.  In 16 bits two servers
that add in another order round differently, and choose differently where two tokens are about equally likely; that was
one text in twenty with SmolLM2-135M in bfloat16, and a third may differ.  In float32 none may.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..contenders import EXACT
from ..status import OK
from .answers import Answer
from .client import Prompt, Target, drive
from .servers import STOCK

PROMPTS, PROMPT_TOKENS, OUTPUT_TOKENS = 12, 100, 4
DIFFERING_IN_16_BITS = 1 / 3


class Verdict(NamedTuple):
    """Why a server is not to be timed, or ""; and how many texts were those of the first server, None if unknown."""

    reason: str
    same: int | None


def judge_servers(
    targets: Sequence[Target],
    prompts: Sequence[Prompt],
    *,
    rounding: bool,
    timeout: float,
    advance: Callable[[str], object] = lambda what: None,
) -> dict[str, Verdict]:
    """Judge each server, by its name.

    Args:
        targets: the servers.
        prompts: what they are asked.
        rounding: whether they compute in 16 bits.
        timeout: seconds that a server may be silent.
        advance: told what is being done.
    """
    answers: dict[str, list[Answer]] = {}
    for target in targets:
        advance(f"{target.name}: {len(prompts)} prompts whose answers are checked")
        answers[target.name] = drive(target, prompts, [0.0] * len(prompts), concurrency=1, timeout=timeout)
    missing = {name: _incomplete(found, prompts) for name, found in answers.items()}
    first = targets[0].name
    verdicts = {}
    for name, found in answers.items():
        if missing[name] or missing[first]:
            verdicts[name] = Verdict(missing[name], None)
            continue
        same = sum(mine.text == theirs.text for mine, theirs in zip(found, answers[first], strict=True))
        differing = len(prompts) - same
        wrong = differing > (DIFFERING_IN_16_BITS * len(prompts) if rounding else 0)
        must = (first, name) == (STOCK, EXACT)
        reason = f"{differing} of {len(prompts)} greedy answers differ from those of {STOCK}" if must and wrong else ""
        verdicts[name] = Verdict(reason, same)
    return verdicts


def _incomplete(answers: Sequence[Answer], prompts: Sequence[Prompt]) -> str:
    """What is missing of the answers, or ""."""
    for answer, prompt in zip(answers, prompts, strict=True):
        if answer.status != OK:
            return f"a prompt was {answer.status}: {answer.reason}"
        if answer.output_tokens != prompt.output_tokens:
            return f"an answer has {answer.output_tokens} tokens instead of {prompt.output_tokens}"
    return ""
