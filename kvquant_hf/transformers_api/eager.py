"""What stands behind "eager": a function in each model's own file, which may do whatever its model needs.

Nearly all of them are softmax attention with the arguments that every attention function gets, and then pages can be
read instead of calling them.  Some know more than they are told (sinks or a scale in the module).  So each function is
asked once for each layer, before it is replaced: what it makes of a few small tensors must be what we make of them.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import output_capturing

# For each function the layers that were asked, and why it cannot be replaced; empty if it can.
_ASKED: dict[Callable[..., Any], weakref.WeakSet[torch.nn.Module]] = {}
_VERDICTS: dict[Callable[..., Any], str] = {}
_TOLERANCE = 1e-3  # float32, elements below 1: rounding stays below 1e-5, another formula does not


def weights_are_recorded(arguments: dict[str, Any]) -> bool:
    """Whether somebody wants the attention weights, which only "eager" gives.

    Args:
        arguments: keyword arguments of the attention call.
    """
    if arguments.get("output_attentions"):
        return True
    collected = output_capturing._active_collector.get()
    return collected is not None and any("attentions" in name for name in collected)


def disagreement(
    original: Callable[..., Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    arguments: dict[str, Any],
    ours: Callable[..., Any],
) -> str:
    """Why ``original`` cannot be replaced by ``ours``; empty if both do the same in ``module``.

    Args:
        original: an eager attention function.
        module: the layer that calls it.
        query, key, value: the tensors of the call, for their heads and dimensions.
        arguments: keyword arguments of the call.
        ours: called like ``original``.
    """
    if torch.compiler.is_compiling():  # a graph cannot ask; the first prompt has, outside of it
        return _VERDICTS.get(original, "its eager attention function was not compared before the graph was made")
    asked = _ASKED.setdefault(original, weakref.WeakSet())
    if module not in asked:
        asked.add(module)
        _VERDICTS[original] = _VERDICTS.get(original, "") or _compare(
            original, module, query, key, value, arguments, ours
        )
    return _VERDICTS[original]


def _compare(
    original: Callable[..., Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    arguments: dict[str, Any],
    ours: Callable[..., Any],
) -> str:
    queries, tokens = 2, 3
    small = [
        _waves((1, x.shape[1], n, x.shape[3]), query.device)
        for x, n in ((query, queries), (key, tokens), (value, tokens))
    ]
    mask = torch.zeros(1, 1, queries, tokens, device=query.device)
    mask[..., 0, 2] = torch.finfo(mask.dtype).min
    arguments = dict(arguments)
    if (bias := arguments.get("position_bias")) is not None:
        arguments["position_bias"] = _waves((1, bias.shape[1], queries, tokens), query.device)
    where = f"{getattr(original, '__module__', '')}.{getattr(original, '__name__', original)}"
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        try:
            theirs = original(module, *small, mask, **arguments)[0]
        except Exception as error:  # whatever a model's own file may raise: then we know nothing of it
            return f"{where} does not run on float32 tensors ({type(error).__name__})"
        difference = (theirs.float() - ours(module, *small, mask, **arguments)[0]).abs().max()
    return "" if difference <= _TOLERANCE else f"{where} is no plain softmax attention"


def _waves(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Numbers between -1 and 1 without a pattern that heads or tokens share; no random state is touched."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, device=device, dtype=torch.float32) * 1.7 + 0.3).view(shape)
