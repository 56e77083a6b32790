"""What is measured, and what does not fit.  No tensors are made here."""

from collections.abc import Mapping, Sequence

from ..errors import BenchmarkInputError
from .tables import size

# Of the memory that is free, what may be planned with: estimates are rough, and other programs live too.
SHARE = 0.9


def prompt_tokens(context: int, checked: int, rounds: int) -> int:
    """Tokens of the prompt, so that ``context`` tokens are held at the end.

    Raises:
        BenchmarkInputError: the steps alone are more than that.
    """
    steps = checked - 1 + rounds
    if context <= steps:
        raise BenchmarkInputError(
            f"a context of {context} tokens has no room for {steps} steps; use --context {steps + 1} or more, or fewer "
            "--rounds."
        )
    return context - steps


def out_of_reach(context: int, limit: int | None, tokens: int) -> str:
    """Why no cache can be measured at ``context``, or "".

    Args:
        context: tokens.
        limit: positions that the model takes, or None.
        tokens: tokens of text that there are.
    """
    if limit is not None and context > limit:
        return f"the model takes {limit:,} tokens"
    return f"the text has {tokens:,} tokens" if context > tokens else ""


def crowded_out(needs: Mapping[str, int], working: int, available: int | None) -> dict[str, str]:
    """Which of several things that are held at once do not fit, and why.

    Args:
        needs: bytes of each, most important first.
        working: bytes needed beside them, at any one time.
        available: bytes that are free; None: unknown, everything fits.
    """
    if available is None:
        return {}
    left = SHARE * available - working
    refused = {}
    for name, needed in needs.items():
        if needed <= left:
            left -= needed
        else:
            refused[name] = f"needs {size(needed)} of memory, {size(max(left, 0))} are left beside the others"
    return refused


def numbers_of(text: str, option: str) -> list[int]:
    """Positive integers with commas, ``k`` standing for 1,024.

    Raises:
        BenchmarkInputError: not that.
    """
    found = []
    for word in filter(None, (part.strip().lower() for part in text.split(","))):
        digits, factor = (word[:-1], 1024) if word.endswith("k") else (word, 1)
        if not digits.isdecimal() or not int(digits):
            raise BenchmarkInputError(f"{word!r} is no positive number; use {option} 1024,4k,8k.")
        found.append(factor * int(digits))
    if not found:
        raise BenchmarkInputError(f"{option} is empty; use {option} 1024,4k,8k.")
    return found


def known_dtypes(names: Sequence[str]) -> tuple[str, ...]:
    """``names``, each once, in their order.

    Raises:
        BenchmarkInputError: one of them is none, or there are none.
    """
    known = ("float32", "bfloat16", "float16")
    for name in names or ("",):
        if name not in known:
            raise BenchmarkInputError(f"unknown dtype {name!r}; use {', '.join(known)}.")
    return tuple(dict.fromkeys(names))
