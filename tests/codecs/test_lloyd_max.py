"""Codebooks against the theory: conditions of optimality, distortions by quadrature, and vectors through the codecs."""

import dataclasses
import importlib.util
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import ndtr

from kvquant_hf.triton_kernels.codecs import CODECS, lloyd_max, turboquant_qjl
from kvquant_hf.triton_kernels.codecs.lloyd_max import BOUNDARIES, LEVELS

ROOT = Path(__file__).parents[2]
BITS = pytest.mark.parametrize("bits", [1, 2, 3, 4])


def cells(bits: int, end: float = math.inf) -> list[tuple[float, float, float]]:
    """``(low, high, level)`` of every cell of the quantizer on ``(-end, end)``."""
    edges = (-end, *BOUNDARIES[bits], end)
    return [(low, high, level) for (low, high), level in zip(itertools.pairwise(edges), LEVELS[bits], strict=True)]


def integral(f, low: float, high: float) -> float:
    return quad(f, low, high, epsabs=1e-13, epsrel=1e-13)[0]


def gaussian(u: float) -> float:
    return math.exp(-u * u / 2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03455), (4, 0.009501)])
def test_distortion(bits: int, distortion: float) -> None:
    value = sum(
        integral(lambda u, level=level: (u - level) ** 2 * gaussian(u), low, high) for low, high, level in cells(bits)
    )
    assert float(f"{value:.4g}") == distortion


@BITS
def test_tables_are_symmetric_and_sorted(bits: int) -> None:
    for table in (LEVELS[bits], BOUNDARIES[bits]):
        assert table == tuple(sorted(table)) and table == tuple(-value for value in reversed(table))
    assert len(LEVELS[bits]) == 2**bits == len(BOUNDARIES[bits]) + 1


@BITS
def test_boundaries_are_midpoints(bits: int) -> None:
    midpoints = [(a + b) / 2 for a, b in itertools.pairwise(LEVELS[bits])]
    assert max(abs(a - b) for a, b in zip(midpoints, BOUNDARIES[bits], strict=True)) < 1e-12


@BITS
def test_levels_are_means_of_their_cells(bits: int) -> None:
    for low, high, level in cells(bits):
        mean = integral(lambda u: u * gaussian(u), low, high) / integral(gaussian, low, high)
        assert abs(mean - level) < 1e-9


def uncertainty(bits: int) -> float:
    """How far the roundings of every step may move the levels that the script converges to.

    A level is the mean of its cell and its edges are midpoints, so an edge that moves by ``d`` moves the level by
    ``d pdf(edge) |edge - level| / P(cell)``, and a step moves levels by ``moved`` times what they were off.  Errors
    ``e`` of each step add up to ``e + moved e + moved^2 e + ... = (1 - moved)^-1 e``.  Densities and probabilities are
    within four units in the last place, as NumPy promises of ``exp``; then half a unit for each of three roundings, and
    the change at which the script stops.
    """
    moved, error = np.zeros((2**bits, 2**bits)), np.zeros(2**bits)
    for i, (low, high, level) in enumerate(cells(bits)):
        probability = integral(gaussian, low, high)
        for edge, neighbour in ((low, i - 1), (high, i + 1)):
            if math.isfinite(edge):
                slope = gaussian(edge) * abs(edge - level) / probability / 2
                moved[i, i] += slope
                moved[i, neighbour] += slope
            error[i] += 4 * (gaussian(edge) + abs(level) * ndtr(edge)) / probability
        error[i] += 1.5 * abs(level)
    error = error * np.finfo(np.float64).eps + 2e-15
    return float(np.linalg.solve(np.eye(2**bits) - moved, error).max())


