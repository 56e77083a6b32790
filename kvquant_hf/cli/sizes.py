"""Sizes as they are written on a command line."""

from ..policies.sizes import parse_size
from .terminal import InputError


def bytes_of(text: str) -> int:
    """``"1.5GB"`` in bytes; units are decimal, or binary with an i.

    Raises:
        InputError: not that.
    """
    size = parse_size(text)
    if size is None:
        raise InputError(f"{text!r} is no size; use --kv-budget 500MB or 1GB.")
    return size


def times_of(text: str) -> float | None:
    """The number in ``"8x"``; None if it is another word.

    Raises:
        InputError: not a positive number.
    """
    word = text.strip().lower()
    if not word.endswith("x"):
        return None
    digits = word.removesuffix("x").strip()
    if not digits.replace(".", "", 1).isdecimal() or not float(digits):
        raise InputError(f"{text!r} is no number of requests; use --kv-budget 8x, or bytes: 500MB.")
    return float(digits)
