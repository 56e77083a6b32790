"""Lloyd-Max codebooks of the unit Gaussian: the scalar quantizers with the least mean squared error.

A rotated vector of head_dim D scaled to length sqrt(D) has coordinates that are close to unit Gaussians, so these
tables serve every model and need no calibration.

    code i stands for LEVELS[bits][i]; it is chosen when BOUNDARIES[bits][i-1] < u <= BOUNDARIES[bits][i]

    bits                      1       2       3        4
    mean squared error        0.3634  0.1175  0.03455  0.009501     of a unit Gaussian

``benchmarks/lloyd_max_tables.py`` computed and printed the literals below, to 13 decimals.

References: Max 1960 (IRE Trans. Information Theory 6), Lloyd 1982 (IEEE Trans. Information Theory 28).
"""

import functools
import itertools

import torch

LEVELS: dict[int, tuple[float, ...]] = {
    1: (
        -0.7978845608029,
        0.7978845608029,
    ),
    2: (
        -1.5104176084991,
        -0.4527800346365,
        0.4527800346365,
        1.5104176084991,
    ),
    3: (
        -2.1519457045370,
        -1.3439092785050,
        -0.7560052812059,
        -0.2450941789442,
        0.2450941789442,
        0.7560052812059,
        1.3439092785050,
        2.1519457045370,
    ),
    4: (
        -2.7325895709952,
        -2.0690172265314,
        -1.6180463860219,
        -1.2562311973472,
        -0.9423404564870,
        -0.6567591185325,
        -0.3880482994903,
        -0.1283950298511,
        0.1283950298511,
        0.3880482994903,
        0.6567591185325,
        0.9423404564870,
        1.2562311973472,
        1.6180463860219,
        2.0690172265314,
        2.7325895709952,
    ),
}
BOUNDARIES: dict[int, tuple[float, ...]] = {
    1: (0.0,),
    2: (
        -0.9815988215678,
        0.0,
        0.9815988215678,
    ),
    3: (
        -1.7479274915210,
        -1.0499572798555,
        -0.5005497300751,
        0.0,
        0.5005497300751,
        1.0499572798555,
        1.7479274915210,
    ),
    4: (
        -2.4008033987633,
        -1.8435318062766,
        -1.4371387916845,
        -1.0992858269171,
        -0.7995497875097,
        -0.5224037090114,
        -0.2582216646707,
        0.0,
        0.2582216646707,
        0.5224037090114,
        0.7995497875097,
        1.0992858269171,
        1.4371387916845,
        1.8435318062766,
        2.4008033987633,
    ),
}


def bucket(u: torch.Tensor, boundaries: tuple[float, ...]) -> torch.Tensor:
    """Number of ``boundaries`` strictly below each element of ``u`` (float32), as uint8."""
    # One comparison per boundary: less than half the time of torch.bucketize, which writes wide integers.
    codes = (u > boundaries[0]).to(torch.uint8)
    for boundary in boundaries[1:]:
        codes += u > boundary
    return codes


@functools.lru_cache(maxsize=64)
def _on_device(table: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """``table`` as float32; kept, because a copy from the host on every call would stall a GPU."""
    return torch.tensor(table, dtype=torch.float32, device=device)


def lookup(codes: torch.Tensor, table: tuple[float, ...]) -> torch.Tensor:
    """``table[codes]`` as float32."""
    # index_select with int32 indices is several times faster than advanced indexing, which wants int64.
    return _on_device(table, codes.device).index_select(0, codes.flatten().int()).view(codes.shape)


def quantize(u: torch.Tensor, bits: int) -> torch.Tensor:
    """Lloyd-Max codes (uint8, below ``2**bits``) of unit-variance numbers ``u`` (float32)."""
    return bucket(u, BOUNDARIES[bits])


def levels(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """What ``codes`` stand for, float32."""
    return lookup(codes, LEVELS[bits])


def cell_radius(u: torch.Tensor, table: tuple[float, ...]) -> torch.Tensor:
    """Upper bound on the distance from each ``u`` to its level in ``table`` (sorted, symmetric around zero).

    Inside the table that is half the widest gap, because boundaries are midpoints; outside it the way back to the end.
    """
    half_gap = max(b - a for a, b in itertools.pairwise(table)) / 2
    return (u.abs() - table[-1]).clamp_min(half_gap)
