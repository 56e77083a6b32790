"""Safetensors files with a JSON header, a version and a checksum: saved caches, statistics, quantization parameters.

    metadata   format, version, crc32 of everything below, and ``cache``: the JSON
    tensors    by name

The checksum covers the JSON and every tensor with its name, dtype and shape, so a file with a flipped bit is refused; a
file appears under its name only when it is complete.
"""

import json
import os
import uuid
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import KVQuantError, WrongModelError

Tensors = dict[str, torch.Tensor]


class CheckedFile(NamedTuple):
    """One kind of file.

    Args:
        format: what its metadata says it is.
        version: the version that is written and read.
        title: what errors call it, with its article.
        remedy: how to write one.
        error: raised for what is wrong in a file.
    """

    format: str
    version: int
    title: str
    remedy: str
    error: type[KVQuantError]

    def write(self, path: Path, header: dict[str, Any], tensors: Tensors) -> None:
        """Write header and CPU tensors; ``path`` has the whole file afterwards, or what it had before.

        Raises:
            FileNotFoundError: no such folder.
            KVQuantError: ``error``: the file could not be written.
        """
        if not path.parent.is_dir():
            raise FileNotFoundError(f"the folder {path.parent} does not exist; make it, or save elsewhere.")
        text = json.dumps(header, separators=(",", ":"))
        metadata = {"format": self.format, "version": str(self.version), "cache": text}
        metadata["crc32"] = f"{_checksum(text, tensors):08x}"
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")  # same folder: replacing must not cross file systems
        try:
            save_file(tensors, temporary, metadata)
            os.replace(temporary, path)
        except SafetensorError as error:
            raise self.error(f"{path} could not be written ({error}); free some space or save elsewhere.") from error
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, path: Path) -> tuple[str, Tensors]:
        """The header's JSON and the tensors; these lie in the mapped file and must be copied.

        Raises:
            FileNotFoundError: no such file.
            KVQuantError: ``error``: not such a file, of a newer version, truncated or changed.
        """
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}; {self.remedy}.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != self.format:
                    raise self.error(f"{path} is not {self.title}; {self.remedy}.")
                if metadata.get("version") != str(self.version):
                    raise self.error(
                        f"{path} has format version {metadata.get('version')}, this version of kvquant_hf reads "
                        f"{self.version}; load it with the version of kvquant-hf that wrote it, or make it again."
                    )
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        except SafetensorError as error:
            raise self.error(
                f"{path} is truncated, corrupt or no safetensors file ({error}); write it again."
            ) from error
        text = metadata.get("cache", "")
        if metadata.get("crc32") != f"{_checksum(text, tensors):08x}":
            raise self.error(f"{path} was changed after it was written (its checksum differs); write it again.")
        return text, tensors


def check_model(path: Any, saved: Any, fingerprint: tuple[Any, ...], what: str) -> None:
    """Refuse a file whose header names another model.

    Args:
        path: the file.
        saved: the header's fingerprint.
        fingerprint: of the model that is to use it.
        what: what the model of the file did.

    Raises:
        WrongModelError: they differ.
    """
    if saved != json.loads(json.dumps(fingerprint)):
        raise WrongModelError(
            f"{path} was {what} the model {saved}, the config given is of {list(fingerprint)}; load it with the config "
            "of the model that it is of."
        )


def _checksum(text: str, tensors: Tensors) -> int:
    """CRC-32 of the header's JSON and of every tensor, in the order of names."""
    crc = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc
