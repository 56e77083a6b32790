"""What a model's config says of its layers: which have blocks, and what a page of each is."""

from collections.abc import Iterable
from typing import Any

import torch

from ..errors import UnsupportedModelError
from ..files.calibration import calibrated_codecs
from ..pages.layout import StoreLayout
from ..policies.fingerprint import fingerprint
from ..triton_kernels.codecs import CODECS
from .config import QuantizedBatchingConfig

FULL, WINDOWED = "full_attention", "sliding_attention"


def check_layers(config: Any) -> None:
    """Refuse a decoder of which a layer's keys and values are not simply its own.

    Raises:
        UnsupportedModelError: there is one.
    """
    others = sorted({kind for kind in getattr(config, "layer_types", None) or () if kind not in (FULL, WINDOWED)})
    if getattr(config, "kv_lora_rank", None):
        others.append("latents (MLA)")
    if getattr(config, "num_kv_shared_layers", 0):
        others.append("keys shared by several layers")
    if others:
        raise UnsupportedModelError(
            f"continuous batching has blocks for full attention and sliding windows, and model type "
            f"{config.model_type!r} has {', '.join(others)}; use generate() for this model."
        )


def window_of_all_layers(config: Any) -> int:
    """Tokens that the queries of every layer see, if all layers have a sliding window; else 0."""
    types: Iterable[str] | None = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or 0
    return window if window and (types is None or set(types) == {WINDOWED}) else 0


def layouts_of(config: Any, cb: QuantizedBatchingConfig, like: torch.Tensor) -> dict[int, StoreLayout]:
    """What each layer stores; ``like`` is a key or value tensor ``[1, heads, 0, head_dim]``."""
    count, model = config.num_hidden_layers, fingerprint(config)
    policy: Any = cb.policy
    policy.check_layers(count)
    policy.check_model(model)
    codecs = {i: (CODECS[p.keys], CODECS[p.values]) for i, p in zip(range(count), policy.by_layer(), strict=False)}
    _, given = calibrated_codecs(cb.qparams, policy.name, codecs, model)
    return {i: StoreLayout(*pair, cb.page_size, like, like, cb.impl) for i, pair in given.items()}
