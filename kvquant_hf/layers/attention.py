"""Attention on what ``update`` returned: pages, or the exact keys and values of a first prompt."""

from typing import Any, Literal, Protocol, TypeGuard

import torch

from ..errors import CacheMismatchError
from ..pages.layout import without_autocast
from ..pages.static_ops import compiled_dense_attention
from ..reports.calls import CallLog
from ..triton_kernels.latent import choose_for_latents, latent_attention
from ..triton_kernels.ops import choose, dense_attention, paged_attention


class Packed(Protocol):
    """What ``update`` returned instead of dense keys or values."""

    store: Any
    side: Literal["keys", "values"]
    window: int
    expansion: Any
    shape: torch.Size
    _log: CallLog

    def view_pages(self) -> Any:
        """The pages."""


def is_packed(tensor: Any) -> TypeGuard[Packed]:
    """Whether ``tensor`` is packed; by what it can do, so that one made before a module was reloaded counts."""
    return hasattr(tensor, "view_pages")


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    scale: float | None,
    causal: bool,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    window: int = 0,
) -> torch.Tensor:
    """Attention of ``query`` ``[batch, query_heads, queries, key_dim]``, bounded in memory whatever the context.

    Under autocast it is computed as without: in float32, keys, values and queries each in the dtype they arrived in.

    Args:
        query: the queries.
        keys: a ``KVTensor``, or a plain tensor ``[batch, heads, tokens, key_dim]``.
        values: the same for the values.
        mask: ``[batch or 1, query_heads or 1, queries, tokens]``, bool (True is seen) or additive, or None.
        scale: multiplies the scores; ``key_dim ** -0.5`` if None.
        causal: whether to apply the causal rule, beside ``mask``.
        softcap: see ``paged_attention``.
        sinks: see ``paged_attention``.
        position_bias: ``[batch or 1, query_heads, queries, tokens]``, added to the scores (T5).
        window: tokens that a query sees, itself included, beside ``mask``; 0 for all, or for those of the layer's
            window where ``keys`` have one and there is one query.

    Returns:
        ``[batch, query_heads, queries, value_dim]`` in the query's dtype.

    Raises:
        CacheMismatchError: the mask or the batch size does not fit the keys.
        ImplementationError: the implementation that the cache was made with cannot run.
    """
    _check_mask(mask, query.shape, keys.shape)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if position_bias is not None:
        mask = position_bias if mask is None else _combine(mask, position_bias)
    compiling = torch.compiler.is_compiling()
    if not is_packed(keys):
        if compiling:
            return compiled_dense_attention(query, keys, values, scale, causal, mask, softcap, sinks)
        return dense_attention(query, keys, values, scale=scale, causal=causal, mask=mask, softcap=softcap, sinks=sinks)
    view, store, expansion = keys.view_pages(), keys.store, keys.expansion
    pages: Any = (view.keys, view.values, view.page_table, view.lengths)
    # Several queries may see images beyond a window, both ways; for them the mask alone decides.
    window = window or (keys.window if query.shape[2] == 1 else 0)
    options: dict[str, Any] = {
        "scale": scale,
        "causal": causal,
        "mask": mask,
        "softcap": softcap,
        "sinks": sinks,
        "window": window,
    }
    chosen: Any = None  # in a graph the operator chooses when it runs
    if not compiling and expansion is not None:  # queries that meet no keys of this store: it hears of none
        chosen = choose_for_latents(store.impl, query, view.keys, view.values, expansion.weight.shape[1])
    elif not compiling:
        store.saw(query)  # first, so that what a prompt reads is what stays
        chosen = choose(store.impl, query.dtype, view.keys, view.values)
    with without_autocast(query.device.type):
        impl = store.impl if chosen is None else chosen
        if expansion is not None:
            output = latent_attention(query, expansion.weight, *pages, **options, impl=impl)
        else:
            output = paged_attention(query, *pages, **options, impl=impl)
    if chosen is not None:
        keys._log.attended(chosen.name, chosen.reason)
    return output


def _check_mask(mask: torch.Tensor | None, query: torch.Size, keys: torch.Size) -> None:
    """Refuse what broadcasting would turn into a wrong result.

    Raises:
        CacheMismatchError: the mask or the queries are not of these keys.
    """
    if query[0] != keys[0]:
        raise CacheMismatchError(f"{query[0]} sequences of queries meet {keys[0]} in the cache; use equal batch sizes.")
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise CacheMismatchError(f"an attention mask of {mask.dtype} is ambiguous; use a bool mask (True is seen).")
    fits = all(size in (1, wanted) for size, wanted in zip(mask.shape, query[:3], strict=False))
    if mask.dim() != 4 or mask.shape[3] != keys[2] or not fits:
        raise CacheMismatchError(
            f"the attention mask has shape {list(mask.shape)}, the call needs {[*query[:3], keys[2]]} (1 where all are "
            "alike); pass a mask over all tokens, those in the cache included."
        )


def _combine(mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """One additive mask out of a mask and a position bias."""
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else mask + bias


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``torch.nn.functional.scaled_dot_product_attention`` over pages, for models that call it themselves (Falcon).

    Arguments and result are torch's.  NotImplemented where pages cannot give it: it is then computed by torch on dense
    keys and values.
    """
    if dropout_p or not (is_packed(key) and is_packed(value)) or is_packed(query) or query.dim() != 4:
        return NotImplemented
    if (
        is_causal and query.shape[2] != key.shape[2]
    ):  # torch's causal rule begins with the first key, ours ends at the last
        return NotImplemented
    heads = key.shape[1]
    if heads != query.shape[1] and heads != 1 and not (enable_gqa and query.shape[1] % heads == 0):
        return NotImplemented
    if attn_mask is not None and (attn_mask.dim() != 4 or attn_mask.shape[3] != key.shape[2]):
        return NotImplemented
    keys: Any = key  # tensors to their reader
    values: Any = value
    return attend(query, keys, values, mask=attn_mask, scale=scale, causal=is_causal)
