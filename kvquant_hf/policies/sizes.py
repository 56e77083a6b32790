"""Sizes as people write them."""

UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_size(text: str) -> int | None:
    """``"1.5GB"`` or ``"2 GiB"`` in bytes; units are decimal, or binary with an i.  None: it is no size."""
    word = text.strip().lower()
    for unit, factor in UNITS.items():
        digits = word.removesuffix(unit).strip()
        if word.endswith(unit) and digits.replace(".", "", 1).isdecimal() and float(digits) > 0:
            return round(float(digits) * factor)
    return None
