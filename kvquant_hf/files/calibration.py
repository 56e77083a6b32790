"""The two files of a calibration, both in a folder of the user's choice.

    statistics.safetensors   layers.<i>.<side>.min, .max, .absmax   float32 [heads, head_dim]
    qparams.safetensors      layers.<i>.<side>.scale, .zero         float32 [heads, head_dim]
    both                     layers.<i>.queries.moments             float32 [heads, head_dim]
                             layers.<i>.queries.correlations        fp16 [heads, head_dim (head_dim - 1) / 2]

``<side>`` is ``keys`` or ``values``.  Of queries there are the second moments of one token, of each key/value head, as
``pages/moments.py`` keeps them: of all layers, or of none, where the model's attention shows no queries and in files of
before there were any.  The header holds the writer's versions, the model's fingerprint, and ``facts``:
how they came about.  What is checked on reading is in ``checked.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch

from ..errors import QParamsError, WrongModelError
from ..layers.paged import PagedLayer
from ..pages.moments import Moments
from ..triton_kernels.codecs import Codec
from .checked import CheckedFile, Tensors, check_model

SIDES = ("keys", "values")
QUERIES = "queries"
REMEDY = "run kvquant calibrate and kvquant qparams"

_Self = TypeVar("_Self", bound="LayerTensors")


@dataclass(frozen=True)
class LayerTensors:
    """Named tensors of layers, of one model.

    Args:
        tensors: ``layers.<i>.<side>.<name>``, float32 ``[heads, head_dim]`` on the CPU, for every name of ``NAMES``;
            and, of all layers or of none, ``layers.<i>.queries.moments`` and ``.correlations``, see the module.
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
        of_queries = {name for i in self.layers for name in names_of_moments(i)} if self.knows_queries else set()
        fits = expected and self.tensors.keys() == expected | of_queries
        fits = fits and all(_is_plane(self.tensors[name]) for name in expected)
        if not fits or (of_queries and not all(map(self._moments_fit, self.layers))):
            raise QParamsError(f"the tensors are not those of {self.KIND.title}; {self.KIND.remedy}.")

    @property
    def layers(self) -> list[int]:
        """Indices of the layers that it has."""
        parts = [name.split(".") for name in self.tensors]
        return sorted({int(p[1]) for p in parts if len(p) == 4 and p[0] == "layers" and p[1].isdecimal()})

    @property
    def queries(self) -> Tensors:
        """The tensors of queries."""
        return {name: x for name, x in self.tensors.items() if name.split(".")[2:3] == [QUERIES]}

    @property
    def knows_queries(self) -> bool:
        """Whether it has moments of queries."""
        return bool(self.queries)

    def moments(self, layer: int) -> Moments | None:
        """Those of the queries of one token in one layer, if it has any."""
        if not self.knows_queries:
            return None
        return Moments(*(self.tensors[name] for name in names_of_moments(layer)))

    def _moments_fit(self, layer: int) -> bool:
        """Whether the moments of a layer are those of its keys."""
        heads, dim = self.of(layer, SIDES[0])[0].shape
        diagonal, correlations = (self.tensors[name] for name in names_of_moments(layer))
        return (
            _is_plane(diagonal)
            and diagonal.shape == (heads, dim)
            and bool((diagonal >= 0).all())
            and correlations.dtype == torch.float16
            and correlations.shape == (heads, dim * (dim - 1) // 2)
            and bool((correlations.abs() <= 1.01).all())  # no number is refused, too
        )

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


def names_of_moments(layer: int) -> tuple[str, str]:
    """What the moments of a layer's queries are called, in the order of ``Moments``."""
    return f"layers.{layer}.{QUERIES}.moments", f"layers.{layer}.{QUERIES}.correlations"


def _is_plane(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and x.ndim == 2 and bool(x.isfinite().all())


def read_qparams(
    qparams: str | os.PathLike[str] | QParams | None, policy: str, needed: bool, useful: bool = False
) -> QParams | None:
    """The parameters for a policy that needs or uses them; None for one that does not need them and is given none.

    Args:
        qparams: a file, a folder that has it, or what was read from one.
        policy: name of the policy.
        needed: whether it has a calibrated codec.
        useful: whether it rounds keys by queries, for which moments of queries are a prior.

    Raises:
        QParamsError: they are missing, cannot be read, the policy takes none, or could use nothing but moments of
            queries, and there are none.
    """
    if qparams is None:
        if needed:
            raise QParamsError(
                f"policy {policy!r} needs calibrated parameters: {REMEDY}, and give the folder as qparams."
            )
        return None
    if not needed and not useful:
        raise QParamsError(f"policy {policy!r} takes no qparams; leave them out, or use policy='int8-static'.")
    found = qparams if isinstance(qparams, QParams) else QParams.load(qparams)
    if not needed and not found.knows_queries:
        raise QParamsError(
            f"policy {policy!r} could use nothing but moments of queries, and these qparams have none (they are of an "
            f"older version, or the model's attention shows no queries); leave them out, or {REMEDY}."
        )
    return found


class Calibrated(NamedTuple):
    """What a calibration gives to one layer."""

    keys: Codec
    values: Codec
    prior: Moments | None  # of queries; None where keys are not rounded by them, or nothing is known


def calibrated_codecs(
    qparams: str | os.PathLike[str] | QParams | None,
    policy: str,
    codecs: Mapping[int, tuple[Codec, Codec]],
    fingerprint: tuple[Any, ...],
) -> tuple[QParams | None, dict[int, Calibrated]]:
    """What was given, and for each layer the codecs of keys and values with their parameters, and its prior.

    Args:
        qparams: see :func:`read_qparams`.
        policy: name of the policy.
        codecs: the same without, by the layer's index.
        fingerprint: of the model.

    Raises:
        QParamsError: see :func:`read_qparams`.
        WrongModelError: they are of another model.
    """
    needed = any(codec.calibrated for pair in codecs.values() for codec in pair)
    found = read_qparams(qparams, policy, needed, any(keys.uses_queries for keys, _ in codecs.values()))
    if found is None:
        return None, {i: Calibrated(*pair, None) for i, pair in codecs.items()}
    where = "the file of parameters" if isinstance(qparams, QParams) else qparams
    check_model(where, found.model, fingerprint, "calibrated with")
    if missing := codecs.keys() - set(found.layers):
        raise WrongModelError(f"{where} has no layer {min(missing)}; {REMEDY} for this model.")
    given: dict[int, Calibrated] = {}
    for i, pair in codecs.items():
        keys, values = (
            codec.given(*found.of(i, side)) if codec.calibrated else codec
            for codec, side in zip(pair, SIDES, strict=True)
        )
        given[i] = Calibrated(keys, values, found.moments(i) if keys.uses_queries else None)
    return found, given


def hand_over(
    qparams: str | os.PathLike[str] | QParams | None,
    policy: str,
    layers: Sequence[Any],
    fingerprint: tuple[Any, ...],
) -> QParams | None:
    """Give the paged ones of ``layers``, all layers of a cache, their parameters and priors; what was given.

    Raises:
        QParamsError, WrongModelError: see :func:`calibrated_codecs`.
    """
    paged = {i: layer for i, layer in enumerate(layers) if isinstance(layer, PagedLayer)}
    found, codecs = calibrated_codecs(qparams, policy, {i: x.codecs for i, x in paged.items()}, fingerprint)
    for i, layer in paged.items():
        layer.codecs, layer.prior = codecs[i][:2], codecs[i].prior
    return found
