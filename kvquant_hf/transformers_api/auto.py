"""``policy="auto"``: the most accurate policy within a budget, for the pages that a model's config promises.

Bits are those of full pages, as ``policies/cost.py`` counts them.  Where layers differ in head_dim (Gemma 4), a policy
has to keep to the budget in each of them.  Only what ``exact`` takes depends on the model's dtype; a config that names
none stands for float32.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import UnknownPolicyError, UnsupportedModelError
from ..policies.auto import AUTO, LADDER, AutoPolicy
from ..policies.cost import choose, ladder
from ..policies.sizes import parse_size
from ..policies.table import POLICIES, AnyPolicy, PolicyLike, parse_policy
from .layers import windows_of

_OTHER_DIMS = ("global_head_dim", "swa_head_dim")  # of the layers that see all tokens, or a window, where they differ


def policy_for(
    config: Any,
    policy: PolicyLike,
    page_size: int = 64,
    *,
    bits: float | None = None,
    kv_budget: int | None = None,
    max_length: int | None = None,
) -> AnyPolicy:
    """What a user wrote as a policy, for one model.

    Args:
        config: the model's config.
        policy: as ``parse_policy`` takes it.
        page_size: tokens per page.
        bits: the budget of ``"auto"``: bits per element in full pages.
        kv_budget: the same in bytes, of the full pages of all layers that ``max_length`` tokens of a sequence fill.
        max_length: tokens; by default all that the model has positions for.

    Raises:
        UnknownPolicyError: no such policy; no budget, or two, or one beside another policy than ``"auto"``; no policy
            within it.
        UnsupportedModelError: a budget for a model whose config does not say what a page holds.
    """
    if kv_budget is not None:
        if policy != AUTO or bits is not None:
            raise UnknownPolicyError(
                f"kv_budget is a budget of policy {AUTO!r}, in the place of bits; use policy={AUTO!r} and one of the "
                "two, or max_bytes to bound another policy."
            )
        return _within(config, page_size, kv_budget, max_length)
    parsed = parse_policy(policy, bits)
    return choose(parsed, _rungs(config, page_size)) if isinstance(parsed, AutoPolicy) else parsed


def budget_in_bytes(kv_budget: Any) -> int:
    """A budget as it is written, an integer or ``"2 GiB"``.

    Raises:
        UnknownPolicyError: neither.
    """
    size = parse_size(kv_budget) if isinstance(kv_budget, str) else kv_budget
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UnknownPolicyError(f"kv_budget is bytes, as a positive integer or as '2GiB', got {kv_budget!r}.")
    return size


def head_dims(config: Any) -> list[tuple[int, int]]:
    """Elements per key and per value vector; several pairs where layers differ.

    Raises:
        UnsupportedModelError: the cache holds something else than the heads of the config.
    """
    decoder = config.get_text_config(decoder=True)
    if getattr(decoder, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"policy {AUTO!r} counts bits of heads, and model type {decoder.model_type!r} caches latents (MLA); name a "
            "policy, and look at report()."
        )
    found: dict[tuple[int, int], None] = {}
    for layer in _layer_configs(decoder):
        first = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        for dim in (first, *(getattr(layer, name, None) for name in _OTHER_DIMS)):
            if dim:
                found[dim, getattr(layer, "v_head_dim", None) or dim] = None
    return list(found)


def _layer_configs(decoder: Any) -> Sequence[Any]:
    """The config of each layer where transformers has them, which then is the only one to ask; or the one for all."""
    return getattr(decoder, "per_layer_config", None) or [decoder]


def _rungs(config: Any, page_size: int) -> dict[str, float]:
    """Bits per element of each policy that every layer can store, in the layer where it takes most."""
    dtype = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
    each = [ladder(*dims, page_size, dtype) for dims in head_dims(config)]
    return {name: max(rungs[name] for rungs in each) for name in LADDER if all(name in rungs for rungs in each)}


def _within(config: Any, page_size: int, budget: int, max_length: int | None) -> AnyPolicy:
    """The most accurate policy with which the pages of a sequence take no more than ``budget`` bytes."""
    decoder = config.get_text_config(decoder=True)
    tokens = getattr(decoder, "max_position_embeddings", None) if max_length is None else max_length
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise UnknownPolicyError(
            f"kv_budget is for max_length tokens, got {tokens!r}; give a positive integer as max_length."
        )
    full = -(-tokens // page_size)
    pages = sum(min(full, -(-window // page_size) + 2) if window else full for window in windows_of(config))
    heads = max(getattr(x, "num_key_value_heads", None) or x.num_attention_heads for x in _layer_configs(decoder))
    elements = pages * page_size * heads * max(map(sum, head_dims(config)))
    stored = {name: round(bits * elements / 8) for name, bits in _rungs(config, page_size).items()}
    for name, needed in stored.items():
        if needed <= budget:
            return POLICIES[name]
    name = min(stored, key=lambda name: stored[name])
    raise UnknownPolicyError(
        f"no policy holds {tokens:,} tokens of this model in {budget:,} bytes; the smallest, {name!r}, takes "
        f"{stored[name]:,}: give at least that as kv_budget, or a smaller max_length."
    )
