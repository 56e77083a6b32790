"""Codes in blocks of eight: nearest of all 256 patterns, errors on Gaussians, planes, and where the tables are from."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

from kvquant_hf.triton_kernels.codecs import CODECS, octet
from kvquant_hf.triton_kernels.codecs.lloyd_max import lookup
from kvquant_hf.triton_kernels.codecs.packing import pack_fields

ROOT = Path(__file__).parents[2]
BITS = pytest.mark.parametrize("bits", [2, 3])
ERROR = {2: 0.0940, 3: 0.0256}  # of a unit Gaussian, as the module says


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def found(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed codes of ``x``, and the levels that they stand for."""
    codes = octet.search(x, octet.LEVELS[bits])
    return codes, lookup(codes, octet.signed(octet.LEVELS[bits]))


def every_pattern(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Squared distance of each block ``[N, 8]`` (coordinates in order) to the nearest levels of each of 256 patterns,
    by the definition and nothing else."""
    table = torch.tensor(octet.LEVELS[bits])
    distance = torch.zeros(len(x), 256)
    for pattern in range(256):
        u = [pattern >> i & 1 for i in range(8)]
        v = [u[i] ^ u[i + 4] for i in range(4)]
        for i in range(8):
            sign = -1 if v[(i + 1) % 4] ^ v[(i + 2) % 4] else 1
            distance[:, pattern] += (x[:, i, None] - sign * table[u[i] :: 2]).square().amin(-1)
    return distance


@BITS
def test_the_nearest_of_all_patterns_is_found(bits: int) -> None:
    x = torch.cat([gaussian(300, 8), 3 * gaussian(100, 8, seed=1), torch.zeros(1, 8), torch.full((1, 8), 2.0)])
    # Coordinates i and i + 4 are field i of the even byte and of the odd one.
    channels = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    _, levels = found(x[:, channels], bits)
    distance = (levels - x[:, channels]).square().sum(-1)
    torch.testing.assert_close(distance, every_pattern(x, bits).amin(-1), rtol=1e-5, atol=1e-6)


@BITS
def test_error_on_gaussians(bits: int) -> None:
    x = gaussian(50_000, 8)
    error = (found(x, bits)[1] - x).square().mean().item()
    assert abs(error / ERROR[bits] - 1) < 0.015


@BITS
def test_vectors_lose_less_than_with_lloyd_max(bits: int) -> None:
    """At the same bytes."""
    x, lost = gaussian(4, 64, 128), {}
    for name in (f"octet{bits}", f"lloyd{bits}"):
        codec = CODECS[name]
        assert codec.bytes_per_token(128, 64, torch.float16) == 16 * bits + 2
        lost[name] = ((codec.decode(codec.encode(x)) - x).square().sum() / x.square().sum()).item()
    assert lost[f"octet{bits}"] < {2: 0.82, 3: 0.78}[bits] * lost[f"lloyd{bits}"]


@BITS
@pytest.mark.parametrize("dim", [8, 40, 80, 96])
def test_planes_tell_the_signs(bits: int, dim: int) -> None:
    codes, levels = found(gaussian(5, 7, dim), bits)
    high = octet.pack_high(codes) if bits == 3 else None
    assert torch.equal(octet.expand_octets(pack_fields(codes & 3, 2), high, octet.LEVELS[bits]), levels)


@BITS
def test_codes_do_not_depend_on_the_call(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties among them: multiples of a half."""
    x = torch.cat([gaussian(30, 64), (2 * gaussian(30, 64)).round() / 2])
    together, _ = found(x, bits)
    monkeypatch.setattr(octet, "_SOME", 100)  # less than two rows
    assert torch.equal(found(x, bits)[0], together)
    assert all(torch.equal(found(row, bits)[0], codes) for row, codes in zip(x, together, strict=True))


@BITS
def test_ties_go_to_the_lowest(bits: int) -> None:
    """Zeros are as near to a level as to its negative: v = 0, and the code of the smallest level everywhere."""
    codes, _ = found(torch.zeros(1, 64), bits)
    smallest = min(range(2**bits), key=lambda code: abs(octet.LEVELS[bits][code]))
    assert set(codes.flatten().tolist()) == {smallest}


@BITS
def test_every_level_is_the_mean_of_what_it_stands_for(bits: int) -> None:
    """A step of the script that computed the tables leaves them where they are, within what its sample scatters."""
    spec = importlib.util.spec_from_file_location("octet_tables", ROOT / "benchmarks" / "octet_tables.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    moved = torch.tensor(script.means(gaussian(1 << 16, 8), octet.LEVELS[bits])) - torch.tensor(octet.LEVELS[bits])
    assert moved.abs().max() < 0.01
    assert all(a < b for a, b in itertools.pairwise(octet.LEVELS[bits]))
