"""The two files of a calibration, both in a folder of the user's choice.

    statistics.safetensors   layers.<i>.<side>.min, .max, .absmax   float32 [heads, head_dim]
    qparams.safetensors      layers.<i>.<side>.scale, .zero         float32 [heads, head_dim]

``<side>`` is ``keys`` or ``values``.  The header holds the writer's versions, the model's fingerprint, and ``facts``:
how they came about.  What is checked on reading is in ``checked.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from ..errors import QParamsError, WrongModelError
from ..layers.paged import PagedLayer
from ..triton_kernels.codecs import Codec
from .checked import CheckedFile, Tensors, check_model

SIDES = ("keys", "values")
REMEDY = "run kvquant calibrate and kvquant qparams"

_Self = TypeVar("_Self", bound="LayerTensors")


@dataclass(frozen=True)
class LayerTensors:
    """Named tensors of layers, of one model.

    Args:
        tensors: ``layers.<i>.<side>.<name>``, float32 ``[heads, head_dim]`` on the CPU, for every name of ``NAMES``.
        model: the model's fingerprint.
        facts: how they came about; JSON.

    Raises:
        QParamsError: a tensor is missing, one too many, or not such a tensor.
    """

    KIND: ClassVar[CheckedFile]
    FILE: ClassVar[str]
    NAMES: ClassVar[tuple[str, ...]]

    tensors: Tensors
    model: list[Any]
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        expected = {f"layers.{i}.{side}.{name}" for i in self.layers for side in SIDES for name in self.NAMES}
        fits = all(x.dtype == torch.float32 and x.ndim == 2 and bool(x.isfinite().all()) for x in self.tensors.values())
        if not expected or self.tensors.keys() != expected or not fits:
            raise QParamsError(f"the tensors are not those of {self.KIND.title}; {self.KIND.remedy}.")

    @property
    def layers(self) -> list[int]:
        """Indices of the layers that it has."""
        parts = [name.split(".") for name in self.tensors]
        return sorted({int(p[1]) for p in parts if len(p) == 4 and p[0] == "layers" and p[1].isdecimal()})

    def of(self, layer: int, side: str) -> tuple[torch.Tensor, ...]:
        """The tensors of one side of one layer, in the order of ``NAMES``."""
        return tuple(self.tensors[f"layers.{layer}.{side}.{name}"] for name in self.NAMES)

    @property
    def header(self) -> dict[str, Any]:
        """What a file says beside the tensors."""
        return {
            "kvquant_hf": version("kvquant-hf"),
            "transformers": version("transformers"),
            "model": self.model,
            "facts": self.facts,
        }

    @classmethod
    def from_parts(cls: type[_Self], header: dict[str, Any], tensors: Tensors) -> _Self:
        """The inverse of ``header`` and ``tensors``; the tensors are copied.

        Raises:
            QParamsError: they do not fit together.
        """
        try:
            return cls({name: x.clone() for name, x in tensors.items()}, list(header["model"]), dict(header["facts"]))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, QParamsError):
                raise
            raise QParamsError(f"the header is not that of {cls.KIND.title}; {cls.KIND.remedy}.") from error

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``FILE`` into a folder, which is made if need be; its path.

        Raises:
            QParamsError: it could not be written.
        """
        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise QParamsError(f"cannot make the folder {path}: {error.strerror}; name another one.") from error
        self.KIND.write(path / self.FILE, self.header, self.tensors)
        return path / self.FILE

    @classmethod
    def load(cls: type[_Self], path: str | os.PathLike[str]) -> _Self:
        """Read a file, or ``FILE`` in a folder.

        Raises:
            QParamsError: there is none, or it is not such a file, truncated or changed.
        """
        place = Path(path)
        try:
            text, tensors = cls.KIND.read(place / cls.FILE if place.is_dir() else place)
        except FileNotFoundError as error:
            raise QParamsError(str(error)) from error
        return cls.from_parts(json.loads(text), tensors)

    def __deepcopy__(self: _Self, memo: dict[int, object]) -> _Self:
        return self  # nobody writes into it


