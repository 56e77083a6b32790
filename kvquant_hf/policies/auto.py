"""``"auto"``: a budget in the place of a policy.  Which policy it is, the shape of a model's pages decides.

``cost.choose`` picks one, from the policies that ``LADDER`` names and what their pages cost.
"""

import math
from dataclasses import dataclass
from typing import Any

from ..errors import UnknownPolicyError

AUTO = "auto"
# Names of policies, by measured accuracy (docs/accuracy.md), the best first.
LADDER = ("exact", "int8", "int4", "kv3", "kv2.9", "kv2.4")


@dataclass(frozen=True)
class AutoPolicy:
    """The most accurate policy of ``LADDER`` within a number of bits.

    Args:
        bits: per key or value element in full pages, scales included, that are not exceeded.

    Raises:
        UnknownPolicyError: no positive number.
    """

    bits: float
    calibrated = False
    uses_queries = True  # most of the ladder does; what is chosen says whether it can use a calibration

    def __post_init__(self) -> None:
        bits: Any = self.bits
        if not isinstance(bits, (int, float)) or isinstance(bits, bool) or not (bits > 0 and math.isfinite(bits)):
            raise UnknownPolicyError(f"bits per element must be a positive number, got {bits!r}; use 3.5, for example.")

    @property
    def name(self) -> str:
        """As it is written: ``"auto:3.5"``."""
        return f"{AUTO}:{self.bits}".removesuffix(".0")


def parse_auto(policy: Any, bits: float | None) -> AutoPolicy | None:
    """The budget that a user writes: ``"auto:3.5"``, or ``"auto"`` and ``bits`` beside it; None: it is another policy.

    Raises:
        UnknownPolicyError: no budget, two of them, or bits beside another policy.
    """
    name, colon, written = policy.partition(":") if isinstance(policy, str) else ("", "", "")
    if name != AUTO:
        if bits is not None:
            raise UnknownPolicyError(
                f"bits is the budget of policy {AUTO!r}, and {getattr(policy, 'name', policy)!r} has bits of its own; "
                f"leave bits out, or use policy={AUTO!r}."
            )
        return None
    if colon and bits is None:
        try:
            return AutoPolicy(float(written))
        except ValueError as error:  # UnknownPolicyError is one
            raise UnknownPolicyError(
                f"{policy!r} has no number of bits per element; write {AUTO}:3.5, for example."
            ) from error
    if bits is None or colon:
        raise UnknownPolicyError(
            f"policy {policy!r} takes its budget from one place; give '{AUTO}:3.5', or {AUTO!r} with bits=3.5 or, to a "
            "cache, kv_budget='2GiB'."
        )
    return AutoPolicy(bits)
