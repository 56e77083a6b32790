"""Scales and zero points from extremes, by LMDeploy's formulae, in float32:

    asymmetric   zero = (max + min) / 2     scale = (max - min) / 255
    symmetric    zero = 0                   scale = absmax / 127

over all channels of all heads of a side of a layer (``per="tensor"``, as LMDeploy), or for each channel of each head
(``per="channel"``).  A code is round((x - zero) / scale); ``triton_kernels/codecs/static.py`` has the rest.

LMDeploy's own files, for each layer i and each rank r of ``tp``, which has heads / tp of the heads:

    layers.<i>.past_kv_scale.<r>.weight    raw float32, little-endian, without a header
        asymmetric   key scale, key zero, value scale, value zero        16 bytes
        symmetric    key scale, value scale                               8 bytes

Reference: LMDeploy before 0.4.0, ``lmdeploy/lite/apis/kv_qparams.py``.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..errors import QParamsError
from ..files.calibration import SIDES, QParams, Statistics

PER = ("tensor", "channel")


def _range(extremes: Sequence[torch.Tensor], symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point from (min, max, absmax), float32 of their shape."""
    low, high, absmax = extremes
    if symmetric:
        return absmax / 127, torch.zeros_like(absmax)
    return (high - low) / 255, (high + low) / 2


def _overall(extremes: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """(min, max, absmax) of all channels together, scalars."""
    low, high, absmax = extremes
    return low.amin(), high.amax(), absmax.amax()


def compute(statistics: Statistics, *, per: str = "tensor", symmetric: bool = False) -> QParams:
    """Quantization parameters from statistics; moments of queries go with them as they are.

    Args:
        statistics: of a calibration.
        per: ``"tensor"``: one pair for the keys and one for the values of a layer; ``"channel"``: of each head.
        symmetric: without a zero point.

    Raises:
        QParamsError: unknown ``per``, or a range that float32 does not hold.
    """
    if per not in PER:
        raise QParamsError(f"unknown per={per!r}; use {' or '.join(map(repr, PER))}.")
    tensors = dict(statistics.queries)
    for layer in statistics.layers:
        for side in SIDES:
            extremes = statistics.of(layer, side)
            chosen = _overall(extremes) if per == "tensor" else extremes
            pair = _range(chosen, symmetric)
            for name, x in zip(QParams.NAMES, pair, strict=True):
                tensors[f"layers.{layer}.{side}.{name}"] = x.expand(extremes[0].shape).clone()
    return QParams(tensors, statistics.model, {"per": per, "symmetric": symmetric, "calibration": statistics.facts})


def write_turbomind(
    statistics: Statistics, folder: str | os.PathLike[str], *, tp: int = 1, symmetric: bool = False
) -> list[Path]:
    """LMDeploy's raw files, one for each layer and rank (see the module's docstring); their paths.

    Args:
        statistics: of a calibration.
        folder: where to; it exists.
        tp: ranks of tensor parallelism.
        symmetric: without a zero point.

    Raises:
        QParamsError: the heads cannot be divided among so many ranks.
    """
    files = {}
    for layer in statistics.layers:
        sides = [statistics.of(layer, side) for side in SIDES]
        heads = [extremes[0].shape[0] for extremes in sides]
        if tp < 1 or any(n % tp for n in heads):
            raise QParamsError(f"layer {layer} has {heads[0]} heads, which {tp} ranks cannot share; use another --tp.")
        for rank in range(tp):
            numbers: list[torch.Tensor] = []
            for extremes, n in zip(sides, heads, strict=True):
                mine = [x[rank * n // tp : (rank + 1) * n // tp] for x in extremes]
                scale, zero = _range(_overall(mine), symmetric)
                numbers += [scale] if symmetric else [scale, zero]
            files[f"layers.{layer}.past_kv_scale.{rank}.weight"] = np.array(numbers, dtype="<f4")
    for name, content in files.items():
        content.tofile(Path(folder) / name)
    return [Path(folder) / name for name in files]
