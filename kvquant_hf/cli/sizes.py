"""Sizes as they are written on a command line."""

from .terminal import InputError

UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def bytes_of(text: str) -> int:
    """``"1.5GB"`` in bytes; units are decimal, or binary with an i.

    Raises:
        InputError: not that.
    """
    word = text.strip().lower()
    for unit, factor in UNITS.items():
        digits = word.removesuffix(unit).strip()
        if word.endswith(unit) and digits.replace(".", "", 1).isdecimal() and float(digits) > 0:
            return round(float(digits) * factor)
    raise InputError(f"{text!r} is no size; use --kv-budget 500MB or 1GB.")


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
