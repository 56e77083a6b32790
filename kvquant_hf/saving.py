"""A cache as one safetensors file, and back, without quantizing anything again.

    header    format, version, crc32, and ``cache``: JSON with the writer's versions, policy, options, model and layers
    tensors   layers.<i>.table             int32 [batch, sealed_pages]: rows of the planes
              layers.<i>.keys.<plane>      [pages, heads, ...]: each page in use once, however many sequences share it
              layers.<i>.keys.open         [batch, heads, tokens, head_dim]: the used part of the open page
              layers.<i>.<attribute>[.<j>] layers of transformers' own: their tensors as they are

Each layer says its kind, a version and its integers (``PagedStore.SAVED``: one more name is one more integer).  The
checksum covers the JSON and every tensor with its name, dtype and shape, so a file with a flipped bit is refused.
"""

import json
import os
import uuid
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import InterruptedForwardError, SavedCacheError, WrongModelError
from .layer_state import Tensors, expect, inconsistent, restore_layer, save_layer
from .policy import AnyPolicy, named_codecs, policy_from_dict
from .triton_kernels.codecs import CODECS

if TYPE_CHECKING:
    from .cache import QuantizedPagedCache

FORMAT = "kvquant_hf cache"
VERSION = 1
_OPTIONS = ("page_size", "prefill", "sliding")  # what the constructor takes and what changes results


# -- saving ------------------------------------------------------------------------------------------------------------


def save_cache(cache: "QuantizedPagedCache", path: str | os.PathLike[str], fingerprint: tuple[Any, ...]) -> None:
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
    write_file(Path(os.path.realpath(path)), header, tensors)


def write_file(path: Path, header: dict[str, Any], tensors: Tensors) -> None:
    """Write header and CPU tensors; ``path`` has the whole file afterwards, or what it had before.

    Raises:
        FileNotFoundError: no such folder.
        SavedCacheError: the file could not be written.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist; make it, or save elsewhere.")
    text = json.dumps(header, separators=(",", ":"))
    checksum = f"{_checksum(text, tensors):08x}"
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")  # in the same folder: replacing must not cross file systems
    try:
        save_file(tensors, temporary, {"format": FORMAT, "version": str(VERSION), "crc32": checksum, "cache": text})
        os.replace(temporary, path)
    except SafetensorError as error:
        raise SavedCacheError(f"{path} could not be written ({error}); free some space or save elsewhere.") from error
    finally:
        temporary.unlink(missing_ok=True)


# -- loading -----------------------------------------------------------------------------------------------------------


def load_cache(
    make: Callable[[AnyPolicy, dict[str, Any]], "QuantizedPagedCache"],
    path: str | os.PathLike[str],
    fingerprint: tuple[Any, ...],
    device: torch.device,
) -> "QuantizedPagedCache":
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
        if header["model"] != json.loads(json.dumps(fingerprint)):
            raise WrongModelError(
                f"{path} was filled by the model {header['model']}, the config given is of {list(fingerprint)}; load "
                "it with the config of the model that filled it."
            )
        unknown = [codec for codec in named_codecs(header["policy"]) if codec not in CODECS]
        unknown += [option for option in header["options"] if option not in _OPTIONS]
        if unknown:
            raise SavedCacheError(
                f"{path} needs {unknown[0]!r}, which this version does not have; install kvquant-hf "
                f"{header['kvquant_hf']}, which wrote it, or newer."
            )
        cache = make(policy_from_dict(header["policy"]), header["options"])
        # What is written later must be plain tensors, also when the caller is in inference mode now.
        expect(len(header["layers"]) == len(cache.layers), f"the list of layers in {path}")
        with torch.inference_mode(False), torch.no_grad():
            for i, (layer, saved) in enumerate(zip(cache.layers, header["layers"], strict=True)):
                prefix = f"layers.{i}."
                held = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
                restore_layer(layer, saved, held, device, f"layer {i} of {path}", header["transformers"])
        expect(header["tokens"] == max((store.length for store in cache.stores), default=0), f"{path} in its length")
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise inconsistent(f"the header of {path}") from error
    return cache


def read_file(path: Path) -> tuple[str, Tensors]:
    """The header's JSON and the tensors of a file; the tensors lie in the mapped file and must be copied.

    Raises:
        FileNotFoundError: no such file.
        SavedCacheError: not a file of ours, of a newer version, truncated or changed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; write one with cache.save(path).")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise SavedCacheError(f"{path} is not a cache saved by kvquant_hf; write one with cache.save(path).")
            if metadata.get("version") != str(VERSION):
                raise SavedCacheError(
                    f"{path} has format version {metadata.get('version')}, this version of kvquant_hf reads {VERSION}; "
                    "load it with the version of kvquant-hf that wrote it, or make the cache again."
                )
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except SafetensorError as error:
        raise SavedCacheError(
            f"{path} is truncated, corrupt or no safetensors file ({error}); save the cache again."
        ) from error
    text = metadata.get("cache", "")
    if metadata.get("crc32") != f"{_checksum(text, tensors):08x}":
        raise SavedCacheError(f"{path} was changed after it was written (its checksum differs); save the cache again.")
    return text, tensors


# -- both --------------------------------------------------------------------------------------------------------------


def _checksum(text: str, tensors: Tensors) -> int:
    """CRC-32 of the header's JSON and of every tensor, in the order of names."""
    crc = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc
