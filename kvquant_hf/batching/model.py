"""What a model's config says of its layers: which have blocks, what a page of each is, and which share a block.

Layers that see all tokens and layers that see a window need different numbers of blocks.  Where their pages are alike,
a block stands for ``size`` layers of one kind, and can be given to either:

    12 layers, 4 of them full, 8 with a window: size 4

    block for full layers         layers 2, 5, 8, 11        one block per page of tokens: 1 lane
    block for windowed layers     layers 0, 1, 3, 4         two blocks per page of tokens: 2 lanes
                                  layers 6, 7, 9, 10
"""

import math
from typing import Any, NamedTuple

import torch

from ..errors import UnsupportedModelError
from ..files.calibration import calibrated_codecs
from ..pages.layout import StoreLayout
from ..policies.fingerprint import fingerprint
from ..policies.table import AnyPolicy
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


def check_model(model: Any) -> None:
    """Refuse a model with an encoder, whose layers do not all compute on one device, or whose device cannot be seen.

    Weights that accelerate brings from the CPU or the disk are no matter, unless they are the first of the model:
    transformers takes the device of those for the requests.

    Raises:
        UnsupportedModelError: it is such a model.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"continuous batching is for decoders, and {type(model).__name__} has an encoder; use generate() for this "
            "model."
        )
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()} - {"cpu", "disk"}
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"a block has a page of each layer on one device, and the layers of this model are on {len(devices)}; use "
            "generate(), or tensor parallel (tp_plan) instead of device_map."
        )
    if model.device.type == "meta":
        raise UnsupportedModelError(
            "the first weights of this model are offloaded, so that continuous batching finds no device for its "
            "requests; keep the embedding in memory with device_map, or use generate()."
        )


def layouts_of(
    config: Any, policy: AnyPolicy, cb: QuantizedBatchingConfig, like: torch.Tensor
) -> dict[int, StoreLayout]:
    """What each layer stores with ``policy``; ``like`` is a key or value tensor ``[1, heads, 0, head_dim]``."""
    count, model = config.num_hidden_layers, fingerprint(config)
    policy.check_layers(count)
    policy.check_model(model)
    codecs = {i: (CODECS[p.keys], CODECS[p.values]) for i, p in zip(range(count), policy.by_layer(), strict=False)}
    _, given = calibrated_codecs(cb.qparams, policy.name, codecs, model)
    return {i: StoreLayout(*x[:2], cb.page_size, like, like, cb.impl, x.prior) for i, x in given.items()}


def rotary_limit(config: Any) -> int | None:
    """Tokens up to which the rotary embedding of a request is its own; None: always.

    Some (Phi-3's for long contexts, "dynamic") are chosen for a whole batch, by the longest in it.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    each = parameters.values() if all(isinstance(rope, dict) for rope in parameters.values()) else [parameters]
    limits = [
        rope.get("original_max_position_embeddings") or config.max_position_embeddings
        for rope in each
        if rope.get("rope_type") in ("longrope", "dynamic")
    ]
    return min(limits, default=None)


class Place(NamedTuple):
    """Where a layer's pages are: in blocks of ``kind``, in which ``lane`` of them, at which ``position`` of a block."""

    kind: str
    lane: int
    position: int


def places_of(config: Any, layouts: dict[int, StoreLayout]) -> tuple[dict[int, Place], dict[str, int]]:
    """The place of each layer, and the window of each kind of block; 0 where all tokens are seen.

    Where pages of full and windowed layers differ, as under a policy by layer, a block has a page of every layer.
    """
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or 0
    if types is None:
        types = [WINDOWED if window else FULL] * len(layouts)
    kinds = {kind: [i for i in layouts if types[i] == kind] for kind in (FULL, WINDOWED)}
    pages = {tuple(layout.plane_shapes) for layout in layouts.values()}
    if not window or not kinds[FULL] or not kinds[WINDOWED] or len(pages) > 1:
        places = {layer: Place(FULL, 0, n) for n, layer in enumerate(layouts)}
        return places, {FULL: window if not kinds[FULL] else 0}
    size = math.gcd(*map(len, kinds.values()))
    places = {
        layer: Place(kind, n // size, n % size) for kind, layers in kinds.items() for n, layer in enumerate(layers)
    }
    return places, {FULL: 0, WINDOWED: window}
