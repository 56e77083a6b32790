"""Bit fields, fp16 numbers rounded to one side, and the Hadamard rotation."""

import itertools

import pytest
import scipy.linalg
import torch

from kvquant_hf.triton_kernels.codecs import CODECS
from kvquant_hf.triton_kernels.codecs.lloyd_max import LEVELS
from kvquant_hf.triton_kernels.codecs.packing import (
    fp16_at_least,
    fp16_at_most,
    pack_fields,
    round_saturating,
    unpack_fields,
)
from kvquant_hf.triton_kernels.codecs.three_bit import LLOYD3, expand_signed, pack_signed
from kvquant_hf.triton_kernels.hadamard import hadamard, hadamard_block

HALF_MAX = torch.finfo(torch.float16).max


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_every_byte_unpacks_and_packs_again(bits: int) -> None:
    every_byte = torch.arange(256, dtype=torch.uint8)
    codes = unpack_fields(every_byte, bits)
    assert codes.shape == (256 * 8 // bits,) and int(codes.max()) == 2**bits - 1
    assert torch.equal(pack_fields(codes, bits), every_byte)


@pytest.mark.parametrize("bits", [2, 4])
def test_every_combination_of_codes_in_a_byte(bits: int) -> None:
    fields = 8 // bits
    codes = torch.tensor(list(itertools.product(range(2**bits), repeat=fields)), dtype=torch.uint8)
    packed = pack_fields(codes, bits)
    expected = [sum(code << (i * bits) for i, code in enumerate(row)) for row in codes.tolist()]
    assert packed.flatten().tolist() == expected
    assert torch.equal(unpack_fields(packed, bits), codes)


def test_fields_are_fractions_of_the_head() -> None:
    nibbles = torch.arange(8, dtype=torch.uint8)
    assert pack_fields(nibbles, 4).tolist() == [0x40, 0x51, 0x62, 0x73]
    pairs = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0], dtype=torch.uint8)
    assert pack_fields(pairs, 2).tolist() == [0b01_11_10_00, 0b00_10_11_01]


def test_three_bits_are_a_magnitude_and_a_sign() -> None:
    """Channel by channel from the drawing in ``three_bit.py``, for every code in every place."""
    head_dim = 32
    codes = torch.randint(8, (200, head_dim), dtype=torch.uint8)
    magnitudes, signs = pack_signed(codes)
    assert magnitudes.shape == (200, head_dim // 4) and signs.shape == (200, head_dim // 8)
    assert magnitudes.dtype == signs.dtype == torch.uint8
    levels = LEVELS[3]
    for row in range(0, 200, 20):
        for j in range(head_dim // 4):
            for f in range(4):
                magnitude = int(magnitudes[row, j]) >> (2 * f) & 3
                minus = int(signs[row, j // 2]) >> (4 * (j % 2) + f) & 1
                level = -levels[4 + magnitude] if minus else levels[4 + magnitude]
                assert level == levels[int(codes[row, j + f * head_dim // 4])]
    assert torch.equal(expand_signed(magnitudes, signs), torch.tensor(levels)[codes.int()])


def test_three_bits_reach_both_ends_of_a_channel() -> None:
    """The largest and the smallest key of a channel are stored to within the rounding of fp16."""
    x = torch.randn(64, 64) + 30 * torch.randn(64)
    x_hat = CODECS["lloyd3-channel"].decode(CODECS["lloyd3-channel"].encode(x))
    spread = x.amax(0) - x.amin(0)
    for end in (x.argmax(0), x.argmin(0)):
        there = (end, torch.arange(64))
        assert ((x_hat[there] - x[there]).abs() <= 2e-3 * spread + x[there].abs() * 2**-10).all()


def test_three_bits_have_the_known_distortion() -> None:
    """Rotated Gaussian vectors: the mean squared error of the table, at the unbiased scale a little more."""
    x = torch.randn(64, 64, 128)
    error = float((LLOYD3.decode(LLOYD3.encode(x)) - x).square().mean())
    assert 0.0345 < error < 0.0345 / (1 - 0.0345) * 1.03


def finite_halves() -> torch.Tensor:
    """All finite fp16 numbers in ascending order, zero once."""
    positive = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)
    return torch.cat([-positive.flip(0), torch.zeros(1, dtype=torch.float16), positive])


def test_fp16_numbers_stay() -> None:
    halves = finite_halves()
    assert torch.equal(fp16_at_most(halves.float()), halves)
    assert torch.equal(fp16_at_least(halves.float()), halves)
    assert torch.equal(round_saturating(halves.float(), torch.float16), halves)


@pytest.mark.parametrize("place", ["just above", "midpoint", "just below the next"])
def test_between_fp16_numbers_the_safe_side_is_taken(place: str) -> None:
    halves = finite_halves()
    low, high = halves[:-1], halves[1:]
    x = {
        "just above": torch.nextafter(low.float(), high.float()),
        "midpoint": (low.float() + high.float()) / 2,
        "just below the next": torch.nextafter(high.float(), low.float()),
    }[place]
    assert ((low.float() < x) & (x < high.float())).all()
    assert torch.equal(fp16_at_most(x), low)
    assert torch.equal(fp16_at_least(x), high)


def test_outside_the_range_the_ends_are_taken() -> None:
    x = torch.tensor([-3e38, -1e5, -65505.0, 65505.0, 65520.0, 3e38])
    ends = [-HALF_MAX] * 3 + [HALF_MAX] * 3
    for function in (fp16_at_most, fp16_at_least, lambda t: round_saturating(t, torch.float16)):
        assert function(x).tolist() == ends
    assert round_saturating(torch.tensor([3.4e38, -3.4e38]), torch.bfloat16).isfinite().all()


@pytest.mark.parametrize("head_dim", [1, 2, 64, 80, 96, 128, 192, 256])
def test_hadamard_is_blocks_of_sylvesters_matrix(head_dim: int) -> None:
    order = hadamard_block(head_dim)
    assert head_dim % order == 0 and (head_dim // order) % 2 == 1 and order & (order - 1) == 0
    block = scipy.linalg.hadamard(order) / order**0.5
    expected = torch.from_numpy(scipy.linalg.block_diag(*[block] * (head_dim // order)))
    matrix = hadamard(torch.eye(head_dim, dtype=torch.float64))
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hadamard_twice_is_the_identity(head_dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = hadamard(x)
    assert y.shape == x.shape and y.dtype == dtype
    # Two roundings of numbers below 6 in the target dtype, and one before the factor.
    torch.testing.assert_close(hadamard(y), x, rtol=0, atol=8 * 6 * torch.finfo(dtype).eps)


def test_hadamard_survives_low_matmul_precision() -> None:
    """fp16 input times +-1 is exact in TF32 and bf16 x 3 alike, so a user's precision setting costs no accuracy."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    exact = hadamard(x.double())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        error = (hadamard(x) - exact).norm(dim=-1)
    finally:
        torch.set_float32_matmul_precision(before)
    assert (error <= 1e-6 * x.norm(dim=-1)).all()
