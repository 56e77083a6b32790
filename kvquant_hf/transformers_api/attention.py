"""The attention function that transformers calls, under its own name and inside "sdpa"."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..layers.attention import attend
from ..layers.carrier import dense, is_packed
from ..layers.static_carrier import exact_prompt

# Arguments of an attention call that change its result and that pages cannot honour.
_UNKNOWN_TO_PAGES = ("indices", "block_indices", "cache")


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function "kvquant"; arguments and result as transformers' ``sdpa_attention_forward``."""
    key, value, attention_mask, position_bias = exact_prompt(key, value, attention_mask, position_bias)
    packed = is_packed(key) and is_packed(value)
    foreign = [name for name in _UNKNOWN_TO_PAGES if kwargs.get(name) is not None]
    if dropout > 0:
        foreign.append("dropout")
    special = softcap is not None or s_aux is not None
    if foreign or not (packed or special):
        reason = f"argument {foreign[0]!r}" if foreign else "keys or values were changed after the cache"
        options = {"softcap": softcap, "s_aux": s_aux, "position_bias": position_bias, "is_causal": is_causal}
        options = {name: option for name, option in options.items() if option is not None}
        return sdpa_attention_forward(
            module,
            query,
            dense(key, reason),
            dense(value, reason),
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            **options,
            **kwargs,
        )
    output = attend(
        query,
        key,
        value,
        mask=attention_mask,
        scale=scaling,
        causal=is_causal if is_causal is not None else getattr(module, "is_causal", True),
        softcap=softcap,
        sinks=s_aux,
        position_bias=position_bias,
    )
    return output.transpose(1, 2).contiguous(), None


def _sdpa_drops_softcap() -> bool:
    """Whether this transformers' "sdpa" computes without a softcap that it is given; newer versions refuse it."""
    x = torch.zeros(1, 1, 1, 1)
    try:
        sdpa_attention_forward(torch.nn.Module(), x, x, x, None, softcap=1.0)
    except ValueError:
        return False
    return True


_DROPS_SOFTCAP = _sdpa_drops_softcap()


def route_packed(original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' "sdpa", except that packed keys and values go to :func:`attention_forward`.

    The name stands for the same arithmetic either way: where transformers leaves out a softcap, so does this.
    """

    def sdpa(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        bias = kwargs.pop("position_bias", None)
        key, value, attention_mask, bias = exact_prompt(key, value, attention_mask, bias)
        if bias is not None:
            kwargs["position_bias"] = bias
        if not is_packed(key):
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        if _DROPS_SOFTCAP:
            kwargs.pop("softcap", None)
        return attention_forward(module, query, key, value, attention_mask, *args, **kwargs)

    return sdpa
