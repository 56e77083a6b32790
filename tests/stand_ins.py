"""Attention functions that stand in for those that do not run on every machine.

FlashAttention needs a GPU and flex attention a compiler.  These do their arithmetic on plain tensors, under their
names, and check that they are given what the real ones take: plain tensors, and masks of their kind.  Importing the
module registers them, before the package is enabled again: as if transformers had them from the beginning.
"""

from typing import Any

import torch
from torch.nn.attention import flex_attention
from transformers import PreTrainedModel, masking_utils
from transformers.modeling_utils import AttentionInterface

import kvquant_hf

FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
NAMES = ("eager", "sdpa", *FLASH, "flex_attention")


def visible(query: torch.Tensor, key: torch.Tensor, causal: bool, window: int | None) -> torch.Tensor:
    """bool ``[queries, tokens]``: the causal rule and the window of FlashAttention, aligned at the end."""
    last = torch.arange(query.shape[2])[:, None] + key.shape[2] - query.shape[2]
    position = torch.arange(key.shape[2])
    seen = position <= last if causal else torch.ones_like(position <= last)
    return seen & (position > last - window) if window else seen


def flash(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What FlashAttention computes, from what it accepts."""
    assert all(type(x) is torch.Tensor and x.dim() == 4 for x in (query, key, value))
    assert attention_mask is None or (attention_mask.dim() == 2 and attention_mask.shape[1] == key.shape[2])
    seen = visible(query, key, module.is_causal if is_causal is None else is_causal, sliding_window)[None, None]
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, None]
    return attention(query, key, value, scaling, seen, softcap, s_aux), None


def flex(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What flex attention computes, from what it accepts."""
    assert all(type(x) is torch.Tensor and x.dim() == 4 for x in (query, key, value))
    assert attention_mask is None or isinstance(attention_mask, flex_attention.BlockMask)
    seen = torch.ones((), dtype=torch.bool)
    if attention_mask is not None:
        size = (query.shape[0], 1, query.shape[2], key.shape[2])
        seen = flex_attention.create_mask(attention_mask.mask_mod, *size, query.device)
    return attention(query, key, value, scaling, seen, softcap, s_aux, position_bias), None


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    seen: torch.Tensor,
    softcap: float | None,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention, ``[batch, queries, heads, dim]``."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], 3)
    weights = scores.softmax(3)[..., : key.shape[2]].nan_to_num(0)  # a padded query may see nothing
    return (weights @ value).transpose(1, 2)


def uncompiled(*args: Any, _compile: bool = True, **kwargs: Any) -> flex_attention.BlockMask:
    """``create_block_mask`` without its compiler, which takes seconds for each mask."""
    return flex_attention.create_block_mask(*args, **kwargs)


def with_attention(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """``model`` as if it had been loaded with ``attn_implementation=name``, which looks for packages and devices."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = name
    return model


def register(**functions: Any) -> None:
    """Have transformers know ``functions`` by their names from the beginning."""
    kvquant_hf.disable()
    AttentionInterface._global_mapping.update(functions)
    kvquant_hf.enable()


REAL_FLEX = masking_utils.create_block_mask, AttentionInterface._global_mapping["flex_attention"].args[0]
masking_utils.create_block_mask = uncompiled
register(flex_attention=flex, **dict.fromkeys(FLASH, flash))
