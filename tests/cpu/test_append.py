"""Storing by the CPU kernels: the bytes of the codecs in torch, and of the reference append."""

import itertools
from typing import Any

import pytest
import torch
from calibrated import with_range
from stores import CPU_POLICIES, fill, make_store, raw, same_bytes, vectors

from kvquant_hf.pages.store import PagedStore
from kvquant_hf.triton_kernels.append_reference import encode_pages
from kvquant_hf.triton_kernels.codecs import CODECS, lloyd_max, octet
from kvquant_hf.triton_kernels.cpu import append

PAGE = 64
DECLARED = {name: cpu for name, codec in CODECS.items() if (cpu := codec.cpu(64)) is not None}
ENCODED = [name for name, cpu in DECLARED.items() if cpu.affine or cpu.given or cpu.floats or cpu.covered]
SHARED = [name for name, cpu in DECLARED.items() if name not in ENCODED and (cpu.bucketed or CODECS[name].rotated)]


def hard(name: str, dtype: torch.dtype, dim: int) -> torch.Tensor:
    """Pages ``[1, 3, 2, PAGE, dim]`` of the kind ``name``."""
    x = vectors(1, 3, 2 * PAGE, dim, dtype=torch.float32).reshape(1, 3, 2, PAGE, dim)
    generator = torch.Generator().manual_seed(1)
    if name == "constant":
        x = torch.full_like(x, 3.14159)
        x[:, 1] = 0
        x[:, 2] = torch.randn(1, 2, 1, dim, generator=generator)
    elif name == "ties":
        x = torch.randint(-20, 21, x.shape, generator=generator) / 8  # steps that divide: codes on the half
    elif name == "huge":
        x = x * 1e5
        x[:, 1] = -1e6 - x[:, 1].abs()
    elif name == "tiny":
        x = x * 1e-7
        x[:, 1] *= 1e-35
    elif name == "wide":
        x = x * torch.exp(8 * torch.randn(x.shape, generator=generator))
    return x.to(dtype)


def encoded(codec_name: str, x: torch.Tensor, encode: Any) -> list[torch.Tensor]:
    """Planes of six pages of which ``encode`` wrote three."""
    heads, dim = x.shape[2], x.shape[4]
    codec = with_range(CODECS[codec_name], heads, dim)
    planes = []
    for plane in codec.planes(dim):
        if plane.per != "layer":
            planes.append(torch.zeros(6, heads, *plane.shape(x.shape[3]), dtype=plane.dtype or x.dtype))
    planes += [parameter.expand(6, heads, dim) for parameter in codec.parameters]
    encode(codec, planes, x, torch.tensor([[4, 0, 3]]))
    return planes


def test_codecs_that_are_encoded_here() -> None:
    ranked, floats = {"int4-ranked", "int3-ranked", "int2-ranked"}, {"fp8", "nvfp4"}
    affine = {"int8-channel", "int8-affine", "int4-channel", "int4-hadamard", "int8-static"}
    assert set(ENCODED) == affine | floats | ranked
    assert set(SHARED) == {
        *("lloyd4-centred", "lloyd3-channel", "lloyd3", "lloyd2", "octet3", "octet2"),
        *("lloyd3-sign", "lloyd2-plain"),
    }


# fp16 cannot hold the numbers of "huge" and "wide".
KINDS = [
    *((name, torch.float16) for name in ("plain", "constant", "ties", "tiny")),
    *itertools.product(("plain", "constant", "ties", "huge", "tiny", "wide"), (torch.float32, torch.bfloat16)),
]


@pytest.mark.parametrize("codec", ENCODED)
@pytest.mark.parametrize(("name", "dtype"), KINDS, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype in KINDS])
def test_encoded_bytes(codec: str, name: str, dtype: torch.dtype) -> None:
    """Equal to the last bit, rotated or not: a rotation in float64 rounds to the same float32.

    But for the sign of a zero offset, where a page holds both zeros: which is the minimum depends on the order in which
    a machine compares.  Only the numbers of "tiny" underflow to such pages.
    """
    for dim in (64, 80, 128):
        x = hard(name, dtype, dim)
        assert x.isfinite().all()
        expected = encoded(codec, x, encode_pages)
        result = encoded(codec, x, append._encode)
        for plane, wanted in zip(result, expected, strict=True):
            assert torch.equal(plane, wanted) if name == "tiny" else torch.equal(raw(plane), raw(wanted))


