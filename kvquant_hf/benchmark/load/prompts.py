"""Prompts of an exact number of tokens: windows of a text that are read again as so many tokens.

Servers take text.  A window of tokens, written out, may be read as fewer or more: words are cut in other places at its
ends.  So each window is read again, and one that has another length is replaced by one that begins elsewhere.  Every
window begins in a place of its own, so that no server finds a prompt's first pages among those of an earlier one.
"""

import random
from collections.abc import Sequence
from typing import Any

from ...errors import BenchmarkInputError

_TRIES = 200  # windows for each prompt; with SmolLM2 one in thirty has another length


def exact_prompts(tokenizer: Any, ids: Sequence[int], lengths: Sequence[int], seed: int) -> list[str]:
    """A text for each of ``lengths`` that ``tokenizer`` reads as so many tokens, special ones of its own included.

    Args:
        tokenizer: that of the model.
        ids: a long text as token ids, without special ones.
        lengths: tokens of each prompt.
        seed: another one makes other windows.

    Raises:
        BenchmarkInputError: the text is too short, or no window was read as so many tokens.
    """
    special = len(tokenizer("").input_ids)
    longest = max(lengths) - special
    if longest >= len(ids):
        raise BenchmarkInputError(f"the text has {len(ids)} tokens, a prompt {longest}; use a smaller --max-prompt.")
    generator = random.Random(seed)
    used: set[int] = set()

    def prompt(length: int) -> str:
        for _ in range(_TRIES):
            start = generator.randrange(len(ids) - longest)
            text = tokenizer.decode(ids[start : start + length - special])
            if start not in used and len(tokenizer(text).input_ids) == length:
                used.add(start)
                return str(text)
        raise BenchmarkInputError(
            f"no part of the text is read as exactly {length} tokens; use lengths of {special + 1} tokens or more, "
            "or another model."
        )

    return [prompt(length) for length in lengths]
