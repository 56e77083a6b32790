"""A cache as one safetensors file, and back, without quantizing anything again.

    header    format, version, crc32, and ``cache``: JSON with the writer's versions, policy, options, model and layers
    tensors   layers.<i>.table             int32 [batch, sealed_pages]: rows of the planes
              layers.<i>.keys.<plane>      [pages, heads, ...]: each page in use once, however many sequences share it
              layers.<i>.keys.first        [batch, heads, sinks, head_dim]: first tokens that are exact, if any
              layers.<i>.first_at          int32 [batch]: where they are among the tokens held; negative: nowhere
              layers.<i>.keys.open         [batch, heads, tokens, head_dim]: the used part of the open page
              layers.<i>.<attribute>[.<j>] layers of transformers' own: their tensors as they are
              qparams.<name>               what a calibrated policy was given, as in ``calibration.py``

Each layer says its kind, a version and its integers (``PagedStore.SAVED``: one more name is one more integer).  What
every file is checked for is in ``checked.py``.
"""

import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from ..errors import InterruptedForwardError, SavedCacheError
from ..pages.store import PagedStore
from ..policies.table import AnyPolicy, named_codecs, policy_from_dict
from ..triton_kernels.codecs import CODECS
from .calibration import QParams
from .checked import CheckedFile, Tensors, check_model
from .layers import expect, inconsistent, restore_layer, save_layer

FORMAT = "kvquant_hf cache"
_REMEDY = "write one with cache.save(path)"
_FILE = CheckedFile(FORMAT, 1, "a cache saved by kvquant_hf", _REMEDY, SavedCacheError)
read_file, write_file = _FILE.read, _FILE.write
_OPTIONS = ("page_size", "prefill", "sliding", "sinks")  # what the constructor takes and what changes results


class Cache(Protocol):
    """What a file needs to know of a ``QuantizedPagedCache``."""

    layers: list[Any]
    policy: AnyPolicy
    qparams: QParams | None

    @property
    def stores(self) -> list[PagedStore]:
        """The stores that hold something."""


_Cache = TypeVar("_Cache", bound=Cache)


# -- saving ------------------------------------------------------------------------------------------------------------


def save_cache(cache: Cache, path: str | os.PathLike[str], fingerprint: tuple[Any, ...]) -> None:
    """See ``QuantizedPagedCache.save``."""
    # A forward pass fills the layers in order: it is over when the last one holds as much as the first.
    lengths = [layer.get_seq_length() for layer in cache.layers if hasattr(layer, "get_seq_length")]
    if lengths[0] != lengths[-1]:
        raise InterruptedForwardError(
            f"the last forward pass was interrupted and the layers hold {lengths[0]} and {lengths[-1]} tokens; call "
            "cache.rollback() to drop the unfinished tokens, or cache.reset() to start again, before cache.save()."
        )
    layers, tensors = [], Tensors()
    for i, layer in enumerate(cache.layers):
        state, held = save_layer(layer)
        layers.append(state)
        tensors |= {f"layers.{i}.{name}": tensor.cpu().contiguous() for name, tensor in held.items()}
    stores = cache.stores
    header = {
        "kvquant_hf": version("kvquant-hf"),
        "transformers": version("transformers"),
        "policy": cache.policy.as_dict(),
        "options": {name: getattr(cache, name) for name in _OPTIONS},
        "model": fingerprint,
        "tokens": max((store.length for store in stores), default=0),
        "dtype": str(stores[0].dtype).removeprefix("torch.") if stores else "",
        "layers": layers,
    }
    if cache.qparams is not None:
        header["qparams"] = cache.qparams.header
        tensors |= {f"qparams.{name}": tensor for name, tensor in cache.qparams.tensors.items()}
    write_file(Path(os.path.realpath(path)), header, tensors)


# -- loading -----------------------------------------------------------------------------------------------------------


def load_cache(
    make: Callable[[AnyPolicy, dict[str, Any]], _Cache],
    path: str | os.PathLike[str],
    fingerprint: tuple[Any, ...],
    device: torch.device,
) -> _Cache:
    """See ``QuantizedPagedCache.load``.

    Args:
        make: an empty cache of this policy, with these options.
        path: the file.
        fingerprint: of the model that is to read the cache.
        device: where the pages are to live.
    """
    text, tensors = read_file(Path(path))
    try:
        header = json.loads(text)
        check_model(path, header["model"], fingerprint, "filled by")
        unknown = [codec for codec in named_codecs(header["policy"]) if codec not in CODECS]
        unknown += [option for option in header["options"] if option not in _OPTIONS]
        if unknown:
            raise SavedCacheError(
                f"{path} needs {unknown[0]!r}, which this version does not have; install kvquant-hf "
                f"{header['kvquant_hf']}, which wrote it, or newer."
            )
        options = {"sinks": 0} | header["options"]  # files of before there were any do not say
        if "qparams" in header:
            options["qparams"] = QParams.from_parts(header["qparams"], _below("qparams.", tensors))
        cache = make(policy_from_dict(header["policy"]), options)
        if cache.policy != policy_from_dict(header["policy"]):
            raise SavedCacheError(
                f"{path} has policy {policy_from_dict(header['policy']).name!r} and {type(cache).__name__} is "
                f"{cache.policy.name!r}; use QuantizedPagedCache.load."
            )
        # What is written later must be plain tensors, also when the caller is in inference mode now.
        expect(len(header["layers"]) == len(cache.layers), f"the list of layers in {path}")
        with torch.inference_mode(False), torch.no_grad():
            for i, (layer, saved) in enumerate(zip(cache.layers, header["layers"], strict=True)):
                held = _below(f"layers.{i}.", tensors)
                restore_layer(layer, saved, held, device, f"layer {i} of {path}", header["transformers"])
        expect(header["tokens"] == max((store.length for store in cache.stores), default=0), f"{path} in its length")
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise inconsistent(f"the header of {path}") from error
    return cache


def _below(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
