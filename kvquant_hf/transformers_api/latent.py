"""Layers that cache latents (MLA: DeepSeek and those after it), and their ``expand_kv``, which is extended.

All of transformers' layers of this kind have one method of one name, and call it with what ``cache.update`` returned,
latents as "keys" and rotary keys as "values", for the keys and values of all heads.  With packed pages it returns
carriers that stand for these (``layers/latent.py``), provided that the layer does what we would do in its place: its
``kv_b_proj`` is a plain ``Linear``, and what the method makes of a few small latents is what our formula makes of them.
Each layer is asked once.  One that is something else (quantized or adapted weights, another formula) makes its keys and
values of what the pages hold, as any reader may, and the report says why.

Which classes there are is known from a model's config when a cache is made: those in the file beside the config's.
"""

import functools
import importlib
import importlib.util
import sys
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from ..layers.attention import is_packed
from ..layers.latent import Expansion
from ..layers.readonly import dense

_METHOD = "expand_kv"
_ORIGINALS: dict[type, Callable[..., Any]] = {}  # of the classes that are known
_enabled = False

# The layers that were asked, of which projection, and what each has said; graphs cannot ask, and find it in the layer.
_ASKED: "weakref.WeakKeyDictionary[torch.nn.Module, tuple[torch.nn.Module, str]]" = weakref.WeakKeyDictionary()
_SAID = "_kvquant_refusal"


def extend_latents() -> None:
    """Extend ``expand_kv`` of the classes that are known, and from now on of those that :func:`know` finds."""
    global _enabled
    _enabled = True
    for owner, original in _ORIGINALS.items():
        setattr(owner, _METHOD, _extended(original))


def restore_latents() -> None:
    """Put back what was there."""
    global _enabled
    _enabled = False
    for owner, original in _ORIGINALS.items():
        setattr(owner, _METHOD, original)


def know(config: Any) -> None:
    """Learn the classes of the model that ``config`` is of, if it caches latents."""
    decoder = config.get_text_config(decoder=True)
    if getattr(decoder, "kv_lora_rank", None) is None:
        return
    for module in _modeling(type(decoder)):
        for owner in vars(module).values():
            if isinstance(owner, type) and _METHOD in vars(owner) and owner not in _ORIGINALS:
                _ORIGINALS[owner] = original = vars(owner)[_METHOD]
                if _enabled:
                    setattr(owner, _METHOD, _extended(original))


def _modeling(config_type: type) -> Iterator[ModuleType]:
    """The files with the models of a config, and of those that it is derived from."""
    for base in config_type.__mro__:
        name = base.__module__.replace(".configuration_", ".modeling_")
        if name == base.__module__:
            continue
        if name.startswith("transformers.models.") and importlib.util.find_spec(name):
            yield importlib.import_module(name)
        elif name in sys.modules:  # a model's own code
            yield sys.modules[name]


def _extended(original: Callable[..., Any]) -> Callable[..., Any]:
    """``expand_kv`` of a class, for packed latents too."""

    @functools.wraps(original)
    def expand_kv(self: torch.nn.Module, kv_nope: Any, k_rot: Any) -> Any:
        if not (is_packed(kv_nope) and is_packed(k_rot)):
            return original(self, kv_nope, k_rot)
        layer: Any = self
        latents: Any = kv_nope
        rotary: Any = k_rot
        expand = functools.partial(original, layer)
        if reason := _refusal(layer, original, latents, rotary):
            return expand(dense(latents, reason), dense(rotary, reason))
        weight = layer.kv_b_proj.weight
        weight = weight.unflatten(0, (-1, layer.qk_nope_head_dim + layer.v_head_dim))
        return Expansion(latents, rotary, weight, layer.qk_nope_head_dim, expand).carriers()

    return expand_kv


