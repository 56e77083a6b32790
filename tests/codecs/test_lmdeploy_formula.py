"""LMDeploy's formulae, written down element by element from its documentation, against the vectorized codecs.

Nothing of ours is called to compute what is expected: numpy float32 scalars, Python loops, and numpy.float16 or a bf16
cast for storage.  The inputs are small integers, so that every sum of the rotation is exact in float32.
"""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from kvquant_hf.triton_kernels.codecs import CODECS

F = np.float32
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])


def random_page(head_dim: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(16, head_dim, generator=generator) * 20 + 7).round().clamp(-100, 100).to(dtype)


def rounded(value: float, dtype: torch.dtype) -> float:
    """``value`` as the model's dtype stores it."""
    return float(torch.tensor(float(value), dtype=torch.float64).float().to(dtype))


def naive_token(x: np.ndarray, bits: int) -> tuple[list[int], F, F]:
    """Codes, scale and zero of one token."""
    low, high = F(min(x)), F(max(x))
    scale = F(F(high - low) / F(2**bits - 1))
    zero = F(-low / scale)
    return [int(F(F(F(value / scale) + zero) + F(0.5))) for value in x], scale, zero


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("bits", [8, 4])
def test_integer_token_formats(bits: int, head_dim: int, dtype: torch.dtype) -> None:
    page = random_page(head_dim, dtype, seed=bits) * 0.37  # the product is rounded to dtype: no longer integers
    codes, scale, zero = CODECS[f"int{bits}-token"].encode(page)
    decoded = CODECS[f"int{bits}-token"].decode((codes, scale, zero))
    for t in range(page.shape[0]):
        expected, s, z = naive_token(page[t].float().numpy(), bits)
        if bits == 4:
            half = head_dim // 2
            packed = [expected[j] + 16 * expected[j + half] for j in range(half)]
        else:
            packed = expected
        assert codes[t].tolist() == packed
        stored_scale, stored_zero = rounded(s, dtype), rounded(z, dtype)
        assert scale[t].item() == stored_scale and zero[t].item() == stored_zero
        x_hat = [(code - stored_zero) * stored_scale for code in expected]
        # (q - z) s and q s - z s differ by float32 rounding of z s only.
        np.testing.assert_allclose(
            decoded[t].numpy(), x_hat, rtol=0, atol=4e-7 * abs(stored_zero * stored_scale) + 4e-5
        )


LEVELS_3 = [-2.1519456, -1.3439093, -0.7560052, -0.2450942, 0.2450942, 0.7560052, 1.3439093, 2.1519456]
BOUNDARIES_3 = [-1.7479274, -1.0499573, -0.5005497, 0.0, 0.5005497, 1.0499573, 1.7479274]
LEVELS_2 = [-1.5104176, -0.4527808, 0.4527808, 1.5104176]
BOUNDARIES_2 = [-0.9815992, 0.0, 0.9815992]


def naive_rotation(x: np.ndarray) -> list[F]:
    """Sylvester's matrix over the largest power of two that divides the dimension, block after block."""
    order = 1
    while len(x) % (2 * order) == 0:
        order *= 2
    signs = scipy.linalg.hadamard(order)
    rotated = []
    for start in range(0, len(x), order):
        for row in signs:
            total = sum(int(sign) * int(value) for sign, value in zip(row, x[start : start + order], strict=True))
            rotated.append(F(F(total) * F(order**-0.5)))
    return rotated


def naive_unit(y: list[F]) -> tuple[F, list[F]]:
    norm = F(math.sqrt(math.fsum(float(value) ** 2 for value in y) + 1e-8))
    return norm, [F(value / norm) for value in y]


def naive_code(u: F, boundaries: list[float], head_dim: int) -> int:
    sigma = F(head_dim**-0.5)
    code = 0
    for boundary in boundaries:
        if u > F(F(boundary) * sigma):
            code += 1
    return code


def assert_stored(stored: torch.Tensor, value: float, dtype: torch.dtype) -> None:
    """``stored`` is ``value`` rounded to ``dtype``, give or take the order of a float32 sum before the rounding."""
    assert rounded(value * (1 - 3e-7), dtype) <= stored.item() <= rounded(value * (1 + 3e-7), dtype)


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_turboquant_keys(head_dim: int, dtype: torch.dtype) -> None:
    page = random_page(head_dim, dtype, seed=head_dim)
    codec = CODECS["lloyd3-sign"]
    planes = codec.encode(page)
    codes, norm, residual = planes
    tile = codec.tile(planes).dense()
    sigma, half = F(head_dim**-0.5), head_dim // 2
    for t in range(page.shape[0]):
        n, unit = naive_unit(naive_rotation(page[t].float().numpy()))
        index = [naive_code(u, BOUNDARIES_3, head_dim) for u in unit]
        level = [F(F(LEVELS_3[i]) * sigma) for i in index]
        r = [F(u - c) for u, c in zip(unit, level, strict=True)]
        bit = [1 if value >= 0 else 0 for value in r]
        rho = math.sqrt(math.fsum(float(value) ** 2 for value in r) + 1e-8) / math.sqrt(head_dim)
        nibble = [i | (b << 3) for i, b in zip(index, bit, strict=True)]
        assert codes[t].tolist() == [nibble[j] | (nibble[j + half] << 4) for j in range(half)]
        assert_stored(norm[t], float(n), dtype)
        assert_stored(residual[t], rho, dtype)
        stored_n, stored_rho = norm[t].item(), residual[t].item()
        y_hat = [stored_n * (float(c) + stored_rho * (2 * b - 1)) for c, b in zip(level, bit, strict=True)]
        np.testing.assert_allclose(tile[t].numpy(), y_hat, rtol=0, atol=1e-6 * stored_n)


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_turboquant_values(head_dim: int, dtype: torch.dtype) -> None:
    page = random_page(head_dim, dtype, seed=head_dim + 1)
    codec = CODECS["lloyd2-plain"]
    planes = codec.encode(page)
    codes, norm = planes
    tile = codec.tile(planes).dense()
    sigma, quarter = F(head_dim**-0.5), head_dim // 4
    for t in range(page.shape[0]):
        n, unit = naive_unit(naive_rotation(page[t].float().numpy()))
        index = [naive_code(u, BOUNDARIES_2, head_dim) for u in unit]
        packed = [sum(index[j + i * quarter] << (2 * i) for i in range(4)) for j in range(quarter)]
        assert codes[t].tolist() == packed
        assert_stored(norm[t], float(n), dtype)
        y_hat = [norm[t].item() * float(F(F(LEVELS_2[i]) * sigma)) for i in index]
        np.testing.assert_allclose(tile[t].numpy(), y_hat, rtol=0, atol=1e-6 * norm[t].item())
