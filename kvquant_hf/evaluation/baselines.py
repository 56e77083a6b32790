"""transformers' own quantized caches, as contenders.

``QuantizedCache`` quantizes the first chunk when it arrives, and everything anew each time that about 128 exact tokens
have come together (versions of transformers count them differently); its first chunk attends to exact keys and values.
It is read in the same chunks as ours.  Groups of 64 elements, and the axes that transformers' documentation recommends:
0 for quanto, 1 for HQQ.
"""

import importlib.util
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, QuantizedCache

from ..errors import EvaluationInputError, MissingPackageError
from .harness import Contender, Storage


class Backend(NamedTuple):
    """A backend of ``QuantizedCache``: what to import, what to install, its bits and its axis."""

    module: str
    package: str
    bits: tuple[int, ...]
    axis: int


_WEIGHED_TOKENS = 128  # a multiple of the groups of 64 along either axis
DYNAMIC = "dynamic"  # transformers' exact cache, where that is not the reference anyway

BACKENDS = {
    "quanto": Backend("optimum.quanto", "optimum-quanto", (2, 4), 0),
    "hqq": Backend("hqq", "hqq", (1, 2, 3, 4, 8), 1),
}


def parse_baseline(name: str) -> tuple[str, int]:
    """Backend and bits of ``"<backend>-<bits>"``.

    Raises:
        EvaluationInputError: no such backend, or not with so many bits.
        MissingPackageError: its package is not installed.
    """
    kind, _, bits = name.rpartition("-")
    known = BACKENDS.get(kind)
    if known is None or bits not in map(str, known.bits):
        names = ", ".join(f"{kind}-{n}" for kind, backend in BACKENDS.items() for n in backend.bits)
        raise EvaluationInputError(f"transformers has no quantized cache {name!r}; use {names}.")
    if not _installed(known.module):
        raise MissingPackageError(
            f"the baseline {name!r} needs the package {known.package}; run: pip install {known.package}, or leave it "
            "out of --baselines."
        )
    return kind, int(bits)


def check_cache(name: str) -> None:
    """Raise what :func:`parse_baseline` does, unless ``name`` is ``"dynamic"``."""
    if name != DYNAMIC:
        parse_baseline(name)


def make_cache(config: Any, name: str) -> Any:
    """An empty cache of transformers for a model's ``config``: ``"dynamic"`` or ``"<backend>-<bits>"``.

    Raises:
        EvaluationInputError, MissingPackageError: as :func:`parse_baseline` does.
    """
    if name == DYNAMIC:
        return DynamicCache(config=config)
    kind, bits = parse_baseline(name)
    axis = BACKENDS[kind].axis
    return QuantizedCache(kind, config, nbits=bits, axis_key=axis, axis_value=axis)


def baseline(model: Any, name: str) -> Contender:
    """The contender ``"<backend>-<bits>"``; raises what :func:`parse_baseline` does."""
    parse_baseline(name)
    return Contender(name, lambda: make_cache(model.config, name), weigh)


def stored_bits(model: Any, name: str) -> float:
    """Bits per element that a baseline stores what has left its window of exact tokens in, scales counted.

    Measured: a first chunk of random numbers, which ``QuantizedCache`` quantizes whole, and then weighed.
    """
    decoder = model.config.get_text_config(decoder=True)
    heads = getattr(decoder, "num_key_value_heads", None) or decoder.num_attention_heads
    head_dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
    drawn = torch.randn(1, heads, _WEIGHED_TOKENS, head_dim, generator=torch.Generator().manual_seed(0))
    states = drawn.to(model.device, model.dtype)
    cache = make_cache(model.config, name)
    cache.update(states, states.clone(), 0)
    return 8 * held_bytes(cache) / (2 * states.numel())


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


def weigh(cache: Any, reference: Any) -> Storage:
    """Bytes of every tensor that the cache's layers hold, against the elements of the exact cache."""
    elements = sum(layer.keys.numel() + layer.values.numel() for layer in reference.layers)
    return Storage(held_bytes(cache), elements)


def held_bytes(cache: Any) -> int:
    """Bytes of every tensor that the layers of any cache of transformers hold, memory that is shared counted once."""
    return sum(_storages([vars(layer) for layer in cache.layers]).values())


def _storages(item: Any) -> dict[int, int]:
    """Bytes by memory, of all tensors that an object is made of; packed tensors are taken apart."""
    if isinstance(item, torch.Tensor) and hasattr(item, "__tensor_flatten__"):
        item = [getattr(item, name) for name in item.__tensor_flatten__()[0]]
    if isinstance(item, torch.Tensor):
        return {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes()}
    parts = item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else ()
    return {pointer: size for part in parts for pointer, size in _storages(part).items()}
