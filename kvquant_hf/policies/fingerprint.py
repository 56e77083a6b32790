"""What tells two models apart, as far as a cache is concerned."""

from typing import Any


def fingerprint(config: Any) -> tuple[Any, ...]:
    """What tells two models apart by their decoder's config."""
    decoder = config.get_text_config(decoder=True)
    names = (
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    return tuple(getattr(decoder, name, None) for name in names)
