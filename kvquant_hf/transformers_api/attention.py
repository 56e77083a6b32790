"""The attention functions that transformers calls: "kvquant", and those of other names with packed keys and values.

A model picks its function by name.  Ours stands under a name of its own; under "sdpa", "eager", "flex_attention" and
the FlashAttention names it takes over where keys and values are packed, and nowhere else: a first prompt is attended to
by the function that the model was loaded with.  What each name makes of masks, soft cap and sinks holds for pages too:

    sdpa, eager       4D masks
    flash_attention_* None or a 2D padding mask; causal rule and sliding window are arguments
    flex_attention    a ``BlockMask``, which is multiplied out to one byte per query and token
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from ..layers.attention import attend, is_packed
from ..layers.readonly import dense
from ..layers.static_carrier import exact_prompt
from ..pages.queries import saw
from .eager import disagreement, weights_are_recorded

NAME = "kvquant"
# Names under which packed keys and values come to us.  "eager" is none that transformers registers.
ROUTED = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
# Arguments of an attention call that change its result and that pages cannot honour.
_UNKNOWN_TO_PAGES = frozenset(("indices", "block_indices", "cache", "cu_seq_lens_q"))


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function "kvquant"; arguments and result as transformers' ``sdpa_attention_forward``."""
    return _attend_or(_dense_attention, _attend, module, query, key, value, attention_mask, dropout=dropout, **kwargs)


def _dense_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> Any:
    """What "kvquant" does where nothing is packed: transformers' sdpa, or our own arithmetic where it has none."""
    special = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    if special and not _foreign(kwargs):
        return _attend(module, query, key, value, mask, **kwargs)
    return sdpa_attention_forward(module, query, key, value, mask, **_without_none(kwargs))


def _foreign(kwargs: dict[str, Any]) -> list[str]:
    """Arguments that pages cannot honour."""
    foreign = ["dropout"] if kwargs.get("dropout", 0.0) > 0 else []
    if named := _UNKNOWN_TO_PAGES & kwargs.keys():
        foreign += sorted(name for name in named if kwargs[name] is not None)
    return foreign


