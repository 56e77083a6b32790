"""The same function, with keys that are hard to quantize.

Keys of many models have a few channels that are far larger than the rest (in Qwen2.5-0.5B some are 40 times the
median), and they decide which codecs work at all.  Small models that anybody can run often lack them.

A dot product does not change when a channel of the keys is multiplied by a and the same channel of the queries divided
by a.  A rotary embedding turns the pair of channels (i, i + head_dim / 2) as one vector, so it commutes with a factor
common to both.  Hence any model becomes one with outlier keys: W_k and its bias times a, W_q and its bias divided by a,
in a few pairs of each key/value head.  SmoothQuant (arXiv:2211.10438) rescales weights in this way to remove outliers.

Where queries and keys are normalised per head before the rotary embedding (Qwen3), the weights of the two norms take
the factors; they are shared by all heads of a layer, and so is the choice of pairs.

The factor is a power of two: no weight is rounded, and results equal those of the original model.  That they do, and
that the keys have outliers, is checked on the model itself: rotary embeddings that pair other channels (interleaved,
partial) and norms that add one to their weights cannot be told by the names of the weights.
"""

import copy
import math
from typing import Any

import torch
from torch import nn

from ..errors import EvaluationInputError, UnsupportedModelError
from ..transformers_api.names import cache_in

PAIRS = 2
SEED = 0
_CHECKED_TOKENS = 32


def with_outlier_keys(model: Any, factor: float, pairs: int = PAIRS, *, seed: int = SEED) -> Any:
    """A copy of ``model`` that computes the same, with outliers in its keys; other weights are shared with it.

    Args:
        model: a causal model with separate ``q_proj`` and ``k_proj``, and rotary pairs (i, i + head_dim / 2) or no
            rotary embedding.
        factor: what the chosen channels are multiplied by; a power of two.
        pairs: pairs of channels per key/value head; where queries and keys are normalised per head, per layer.
        seed: chooses the pairs: of layer ``n`` and head ``h`` the first ``pairs`` of row ``h`` of
            ``torch.rand(heads, head_dim // 2).argsort()`` with the generator of seed ``1000 * seed + n``.

    Raises:
        EvaluationInputError: ``factor`` is no power of two, or there are not so many pairs.
        UnsupportedModelError: no such projections, or the result is not the same function.
    """
    if not (math.isfinite(factor) and factor > 0 and math.frexp(factor)[0] == 0.5):
        raise EvaluationInputError(f"the outlier factor must be a power of two, got {factor:g}; use for instance 32.")
    layers = [module for module in model.modules() if _is_attention(module)]
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no separate q_proj and k_proj in floating point, so its keys cannot be given "
            "outliers; leave --outliers out."
        )
    changed = {id(parameter) for layer in layers for parameter in _scaled_parameters(layer)}
    shared = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in changed]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    with torch.no_grad():
        for n, layer in enumerate(module for module in twin.modules() if _is_attention(module)):
            _scale(layer, twin.config.get_text_config(decoder=True), factor, pairs, 1000 * seed + n)
    _check(model, twin, factor)
    return twin


def _is_attention(module: nn.Module) -> bool:
    projections = (getattr(module, "q_proj", None), getattr(module, "k_proj", None))
    return all(isinstance(p, nn.Linear) and p.weight.is_floating_point() for p in projections)


def _scaled_parameters(layer: Any) -> list[torch.Tensor]:
    """What may be multiplied in one attention layer."""
    parts = [getattr(layer, name, None) for name in ("q_proj", "k_proj", "q_norm", "k_norm")]
    return [parameter for part in parts if isinstance(part, nn.Module) for parameter in part.parameters()]


def _scale(layer: Any, config: Any, factor: float, pairs: int, seed: int) -> None:
    """Multiply the chosen channels of the keys of one layer, divide those of its queries."""
    head_dim = getattr(layer, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = layer.k_proj.out_features // head_dim
    norms: list[Any] = [getattr(layer, name, None) for name in ("q_norm", "k_norm")]
    normed = all(getattr(norm, "weight", None) is not None for norm in norms)
    if pairs < 1 or pairs > head_dim // 2:
        raise EvaluationInputError(f"there are 1 to {head_dim // 2} rotary pairs per head, got {pairs}.")
    if any(norm is not None for norm in norms) and not (
        normed and all(norm.weight.shape == (head_dim,) for norm in norms)
    ):
        raise UnsupportedModelError(
            f"{type(layer).__name__} normalises queries and keys with something else than one weight per channel of a "
            "head, so its keys cannot be given outliers; leave --outliers out."
        )
    draw = torch.rand(1 if normed else kv_heads, head_dim // 2, generator=torch.Generator().manual_seed(seed))
    chosen = draw.argsort(dim=1)[:, :pairs]
    scale = torch.ones(len(draw), head_dim)
    scale.scatter_(1, torch.cat([chosen, chosen + head_dim // 2], dim=1), factor)
    if normed:
        targets = [(norms[0].weight, 1 / scale[0]), (norms[1].weight, scale[0])]
    else:
        group = layer.q_proj.out_features // layer.k_proj.out_features  # query heads in a row share a key head
        sides = ((layer.q_proj, 1 / scale.repeat_interleave(group, 0)), (layer.k_proj, scale))
        targets = [(p, by.flatten()) for side, by in sides for p in (side.weight, side.bias) if p is not None]
    for parameter, by in targets:
        by = by.to(parameter)
        parameter.mul_(by.unsqueeze(1) if parameter.dim() == 2 else by)


def _check(model: Any, twin: Any, factor: float) -> None:
    """On a few tokens, half of the digits of the logits must be the same, and every layer must cache larger keys.

    Raises:
        UnsupportedModelError: it is not so.
    """
    size = model.get_input_embeddings().num_embeddings
    ids = torch.randint(size, (1, _CHECKED_TOKENS), generator=torch.Generator().manual_seed(SEED)).to(model.device)
    with torch.inference_mode():
        before, after = (m(ids, use_cache=True) for m in (model, twin))
    x, y = before.logits.double(), after.logits.double()
    error = float((y - x).abs().max() / x.abs().max())
    if not error <= torch.finfo(model.dtype).eps ** 0.5:
        raise UnsupportedModelError(
            f"{type(model).__name__} computes something else with rescaled queries and keys (logits differ by "
            f"{error:.1e}), because its rotary embedding or norms are of another kind; leave --outliers out."
        )
    for old, new in zip(cache_in(before).layers, cache_in(after).layers, strict=True):
        ratio = new.keys.double().square().sum(2) / old.keys.double().square().sum(2)
        if not ((ratio.sqrt() / factor - 1).abs() < 0.1).any():
            raise UnsupportedModelError(
                f"{type(model).__name__} caches the same keys as before although their weights were rescaled; leave "
                "--outliers out."
            )