class Statistics(LayerTensors):
    """Smallest, largest and largest absolute element of each channel of each head, over a text."""

    KIND = CheckedFile(
        "kvquant_hf statistics",
        1,
        "a calibration's statistics",
        "write one with kvquant calibrate --out FOLDER",
        QParamsError,
    )
    FILE = "statistics.safetensors"
    NAMES = ("min", "max", "absmax")


class QParams(LayerTensors):
    """Scale and zero point of each channel of each head; all alike in a layer's side if they are per tensor."""

    KIND = CheckedFile("kvquant_hf qparams", 1, "a file of quantization parameters", REMEDY, QParamsError)
    FILE = "qparams.safetensors"
    NAMES = ("scale", "zero")


# -- what a cache does with them ---------------------------------------------------------------------------------------


def read_qparams(qparams: str | os.PathLike[str] | QParams | None, policy: str, needed: bool) -> QParams | None:
    """The parameters for a policy that needs them, None for one that does not.

    Args:
        qparams: a file, a folder that has it, or what was read from one.
        policy: name of the policy.
        needed: whether it has a calibrated codec.

    Raises:
        QParamsError: they are missing, cannot be read, or the policy takes none.
    """
    if qparams is None:
        if needed:
            raise QParamsError(
                f"policy {policy!r} needs calibrated parameters: {REMEDY}, and give the folder as qparams."
            )
        return None
    if not needed:
        raise QParamsError(f"policy {policy!r} takes no qparams; leave them out, or use policy='int8-static'.")
    return qparams if isinstance(qparams, QParams) else QParams.load(qparams)


def calibrated_codecs(
    qparams: str | os.PathLike[str] | QParams | None,
    policy: str,
    codecs: Mapping[int, tuple[Codec, Codec]],
    fingerprint: tuple[Any, ...],
) -> tuple[QParams | None, dict[int, tuple[Codec, Codec]]]:
    """What was given, and the codecs of keys and values of each layer with their parameters.

    Args:
        qparams: see :func:`read_qparams`.
        policy: name of the policy.
        codecs: the same without, by the layer's index.
        fingerprint: of the model.

    Raises:
        QParamsError: they are missing, cannot be read, or the policy takes none.
        WrongModelError: they are of another model.
    """
    found = read_qparams(qparams, policy, any(codec.calibrated for pair in codecs.values() for codec in pair))
    if found is None:
        return None, dict(codecs)
    where = "the file of parameters" if isinstance(qparams, QParams) else qparams
    check_model(where, found.model, fingerprint, "calibrated with")
    if missing := codecs.keys() - set(found.layers):
        raise WrongModelError(f"{where} has no layer {min(missing)}; {REMEDY} for this model.")
    given: dict[int, tuple[Codec, Codec]] = {}
    for i, pair in codecs.items():
        keys, values = (
            codec.given(*found.of(i, side)) if codec.calibrated else codec
            for codec, side in zip(pair, SIDES, strict=True)
        )
        given[i] = keys, values
    return found, given


def hand_over(
    qparams: str | os.PathLike[str] | QParams | None,
    policy: str,
    layers: Sequence[Any],
    fingerprint: tuple[Any, ...],
) -> QParams | None:
    """Give the paged ones of ``layers``, all layers of a cache, their parameters; what was given.

    Raises:
        QParamsError, WrongModelError: see :func:`calibrated_codecs`.
    """
    paged = {i: layer for i, layer in enumerate(layers) if isinstance(layer, PagedLayer)}
    found, codecs = calibrated_codecs(qparams, policy, {i: x.codecs for i, x in paged.items()}, fingerprint)
    for i, layer in paged.items():
        layer.codecs = codecs[i]
    return found