def _without_none(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments that say something: not every version knows all names."""
    optional = ("softcap", "s_aux", "position_bias", "is_causal")
    return {name: value for name, value in kwargs.items() if name not in optional or value is not None}


def _attend_or(
    original: Callable[..., Any],
    ours: Callable[..., Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    reason: str = "",
    **kwargs: Any,
) -> Any:
    """Attention over pages, or ``original`` on plain tensors: those it was given, or what pages hold multiplied out.

    Args:
        original: an attention function of transformers.
        ours: what reads pages.
        reason: why pages cannot be read although they are there; empty if they can.
        kwargs: the rest of the call.
    """
    key, value, mask, bias = exact_prompt(key, value, mask, kwargs.pop("position_bias", None))
    if bias is not None:
        kwargs["position_bias"] = bias
    packed = is_packed(key), is_packed(value)
    if any(packed):
        foreign = _foreign(kwargs)
        reason = reason or (f"argument {foreign[0]!r}" if foreign else "")
        if not reason and all(packed):
            return ours(module, query, key, value, mask, **kwargs)
        reason = reason or "keys or values were changed after the cache"
        if packed[0] and not torch.compiler.is_compiling():
            saw(key, query)
        key, value = dense(key, reason), dense(value, reason)
    result = original(module, query, key, value, mask, **kwargs)
    _tell(key, query)
    return result


def _tell(key: torch.Tensor, query: torch.Tensor) -> None:
    """Queries that have attended to plain keys are seen by the store that holds these."""
    if not torch.compiler.is_compiling():
        saw(key, query)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention by our own arithmetic, over pages or over plain tensors; nothing in ``others`` changes the result."""
    mask, decides = _four_dimensional(mask, query, key)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    output = attend(
        query,
        key,
        value,
        mask=mask,
        scale=scaling,
        causal=causal and not decides,
        softcap=softcap,
        sinks=s_aux,
        position_bias=position_bias,
        window=0 if decides or not causal else sliding_window or 0,
    )
    return output.transpose(1, 2).contiguous(), None


def _four_dimensional(mask: Any, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor | None, bool]:
    """A mask ``[batch or 1, query_heads or 1, queries or 1, tokens]`` or None, and whether it alone decides what is
    seen: one of padding, or none, leaves the causal rule and the window to arguments."""
    if isinstance(mask, BlockMask):
        return create_mask(mask.mask_mod, query.shape[0], 1, query.shape[2], key.shape[2], query.device), True
    if mask is None or mask.dim() != 2:
        return mask, mask is not None
    # For what a static cache has reserved and not filled, FlashAttention gets no mask; lengths say where it begins.
    padding = torch.nn.functional.pad(mask.bool(), (0, key.shape[2] - mask.shape[1]), value=True)
    return padding[:, None, None], False


def _sdpa_drops_softcap() -> bool:
    """Whether this transformers' "sdpa" computes without a softcap that it is given; newer versions refuse it."""
    x = torch.zeros(1, 1, 1, 1)
    try:
        sdpa_attention_forward(torch.nn.Module(), x, x, x, None, softcap=1.0)
    except ValueError:
        return False
    return True


# Sinks it knows in no version; models that have them are not loaded with it.
_DROPPED_BY_SDPA = ("s_aux", "softcap") if _sdpa_drops_softcap() else ("s_aux",)


def _routed(
    original: Callable[..., Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """``original``, except that packed keys and values are read by us.

    A name stands for the same arithmetic either way: what transformers' "sdpa" leaves out, this does too.
    """
    if not (is_packed(key) or is_packed(value)):
        result = original(module, query, key, value, attention_mask, *args, **kwargs)
        _tell(key, query)
        return result
    kwargs = _by_name(original, args, kwargs)
    if original is sdpa_attention_forward:
        for name in _DROPPED_BY_SDPA:
            kwargs.pop(name, None)
    return _attend_or(original, _attend, module, query, key, value, attention_mask, **kwargs)


def _routed_eager(
    original: Callable[..., Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The same for "eager", which stands for a function of each model's own file (see ``eager.py``)."""
    if not (is_packed(key) or is_packed(value)):
        result = original(module, query, key, value, attention_mask, *args, **kwargs)
        _tell(key, query)
        return result
    kwargs = _by_name(original, args, kwargs)
    reason = "attention weights are asked for" if weights_are_recorded(kwargs) else ""
    ours = functools.partial(_attend, is_causal=False)  # where it gets no mask, it hides nothing
    reason = reason or disagreement(original, module, query, key, value, kwargs, ours)
    return _attend_or(original, ours, module, query, key, value, attention_mask, reason=reason, **kwargs)


def _by_name(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What follows the mask in a call of ``original``, all by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(original).parameters)[5:]
    return dict(zip(names, args, strict=False)) | kwargs


def route(original: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function of transformers that hands packed keys and values to us."""
    return functools.partial(_routed, original)


def is_ours(function: Any) -> bool:
    """Whether packed keys and values come to us by ``function`` already."""
    return function is attention_forward or getattr(function, "func", None) in (_routed, _routed_eager)


def route_by_name(get_interface: Callable[..., Any]) -> Callable[..., Any]:
    """``AttentionInterface.get_interface``, by which models look their function up: for "eager" it hands out what the
    model brings along, and for a FlashAttention kernel of the hub one that is registered when a model is loaded."""

    @functools.wraps(get_interface)
    def get(self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        found = get_interface(self, attn_implementation, default)
        if found is default:
            return functools.partial(_routed_eager, found)
        if attn_implementation in ROUTED or ("flash" in attn_implementation and "paged|" not in attn_implementation):
            return found if is_ours(found) else route(found)
        return found

    return get