def _refusal(layer: Any, original: Callable[..., Any], latents: Any, rotary: Any) -> str:
    """Why the latents are to be expanded by ``layer`` itself; empty where it is known what it does."""
    if torch.compiler.is_compiling():
        said: str = getattr(layer, _SAID, "its expand_kv was not compared before the graph was made")
        return said
    projection: Any = getattr(layer, "kv_b_proj", None)
    asked = _ASKED.get(layer)
    if asked is None or asked[0] is not projection:
        reason = _other_than_linear(layer, projection, latents, rotary) or _disagreement(
            layer, original, rotary.shape[3]
        )
        _ASKED[layer] = asked = projection, reason
        setattr(layer, _SAID, reason)
    return asked[1]


def _other_than_linear(layer: Any, projection: Any, latents: Any, rotary: Any) -> str:
    """What ``kv_b_proj`` is if not a plain ``Linear`` for the latents that are held; empty if it is one."""
    name = f"{type(layer).__name__}.kv_b_proj"
    if type(projection) is not torch.nn.Linear or type(projection.weight) not in (torch.Tensor, torch.nn.Parameter):
        weight = getattr(projection, "weight", None)
        of = f" of {type(weight).__name__}" if type(projection) is torch.nn.Linear else ""
        return f"{name} is a {type(projection).__name__}{of} and no plain Linear"
    if not all(isinstance(getattr(layer, dim, None), int) for dim in ("qk_nope_head_dim", "v_head_dim")):
        return f"{type(layer).__name__} does not say what a head makes of a latent"
    rows, rank = projection.weight.shape
    expanded = layer.qk_nope_head_dim + layer.v_head_dim
    if latents.shape[1] != 1 or rotary.shape[1] != 1 or latents.shape[3] != rank or rows % expanded:
        return f"{name} is not for latents of {latents.shape[3]} elements"
    if not projection.weight.is_floating_point() or projection.weight.device != latents.device:
        return f"{name} has a weight of {projection.weight.dtype} on {projection.weight.device}"
    return ""


def _disagreement(layer: Any, original: Callable[..., Any], rope: int) -> str:
    """Why ``original`` is not our formula; empty if it is.  Latents with a single 1 show columns of the weight as they
    are, and one of zeros a bias; the products have one term each, so they are off by a rounding at most."""
    weight = layer.kv_b_proj.weight.detach()
    rows, rank = weight.shape
    nope, value = layer.qk_nope_head_dim, layer.v_head_dim
    shown = sorted({*range(0, rank, max(1, rank // 8)), rank - 1})
    latents = weight.new_zeros(1, 1, len(shown) + 1, rank)
    latents[0, 0, range(len(shown)), shown] = 1.0
    rotary = torch.arange(latents.shape[2] * rope, device=weight.device).view(1, 1, -1, rope).to(weight.dtype) / rope
    columns = torch.cat((weight[:, shown], weight.new_zeros(rows, 1)), 1).view(-1, nope + value, latents.shape[2])
    expected = columns.transpose(1, 2).unsqueeze(0)  # [1, heads, latents, nope + value]
    theirs = _asked(layer, original, latents, rotary)
    if isinstance(theirs, str):
        return theirs
    ours = torch.cat((expected[..., :nope], rotary.expand(-1, expected.shape[1], -1, -1)), -1), expected[..., nope:]
    for x, y in zip(theirs, ours, strict=True):
        if x.shape != y.shape or not ((x.float() - y.float()).abs() <= 2.0**-8 * y.float().abs()).all():
            return f"{type(layer).__name__}.{_METHOD} is no product with the weight of kv_b_proj"
    return ""


def _asked(layer: Any, original: Callable[..., Any], latents: torch.Tensor, rotary: torch.Tensor) -> Any:
    """Keys and values that ``layer`` makes, or why it makes none."""
    with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
        try:
            return original(layer, latents, rotary)
        except Exception as error:  # whatever a model's own file may raise: then we know nothing of it
            return f"{type(layer).__name__}.{_METHOD} does not run on small latents ({type(error).__name__})"