@pytest.mark.parametrize("codec", ENCODED)
def test_strided_pages_and_odd_sizes(codec: str) -> None:
    for heads, page, dim in ((1, 8, 8), (5, 24, 40), (1, 16, 512), (1, 8, 768)):
        tokens = vectors(1, heads, 3 * page, dim).transpose(1, 2).contiguous().transpose(1, 2)
        x = tokens.unflatten(2, (3, page)).transpose(1, 2)
        assert not x.is_contiguous() or heads == 1
        for plane, wanted in zip(encoded(codec, x, append._encode), encoded(codec, x, encode_pages), strict=True):
            assert torch.equal(raw(plane), raw(wanted))


def store_of(policy: str, impl: str, keys: torch.Tensor, values: torch.Tensor) -> PagedStore:
    store = make_store(policy, keys, values)
    store.impl = impl
    return store


@pytest.mark.parametrize("policy", CPU_POLICIES)
@pytest.mark.parametrize("chunk", [1, 37, 1000])
def test_stores_hold_the_same_bytes(policy: str, chunk: int) -> None:
    """Token by token, in pieces and at once; keys and values of different sizes, as a model's transposed tensors."""
    keys, values = (vectors(2, 300 if chunk > 1 else 70, 3, dim, seed=dim).transpose(1, 2) for dim in (64, 32))
    stores = [fill(store_of(policy, impl, keys, values), keys, values, chunk) for impl in ("cpu", "reference")]
    assert same_bytes(*stores) and stores[0].lengths.tolist() == stores[1].lengths.tolist()


def test_a_token_goes_into_the_open_page_in_place() -> None:
    """No new open page and no copy while there is room; a fork's open page is left alone."""
    keys = vectors(1, 2, 40, 64)
    store = fill(store_of("int8", "cpu", keys, keys), keys, keys)
    pointers = [side.tail.data_ptr() for side in store.view()[:2]]
    store.append(keys[:, :, :1], keys[:, :, 1:2])
    assert [side.tail.data_ptr() for side in store.view()[:2]] == pointers
    assert torch.equal(store.view().values.tail[:, :, 40], keys[:, :, 1])
    twin = store.fork()
    twin.append(keys[:, :, :3], keys[:, :, :3])
    store.append(keys[:, :, 5:7], keys[:, :, 5:7])
    assert twin.lengths.tolist() == [[0, 44]] and store.lengths.tolist() == [[0, 43]]
    assert torch.equal(store.view().keys.tail[:, :, 41:43], keys[:, :, 5:7])
    assert torch.equal(twin.view().keys.tail[:, :, 41:44], keys[:, :, :3])


@pytest.mark.parametrize("codec", SHARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_bytes_of_codecs_that_torch_sums(codec: str, dtype: torch.dtype, dim: int) -> None:
    """Rotation and choice of codes by the kernels, sums by torch: the same bytes."""
    for name in ("plain", "constant", "huge"):
        x = hard(name, dtype, dim)
        for plane, wanted in zip(encoded(codec, x, append._encode), encoded(codec, x, encode_pages), strict=True):
            assert torch.equal(raw(plane), raw(wanted))


@pytest.mark.parametrize("rows", [0, 1, 5, 700])
@pytest.mark.parametrize("dim", [8, 40, 96])
def test_search(rows: int, dim: int) -> None:
    """Every vector's worth of blocks and what is left over, ties among them: multiples of a half."""
    u = torch.randn(rows, dim)
    u[1::2] = (2 * u[1::2]).round() / 2
    for levels in octet.LEVELS.values():
        assert torch.equal(append._search(u, levels), octet.search(u, levels))


@pytest.mark.parametrize("count", [1, 15, 16, 4096, 10001])
def test_bucket(count: int) -> None:
    """Numbers on a boundary belong below it, as in torch; so do their neighbours where they should."""
    boundaries = lloyd_max.BOUNDARIES[4]
    edges = torch.tensor(boundaries)
    near = torch.cat([edges, edges.nextafter(edges + 1), edges.nextafter(edges - 1)])
    u = torch.cat([near, torch.randn(10001)])[:count]
    assert torch.equal(append._bucket(u, boundaries), lloyd_max.bucket(u, boundaries))
