"""How long a request may be."""

from typing import Any

from fastapi import HTTPException


def fit(prompt: int, gen_config: Any, longest: int) -> None:
    """Refuse a request that is too long, in tokens, which its sender can count; cut what it left open.

    Args:
        prompt: its tokens.
        gen_config: the request's own; ``max_new_tokens`` is cut unless the request gave it.
        longest: tokens of prompt and answer together.

    Raises:
        HTTPException: 400: it is too long, or empty.
    """
    new = gen_config.max_new_tokens
    if prompt == 0:
        raise HTTPException(400, "the prompt is empty.")
    if not getattr(gen_config, "_new_tokens_given", False):
        new = gen_config.max_new_tokens = max(1, min(new, longest - prompt))
    if prompt + new > longest:
        raise HTTPException(
            400,
            f"the prompt has {prompt} tokens and {new} new ones may come; the limit of this server is {longest} tokens "
            "for both together.",
        )
