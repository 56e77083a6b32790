"""What transformers calls things, where its versions differ."""

import inspect
from typing import Any

from transformers.generation import GenerationMixin

# Before 5.24 the cache was "past_key_values" in every signature and output; the old name still works there, and warns.
_PARAMETERS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_ARGUMENT = "cache" if "cache" in _PARAMETERS else "past_key_values"


def with_cache(cache: Any) -> dict[str, Any]:
    """``cache`` as a keyword argument of a model's ``forward`` and of ``generate``."""
    return {CACHE_ARGUMENT: cache}


def cache_in(arguments: Any) -> Any:
    """The cache in keyword arguments or in a model's output, under whichever name; None if there is none."""
    found = arguments.get(CACHE_ARGUMENT)
    return arguments.get("past_key_values") if found is None else found
