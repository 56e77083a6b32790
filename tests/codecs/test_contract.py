"""Every row of CODECS against the contract in codecs/base.py.  A new codec is tested without an edit here."""

import itertools

import pytest
import torch
from calibrated import range_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvquant_hf.triton_kernels.codecs import CODECS, Codec

HEAD_DIMS = (64, 80, 96, 128, 256)
PAGE_SIZES = (16, 64)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = torch.finfo(torch.float32).eps

codecs = pytest.mark.parametrize("codec", list(CODECS.values()), ids=list(CODECS))
shapes = pytest.mark.parametrize(("head_dim", "page_size"), list(itertools.product(HEAD_DIMS, PAGE_SIZES)))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])


def gaussian(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Pages with a bias per channel and tokens of different lengths, as keys have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * torch.rand(*shape[:-1], 1, generator=generator) * 4
    return (x + 3 * torch.randn(shape[-1], generator=generator)).to(dtype)


def hard_pages(page_size: int, head_dim: int) -> dict[str, torch.Tensor]:
    """Pages that break naive formulae, float32; all fit fp16."""
    x = gaussian(page_size, head_dim, dtype=torch.float32, seed=1)
    outlier = x.clone()
    outlier[page_size // 2, 3] = 1e3
    zero_token = x.clone()
    zero_token[1] = 0
    alternating = torch.ones_like(x)
    alternating[:, ::2] = -1
    return {
        "zero": torch.zeros_like(x),
        "negative zero": -torch.zeros_like(x),
        "zero token": zero_token,
        "one": torch.ones_like(x),
        "constant": torch.full_like(x, -0.7343),
        "constant per token": torch.linspace(-9, 9, page_size).unsqueeze(-1).expand_as(x),
        "constant per channel": torch.linspace(-300, 300, head_dim).expand_as(x),
        "nearly constant": 1 + x * 1e-3,
        "nearly constant, large": 3e4 + x * 8,
        "outlier": outlier,
        "outlier channel": x + 1e3 * (torch.arange(head_dim) == 5),
        "tiny": x * 1e-6,
        "smallest fp16": x.sign() * 2.0**-24,
        "large": x.clamp(-1, 1) * 3e4,
        "large constant": torch.full_like(x, 3e4),
        "large negative constant": torch.full_like(x, -6e4),
        "ends of fp16": alternating * 65504,
    }


def check_page(codec: Codec, x: torch.Tensor) -> None:
    """Stored planes and reconstruction are finite, and every token's error is within the codec's bound."""
    codec = range_of(codec, x)
    planes = codec.encode(x)
    assert all(plane.isfinite().all() for plane in planes if plane.is_floating_point())
    x_hat = codec.decode(planes)
    assert x_hat.isfinite().all()
    error = (x_hat.double() - x.double()).norm(dim=-1)
    bound = codec.error_bound(x)
    assert bound.shape == x.shape[:-1] and bound.dtype == torch.float32 and bound.isfinite().all()
    excess = error - bound.double()
    worst = int(excess.argmax())
    assert excess.max() <= 0, f"token {worst}: error {error.flatten()[worst]} > bound {bound.flatten()[worst]}"


@codecs
def test_names_and_sources(codec: Codec) -> None:
    assert CODECS[codec.name] is codec
    assert codec.summary and codec.source and 1 <= codec.bits <= 16


@codecs
@shapes
@dtypes
def test_planes_are_what_encode_stores(codec: Codec, head_dim: int, page_size: int, dtype: torch.dtype) -> None:
    x = gaussian(2, 3, page_size, head_dim, dtype=dtype)
    declared, stored = codec.planes(head_dim), range_of(codec, x).encode(x)
    assert len(declared) == len(stored)
    for plane, tensor in zip(declared, stored, strict=True):
        assert tensor.shape == (2, 3, *plane.shape(page_size)), plane.name
        assert tensor.dtype == (plane.dtype or dtype), plane.name
    in_pages = [tensor for plane, tensor in zip(declared, stored, strict=True) if plane.per != "layer"]
    assert codec.calibrated == (len(in_pages) < len(declared)) and declared[: len(in_pages)] == tuple(
        plane for plane in declared if plane.per != "layer"
    )
    measured = sum(tensor.nbytes for tensor in in_pages) / (2 * 3 * page_size)
    assert codec.bytes_per_token(head_dim, page_size, dtype) == measured


@codecs
@shapes
@dtypes
def test_round_trip_is_within_the_bound(codec: Codec, head_dim: int, page_size: int, dtype: torch.dtype) -> None:
    x = gaussian(2, 2, page_size, head_dim, dtype=dtype)
    check_page(codec, x)
    decoded = codec.decode(range_of(codec, x).encode(x))
    assert decoded.shape == x.shape and decoded.dtype == torch.float32


@codecs
@pytest.mark.parametrize("head_dim", [264, 512, 768, 1536])
def test_more_channels_than_a_byte_counts(codec: Codec, head_dim: int) -> None:
    """Latents have them; where a page has an order of its channels, a byte says which one."""
    x = gaussian(1, 2, 16, head_dim, dtype=torch.float32)
    x = x * (1 + torch.arange(head_dim) * 37 % head_dim)  # channels of all sizes
    check_page(codec, x)


@codecs
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@dtypes
def test_hard_pages_are_finite_and_within_the_bound(codec: Codec, head_dim: int, dtype: torch.dtype) -> None:
    for name, page in hard_pages(16, head_dim).items():
        try:
            check_page(codec, page.to(dtype))
        except AssertionError as error:
            raise AssertionError(f"page {name!r}: {error}") from error


@codecs
def test_zero_vectors_come_back_as_zeros(codec: Codec) -> None:
    x = torch.zeros(16, 64)
    # LMDeploy's sqrt(sum + 1e-8) gives a zero vector the length 1e-4; everything else is exact.
    limit = 1e-4 if codec.name in ("lloyd3-sign", "lloyd2-plain") else 0.0
    assert codec.decode(range_of(codec, x).encode(x)).norm(dim=-1).max() <= limit


@codecs
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_decode_is_the_tile_multiplied_out(codec: Codec, head_dim: int) -> None:
    x = gaussian(3, 16, head_dim, dtype=torch.float16)
    planes = range_of(codec, x).encode(x)
    assert torch.equal(codec.decode(planes), codec.from_domain(codec.tile(planes).dense()))


@codecs
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_scales_fold_into_query_and_probabilities(codec: Codec, head_dim: int) -> None:
    """Scores and outputs from the folded formulae in float32, against the dense page in float64."""
    page_size = 64
    x = gaussian(page_size, head_dim, dtype=torch.bfloat16)
    planes = range_of(codec, x).encode(x)
    tile = codec.tile(planes)
    assert all(t is None or t.dtype == torch.float32 for t in tile)
    token_scale = torch.ones(page_size) if tile.token_scale is None else tile.token_scale
    token_offset = torch.zeros(page_size) if tile.token_offset is None else tile.token_offset
    channel_scale = torch.ones(head_dim) if tile.channel_scale is None else tile.channel_scale
    channel_offset = torch.zeros(head_dim) if tile.channel_offset is None else tile.channel_offset
    parts = (tile.levels, token_scale, token_offset, channel_scale, channel_offset)

    def scores(query, levels, token_scale, token_offset, channel_scale, channel_offset):
        return token_scale * (levels @ (query * channel_scale)) + token_offset * query.sum() + query @ channel_offset

    def output(p, levels, token_scale, token_offset, channel_scale, channel_offset):
        return channel_scale * ((p * token_scale) @ levels) + (p * token_offset).sum() + p.sum() * channel_offset

    generator = torch.Generator().manual_seed(2)
    query = torch.randn(head_dim, generator=generator)
    probability = torch.rand(page_size, generator=generator)
    rotated = codec.to_domain(query)
    dense = codec.decode(planes).double()

    # Each sum of n terms rounds by at most n eps of the sum of their magnitudes; the rotations add head_dim terms.
    budget = (head_dim + 8) * EPS * scores(rotated.abs(), *(part.abs() for part in parts))
    budget = budget + 1e-6 * query.norm() * dense.norm(dim=-1).float()
    assert ((scores(rotated, *parts) - dense @ query.double()).abs() <= budget).all()

    budget = (page_size + 8) * EPS * output(probability, *(part.abs() for part in parts)).norm()
    folded = codec.from_domain(output(probability, *parts))
    assert (folded - probability.double() @ dense).norm() <= budget + 1e-6 * (probability @ dense.float().norm(dim=-1))


@codecs
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_pages_are_encoded_independently(codec: Codec, head_dim: int) -> None:
    # Multiples of 1/4 make every sum of the rotation exact, so the order in which a BLAS adds cannot matter.
    x = (gaussian(2, 3, 16, head_dim, dtype=torch.float32) * 4).round() / 4
    codec = range_of(codec, x)
    together = codec.encode(x)
    for i, j in itertools.product(range(2), range(3)):
        alone = codec.encode(x[i, j])
        assert all(torch.equal(a, b[i, j]) for a, b in zip(alone, together, strict=True))


@codecs
@dtypes
def test_strides_do_not_matter(codec: Codec, dtype: torch.dtype) -> None:
    x = gaussian(2, 16, 3, 80, dtype=dtype).transpose(1, 2)
    assert not x.is_contiguous()
    codec = range_of(codec, x)
    planes = zip(codec.encode(x), codec.encode(x.contiguous()), strict=True)
    assert all(torch.equal(a, b) for a, b in planes)


@codecs
def test_encode_leaves_its_input_alone(codec: Codec) -> None:
    x = gaussian(16, 64, dtype=torch.float32)
    before, codec = x.clone(), range_of(codec, x)
    codec.decode(codec.encode(x))
    codec.error_bound(x)
    assert torch.equal(x, before)


@dtypes
def test_exact_is_bit_identical(dtype: torch.dtype) -> None:
    x = gaussian(2, 16, 80, dtype=dtype)
    assert torch.equal(CODECS["exact"].encode(x)[0], x)
    assert torch.equal(CODECS["exact"].decode((x,)), x.float())


@dtypes
@pytest.mark.parametrize("name", ["int8-token", "int4-token"])
def test_constant_tokens_are_exact_in_the_token_formats(name: str, dtype: torch.dtype) -> None:
    constants = torch.tensor([0.0, 1.0, -1.0, 0.3, -1e3, 6e4, -6e4, 2.0**-24, -3e-5]).to(dtype)
    x = constants.unsqueeze(-1).expand(-1, 64)
    assert torch.equal(CODECS[name].decode(CODECS[name].encode(x)), x.float())


# A small page: hypothesis draws and shrinks every element on its own.
pages = hnp.arrays("float16", (4, 16), elements=st.floats(width=16, allow_nan=False, allow_infinity=False))
drawn = settings(deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])


@codecs
@settings(drawn, max_examples=100)
@given(page=pages)
def test_any_fp16_page(codec: Codec, page) -> None:
    x = torch.from_numpy(page)
    for dtype in DTYPES:
        check_page(codec, x.to(dtype))


@codecs
@settings(drawn, max_examples=50)
@given(seed=st.integers(0, 2**32), spread=st.integers(-30, 40), bias=st.integers(-30, 40))
def test_gaussian_pages_of_any_size(codec: Codec, seed: int, spread: int, bias: int) -> None:
    """bf16 and float32 models can leave the fp16 range: clipped there, but finite and within the bound."""
    x = gaussian(16, 64, dtype=torch.float32, seed=seed) * 2.0**spread + 2.0**bias
    for dtype in (torch.float32, torch.bfloat16):
        check_page(codec, x.to(dtype))
