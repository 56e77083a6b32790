"""The options of a cache, checked together."""

from collections.abc import Mapping
from typing import Any

from .errors import UnknownPolicyError
from .triton_kernels.ops import IMPLEMENTATIONS

_EITHER = ("exact", "quantized")
_CHOICES = {"prefill": _EITHER, "sliding": _EITHER, "impl": IMPLEMENTATIONS}


def check_options(unknown: Mapping[str, Any], **given: Any) -> None:
    """Refuse options that do not exist, and values that they do not take.

    Args:
        unknown: options that no one knows, with their values.
        given: ``prefill``, ``impl`` and ``sliding``.

    Raises:
        UnknownPolicyError: there is one.
    """
    if unknown:
        raise UnknownPolicyError(
            f"unknown cache option {', '.join(map(repr, unknown))}; use policy, bits, kv_budget, page_size, prefill, "
            "impl, sliding, sinks, max_pages, max_bytes, pool, offload, static, max_length or qparams."
        )
    for name, value in given.items():
        if value not in _CHOICES[name]:
            raise UnknownPolicyError(f"unknown {name} {value!r}; use {', '.join(map(repr, _CHOICES[name]))}.")


def check_sinks(sinks: Any, page_size: int) -> int | None:
    """How many first tokens are kept exact; None: as many as the policy of each layer says.

    Args:
        sinks: what was asked for.
        page_size: tokens per page.

    Raises:
        UnknownPolicyError: no such number.
    """
    if sinks is not None and (not isinstance(sinks, int) or isinstance(sinks, bool) or not 0 <= sinks < page_size):
        raise UnknownPolicyError(
            f"sinks is how many first tokens of a sequence are kept exact, fewer than a page of {page_size}, got "
            f"{sinks!r}; use 0 to {page_size - 1}, or None for what the policy does by itself."
        )
    return sinks


def check_static(static: bool, max_length: int | None, dynamic: Mapping[str, Any]) -> int | None:
    """Tokens for which a static cache reserves memory; None if the cache is not to be static.

    Args:
        static: whether it is.
        max_length: tokens; of a cache that is not static, those for which it has a ``kv_budget``.
        dynamic: options that decide how pages come and go, by name; a static cache has none of them.

    Raises:
        UnknownPolicyError: they do not go together.
    """
    if not isinstance(static, bool):
        raise UnknownPolicyError(f"static must be True or False, got {static!r}.")
    if not static:
        if max_length is not None and dynamic["kv_budget"] is None:
            raise UnknownPolicyError(
                "max_length is what a static cache reserves, or what a kv_budget is for; add static=True or a "
                "kv_budget, or leave it out."
            )
        return None
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1:
        raise UnknownPolicyError(
            f"static=True reserves memory for max_length tokens, got {max_length!r}; give a positive integer."
        )
    for name, value in dynamic.items():
        if value:
            raise UnknownPolicyError(
                f"a static cache reserves all its pages where attention reads them; leave {name} out."
            )
    return max_length