def test_script_prints_the_literals(capsys: pytest.CaptureFixture[str]) -> None:
    """The same text, and the same numbers but for digits that processors round differently."""
    spec = importlib.util.spec_from_file_location("lloyd_max_tables", ROOT / "benchmarks" / "lloyd_max_tables.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main()
    printed, distortions = capsys.readouterr().out.split("# distortion: ")
    number = re.compile(rf"-?\d+\.\d{{{script.DIGITS}}}")
    source = Path(lloyd_max.__file__).read_text()
    source = source[source.index("LEVELS: ") :]
    assert number.sub("#", source).startswith(number.sub("#", printed))
    tables: dict[str, dict[int, tuple[float, ...]]] = {}
    exec(printed, tables)
    for bits in (1, 2, 3, 4):
        allowed = uncertainty(bits) + 10.0**-script.DIGITS  # both are rounded to the last digit
        assert allowed < 1e-10, "a wrong digit that float32 could see would pass"
        for name, ours in (("LEVELS", LEVELS), ("BOUNDARIES", BOUNDARIES)):
            assert np.abs(np.subtract(tables[name][bits], ours[bits])).max() <= allowed
    # Seven digits of numbers that are 2e-9 and more from the middle between two of them.
    assert distortions == "1 bit 0.3633802, 2 bit 0.1174818, 3 bit 0.0345478, 4 bit 0.0095010\n"


@BITS
def test_codes_on_and_beside_every_boundary(bits: int) -> None:
    boundaries = torch.tensor(BOUNDARIES[bits])
    above = torch.nextafter(boundaries, torch.tensor(math.inf))
    expected = torch.arange(2**bits - 1, dtype=torch.uint8)
    assert torch.equal(lloyd_max.quantize(boundaries, bits), expected)
    assert torch.equal(lloyd_max.quantize(above, bits), expected + 1)
    assert lloyd_max.quantize(torch.tensor([-math.inf, math.inf]), bits).tolist() == [0, 2**bits - 1]


@BITS
def test_every_level_keeps_its_code(bits: int) -> None:
    codes = torch.arange(2**bits, dtype=torch.uint8).reshape(2, -1)
    levels = lloyd_max.levels(codes, bits)
    assert torch.equal(levels.flatten(), torch.tensor(LEVELS[bits]))
    assert torch.equal(lloyd_max.quantize(levels, bits), codes)


@BITS
def test_cell_radius_bounds_the_distance_to_the_level(bits: int) -> None:
    u = torch.linspace(-8, 8, 100_001)
    distance = (u - lloyd_max.levels(lloyd_max.quantize(u, bits), bits)).abs()
    assert (distance <= lloyd_max.cell_radius(u, LEVELS[bits]) + 1e-6).all()


@pytest.mark.parametrize("bits", [2, 3])
def test_constants_of_lmdeploy_are_the_same_quantizer(bits: int) -> None:
    for theirs, ours in ((turboquant_qjl.LEVELS, LEVELS), (turboquant_qjl.BOUNDARIES, BOUNDARIES)):
        assert max(abs(a - b) for a, b in zip(theirs[bits], ours[bits], strict=True)) < 1e-6


def sphere_cosine_squared(bits: int, head_dim: int) -> float:
    """Squared cosine of the angle between a random vector of length sqrt(head_dim) and its levels.

    One coordinate of such a vector is no Gaussian but has density (1 - u^2 / D)^((D - 3) / 2): shorter tails, so that
    at D = 128 the error is 1 % (2 bit) to 2 % (4 bit) below the Gaussian's.  Sums over D coordinates are replaced by
    their means here, which leaves a relative error of order 1 / D.
    """

    def density(u: float) -> float:
        return max(1 - u * u / head_dim, 0.0) ** ((head_dim - 3) / 2)

    total = sum(integral(density, low, high) for low, high, _ in cells(bits, head_dim**0.5))
    product = energy = 0.0
    for low, high, level in cells(bits, head_dim**0.5):
        product += level * integral(lambda u: u * density(u), low, high) / total
        energy += level**2 * integral(density, low, high) / total
    return product**2 / energy


@pytest.mark.parametrize("name", ["lloyd2", "lloyd4-centred"])
@pytest.mark.parametrize("scale_rule", ["norm", "least-squares", "unbiased"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gaussian_vectors_have_the_error_of_the_theory(name: str, scale_rule: str, head_dim: int) -> None:
    codec = dataclasses.replace(CODECS[name], scale_rule=scale_rule)
    page_size = 64
    x = torch.randn(128, page_size, head_dim, generator=torch.Generator().manual_seed(0))
    x_hat = codec.decode(codec.encode(x))
    relative = float((x_hat - x).square().sum() / x.square().sum())

    cosine_squared = sphere_cosine_squared(codec.bits, head_dim)
    theory = {
        "norm": 2 - 2 * cosine_squared**0.5,
        "least-squares": 1 - cosine_squared,
        "unbiased": 1 / cosine_squared - 1,
    }[scale_rule]
    if name == "lloyd4-centred":
        # The page's mean, 1 / page_size of the energy here, is stored apart.
        theory *= 1 - 1 / page_size
    # A scale fitted to each vector takes one of D degrees of freedom, and the lengths of its residual and of its levels
    # vary together: 1 / D (2 bit) to 2 / D (4 bit) below the theory.  0.3 % is three sigma of 8192 vectors.
    assert theory * (1 - 2.2 / head_dim - 0.003) <= relative <= theory * 1.003


@pytest.mark.parametrize("name", ["lloyd2", "lloyd4-centred"])
def test_scale_rules_do_what_they_are_called(name: str) -> None:
    x = torch.randn(4, 64, 128, generator=torch.Generator().manual_seed(1)) + 2
    for rule in ("norm", "least-squares", "unbiased"):
        codec = dataclasses.replace(CODECS[name], scale_rule=rule)
        planes = codec.encode(x)
        residual, fitted = codec.to_domain(x), codec.tile(planes).dense()
        if codec.centred:
            centre = planes[2].float().unsqueeze(-2)
            residual, fitted = residual - centre, fitted - centre
        product = {
            "norm": fitted.square().sum(-1) / residual.square().sum(-1),
            "least-squares": (fitted * residual).sum(-1) / fitted.square().sum(-1),
            "unbiased": (fitted * residual).sum(-1) / residual.square().sum(-1),
        }[rule]
        # The scale is stored in fp16, half a unit in the last place is 2^-11; the norm squares it.
        assert (product - 1).abs().max() < 2 * 2**-11 * 1.1


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("scale_rule", ["norm", "least-squares", "unbiased"])
def test_bounds_hold_for_every_variant(bits: int, centred: bool, scale_rule: str) -> None:
    codec = dataclasses.replace(CODECS["lloyd2"], bits=bits, centred=centred, scale_rule=scale_rule)
    x = torch.randn(16, 64, 128, generator=torch.Generator().manual_seed(2)) + 1
    x[0, 0] = 0
    x[0, 1, 3] = 1e4
    # One rotated channel alone is the worst case of the angle.
    x[1] = codec.from_domain(1e3 * torch.eye(64, 128))
    error = (codec.decode(codec.encode(x)).double() - x.double()).norm(dim=-1)
    assert (error <= codec.error_bound(x)).all()
