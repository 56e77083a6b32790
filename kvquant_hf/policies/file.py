"""Policies by layer as a JSON file, which ``kvquant tune`` writes and ``policy=`` takes.

    format, version   what this is
    model             the fingerprint of the model that it is for
    layers            [{"keys": codec, "values": codec}, ...]: each layer that keeps keys and values, first layer first
    bits_per_element  of full pages, scales included; page_size and the numbers measured stand beside it

Only the first four are read back; the rest says where the file comes from.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import PolicyFileError

FORMAT = "kvquant_hf layer policies"
VERSION = 1
SUFFIX = ".json"


def write_layers(
    path: str | os.PathLike[str], layers: Sequence[dict[str, str]], model: Sequence[Any], facts: dict[str, Any]
) -> None:
    """Write a file.

    Args:
        path: ends with ``.json``.
        layers: ``KVPolicy.as_dict()`` of each layer.
        model: the fingerprint of the model.
        facts: what else is to stand in it.
    """
    content = {"format": FORMAT, "version": VERSION, "model": list(model), "layers": list(layers)} | facts
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_layers(path: str | os.PathLike[str]) -> tuple[list[tuple[str, str]], list[Any]]:
    """Codecs of keys and values of each layer, and the fingerprint of the model.

    Raises:
        PolicyFileError: no such file, another format, or content that contradicts itself.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        known = content["format"] == FORMAT
        version, layers, model = content["version"], content["layers"], content["model"]
        pairs = [(layer["keys"], layer["values"]) for layer in layers]
        known = known and bool(pairs) and isinstance(model, list)
    except OSError as error:
        raise PolicyFileError(
            f"cannot read the policy {str(path)!r}: {error.strerror}; make it with `kvquant tune --out FILE`."
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise _foreign(path) from error
    if not known:
        raise _foreign(path)
    if version != VERSION:
        raise PolicyFileError(
            f"the policy {str(path)!r} has format version {version}, this version of kvquant_hf reads {VERSION}; make "
            "it anew with `kvquant tune --out FILE`."
        )
    return pairs, model


def _foreign(path: str | os.PathLike[str]) -> PolicyFileError:
    return PolicyFileError(
        f"{str(path)!r} holds no policies by layer; give a file that `kvquant tune --out FILE` wrote."
    )
