"""The append kernel against ``append_reference``: every byte of pages, open pages and lengths, touched or not.

Codecs without rotation equal torch bit for bit.  With rotation torch and the kernel sum in another order, so a number
on the edge between two codes may get either: at most one step, in at most 0.1 % of the codes.  The oracle runs on the
CPU.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibrated import with_range

from kvquant_hf.pages.parameters import in_pages, on_every_page
from kvquant_hf.triton_kernels.append import append
from kvquant_hf.triton_kernels.append_reference import append_reference
from kvquant_hf.triton_kernels.codecs import CODECS, Codec
from kvquant_hf.triton_kernels.codecs import packing as torch_packing
from kvquant_hf.triton_kernels.codecs.octet import OctetCodec
from kvquant_hf.triton_kernels.codecs.turboquant import LloydMaxCodec
from kvquant_hf.triton_kernels.pages import PagedSide
from kvquant_hf.triton_kernels.target import tl, triton
from kvquant_hf.triton_kernels.tile_math import fp16_at_least, fp16_at_most, round_half_even, round_saturating, round_to

PAGE = 64
PAIRS = (
    ("exact", "exact"),
    ("int8-channel", "int8-affine"),
    ("int4-channel", "int4-hadamard"),
    ("lloyd4-centred", "lloyd2"),
    ("lloyd3-channel", "lloyd3"),
    ("octet3", "octet2"),
    ("int4-ranked", "int4-hadamard"),
    ("int3-ranked", "lloyd3"),
    ("int2-ranked", "lloyd2"),
    ("int8-token", "int8-token"),
    ("int4-token", "int4-token"),
    ("lloyd3-sign", "lloyd2-plain"),
    ("fp8", "fp8"),
    ("nvfp4", "nvfp4"),
    ("int8-static", "int8-static"),
)
# (new tokens, tokens held by the sequences of a batch)
CALLS = (
    (0, (0, 5)),
    (1, (0, 1)),
    (1, (PAGE - 1, PAGE)),
    (3, (PAGE - 3, PAGE - 2, PAGE)),
    (PAGE - 1, (1, 2)),
    (PAGE, (0, PAGE)),
    (PAGE + 1, (0, PAGE - 1)),
    (2 * PAGE + 5, (0, 17, PAGE)),
)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Every head_dim on both sides, and every dtype with a head_dim that needs padding.
SHAPES = (
    *(((80, 96), dtype) for dtype in (torch.float32, torch.bfloat16)),
    ((128, 64), torch.float16),
    ((64, 128), torch.bfloat16),
    ((80, 96), torch.float16),
    ((256, 256), torch.float32),
    ((96, 80), torch.float16),
)

# In the full run; `test_hard_pages` has their codecs always.
RARER = (
    ("lloyd3-channel", "lloyd3"),
    ("octet3", "octet2"),
    ("int4-ranked", "int4-hadamard"),
    ("int3-ranked", "lloyd3"),
    ("int2-ranked", "lloyd2"),
)
MAIN = ("int4-channel", "int4-hadamard")  # rotation, and ranges of pages and of tokens


def marks(pair: tuple[str, str], repeats: bool = False) -> list[pytest.MarkDecorator]:
    """``repeats``: a case that other pairs have, of what no codec's arithmetic takes part in."""
    return [pytest.mark.full] * (pair in RARER or (repeats and pair != MAIN))


def crossed(cases: dict[str, Any], always: int) -> pytest.MarkDecorator:
    """Every pair with every case; in the usual run ``MAIN`` has them all, other pairs the last ``always`` of them."""
    return pytest.mark.parametrize(
        ("pair", "case"),
        [
            pytest.param(pair, case, id=f"{name}-{'/'.join(pair)}", marks=marks(pair, i < len(cases) - always))
            for i, (name, case) in enumerate(cases.items())
            for pair in PAIRS
        ],
    )


pairs = pytest.mark.parametrize("pair", [pytest.param(pair, id="/".join(pair), marks=marks(pair)) for pair in PAIRS])


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan") if dtype.is_floating_point else 0xAB, dtype=dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    """``x`` as integers, so that NaN equals NaN and the sign of zero counts."""
    return x if x.dtype == torch.uint8 else x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def gaussian(batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Vectors with a bias per channel and different lengths, as keys have them."""
    return (torch.randn(batch, heads, tokens, dim) * torch.rand(batch, heads, tokens, 1) * 4 + torch.randn(dim)).to(
        dtype
    )


@dataclasses.dataclass
class Cache:
    """Everything that ``append`` reads or writes, poisoned where nothing is stored."""

    codecs: tuple[Codec, Codec]
    planes: tuple[list[torch.Tensor], list[torch.Tensor]]
    tails: tuple[torch.Tensor, torch.Tensor]
    table: torch.Tensor
    lengths: torch.Tensor
    new_lengths: torch.Tensor

    def to(self, device: torch.device) -> "Cache":
        """A copy on ``device``."""
        keys, values = ([x.clone().to(device) for x in side] for side in self.planes)
        tensors = (x.clone().to(device) for x in (*self.tails, self.table, self.lengths, self.new_lengths))
        key_tail, value_tail, *rest = tensors
        return Cache(self.codecs, (keys, values), (key_tail, value_tail), *rest)

    def arguments(self) -> tuple[object, ...]:
        """What follows ``keys, values`` in a call of ``append``."""
        return (*self.codecs, *self.planes, *self.tails, self.table, self.lengths, self.new_lengths)

    def next(self) -> "Cache":
        """The same cache after a call."""
        return dataclasses.replace(self, lengths=self.new_lengths, new_lengths=torch.full_like(self.lengths, -9))


def cache(
    codecs: tuple[Codec, Codec],
    held: tuple[int, ...],
    dims: tuple[int, int] = (64, 64),
    dtype: torch.dtype = torch.float16,
    heads: int = 2,
    page: int = PAGE,
    pages: int = 4,
) -> Cache:
    """Sequence i has i sealed pages (poison) and ``held[i]`` tokens in its open page."""
    batch, total = len(held), len(held) * pages + 2
    planes, tails = [], []
    for codec, dim in zip(codecs, dims, strict=True):
        planes.append([poisoned((total, heads, *p.shape(page)), p.dtype or dtype) for p in in_pages(codec, dim)])
        planes[-1] += on_every_page(with_range(codec, heads, dim), total)
        tail = poisoned((batch, heads, page, dim), dtype)
        for b, count in enumerate(held):
            tail[b, :, :count] = gaussian(1, heads, count, dim, dtype)[0]
        tails.append(tail)
    table = torch.randperm(total)[: batch * pages].view(batch, pages).int()
    lengths = torch.tensor([[b, count] for b, count in enumerate(held)], dtype=torch.int32)
    return Cache(codecs, (planes[0], planes[1]), (tails[0], tails[1]), table, lengths, torch.full_like(lengths, -9))


def check_codes(codec: Codec, plane: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """One step in at most 0.1 % of the codes; signs in a ``plane`` of their own are codes of one bit.

    Codes in blocks change together, to others that are as near: at most 0.1 % of the blocks.
    """
    if isinstance(codec, OctetCodec):
        other = got != want
        other = other.unflatten(-1, (-1, 2)).any(-1) if plane == "codes" else other
        assert other.sum() <= max(1, 1e-3 * other.numel())
        return
    width = 1 if plane == "signs" else 8 // codec.kernel.fields
    got, want = (torch_packing.unpack_fields(x, width).int() for x in (got, want))
    if codec.name == "lloyd3-sign":  # the fourth bit is the sign of what the code leaves
        signs = (got >> 3) != (want >> 3)
        assert signs.sum() <= max(1, 1e-3 * signs.numel())
        got, want = got & 7, want & 7
    steps = (got - want).abs()
    assert steps.max() <= 1
    assert (steps > 0).sum() <= max(1, 1e-3 * steps.numel())


def check(got: Cache, want: Cache, magnitude: float = 40.0) -> None:
    """``got``, from the kernel, is ``want``; rotated vectors are up to ``magnitude`` long."""
    got = got.to(torch.device("cpu"))
    assert torch.equal(got.new_lengths, want.new_lengths)
    assert torch.equal(got.lengths, want.lengths)
    for side, codec in enumerate(want.codecs):
        assert torch.equal(bits(got.tails[side]), bits(want.tails[side])), f"open page of {codec.name}"
        spans = zip(want.table, want.lengths[:, 0].tolist(), want.new_lengths[:, 0].tolist(), strict=True)
        written = torch.cat([row[first:last] for row, first, last in spans]).long()
        for plane, g, w in zip(
            codec.planes(got.tails[side].shape[-1]), *(c.planes[side] for c in (got, want)), strict=True
        ):
            if codec.rotated and len(written):
                a, b = g[written], w[written]
                if plane.dtype == torch.uint8:
                    check_codes(codec, plane.name, a, b)
                else:
                    spacing = 4 * torch.finfo(b.dtype).eps * b.double().abs() + 1e-6 * magnitude
                    assert ((a.double() - b.double()).abs() <= spacing).all(), f"{plane.name} of {codec.name}"
                g[written] = b
            assert torch.equal(bits(g), bits(w)), f"{plane.name} of {codec.name}"


def with_strides(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``x`` on ``device`` with the strides it has, which ``Tensor.to`` does not promise."""
    count = x.untyped_storage().nbytes() // x.element_size()
    return x.as_strided((count,), (1,), 0).to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def compare(
    state: Cache,
    keys: torch.Tensor,
    values: torch.Tensor,
    device: torch.device,
    magnitude: float = 40.0,
    launch: Callable[..., None] = append,
) -> Cache:
    """Append to copies of ``state`` by both, compare, and return the kernel's."""
    got, want = state.to(device), state.to(torch.device("cpu"))
    new = [with_strides(x, device) for x in (keys, values)]
    launch(*new, *got.arguments())
    sides = (
        PagedSide(codec, planes, tail, tail.shape[2])
        for codec, planes, tail in zip(want.codecs, want.planes, want.tails, strict=True)
    )
    append_reference(keys, values, *sides, want.table, want.lengths, want.new_lengths)
    check(got, want, magnitude)
    return got


def named(pair: tuple[str, str]) -> tuple[Codec, Codec]:
    return CODECS[pair[0]], CODECS[pair[1]]


@crossed({f"T{t}-H{'.'.join(map(str, h))}": (t, h) for t, h in CALLS}, always=2)
def test_lengths(pair: tuple[str, str], case: tuple[int, tuple[int, ...]], device: torch.device) -> None:
    tokens, held = case
    state = cache(named(pair), held, pages=len(held) + 3)
    keys, values = (gaussian(len(held), 2, tokens, 64, torch.float16) for _ in range(2))
    compare(state, keys, values, device)


@crossed({f"D{d[0]}.{d[1]}-{str(t)[6:]}": (d, t) for d, t in SHAPES}, always=3)
def test_head_dims(pair: tuple[str, str], case: tuple[tuple[int, int], torch.dtype], device: torch.device) -> None:
    dims, dtype = case
    state = cache(named(pair), (3, PAGE - 1), dims, dtype, heads=1)
    compare(state, *(gaussian(2, 1, PAGE - 1, dim, dtype) for dim in dims), device)


@pairs
@pytest.mark.parametrize("page", [16, 128])
def test_page_sizes(pair: tuple[str, str], page: int, device: torch.device) -> None:
    state = cache(named(pair), (0, page), page=page)
    compare(state, *(gaussian(2, 2, page + 3, 64, torch.float16) for _ in range(2)), device)


def test_more_channels_than_a_byte_counts(device: torch.device) -> None:
    """The order of ranked channels is that of two blocks; a short page, as kernels take it."""
    state = cache(named(("int4-ranked", "int8-affine")), (16,), (512, 64), page=16, heads=1)
    compare(state, *(gaussian(1, 1, 17, dim, torch.float16) for dim in (512, 64)), device)


def test_tokens_are_all_there(device: torch.device) -> None:
    """Without the oracle: pages by the table, then the open page, are the tokens in order."""
    state = cache(named(("exact", "exact")), (9, PAGE), (64, 80), torch.float32)
    state.lengths[:, 0] = 0
    new = [gaussian(2, 2, 2 * PAGE + 5, dim, torch.float32) for dim in (64, 80)]
    got = state.to(device)
    append(*(x.to(device) for x in new), *got.arguments())
    got = got.to(torch.device("cpu"))
    for b, (sealed, rest) in enumerate(got.new_lengths.tolist()):
        for side in range(2):
            pages = got.planes[side][0][got.table[b, :sealed].long()].transpose(0, 1).flatten(1, 2)
            tokens = torch.cat([state.tails[side][b, :, : state.lengths[b, 1]], new[side][b]], 1)
            assert torch.equal(torch.cat([pages, got.tails[side][b, :, :rest]], 1), tokens)
    assert got.new_lengths.tolist() == [[2, 14], [3, 5]]


def hard_pages(dim: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Pages that break naive formulae.  All but the last have few digits, so that a rotation of them is exact."""
    x = (torch.randn(PAGE, dim) * 64).round() / 64
    sign = torch.where(torch.arange(dim) % 2 == 0, 1.0, -1.0)
    few = {
        "zero": torch.zeros_like(x),
        "negative zero": -torch.zeros_like(x),
        "zero token": torch.where(torch.arange(PAGE)[:, None] == 1, 0.0, x),
        "constant": torch.full_like(x, -0.734375),
        "constant per token": torch.linspace(-9, 9, PAGE).half().float()[:, None].expand_as(x),
        "constant per channel": torch.linspace(-300, 300, dim).half().float().expand_as(x),
        "nearly constant": 1 + x * 2.0**-8,
        "outlier": torch.where(torch.arange(dim) == 5, 1e3, x),
        "tiny": x * 2.0**-18,
        "smallest fp16": x.sign() * 2.0**-24,
        "large": x.sign() * 3e4,
        "large constant": torch.full_like(x, 3e4),
        "large negative constant": torch.full_like(x, -6e4),
        "ends of fp16": sign.expand_as(x) * 65504,
    }
    if dtype != torch.float16:
        few |= {
            "beyond fp16": sign.expand_as(x) * 2.0**18,
            "below fp16": torch.full_like(x, -(2.0**17)),
            "above fp16": 2.0**20 + x * 2.0**16,
            "vanishing": x * 2.0**-80,
            "halves of a step": torch.arange(PAGE)[:, None] + torch.arange(dim) / 2,
        }
    return few


# In float32 for every codec, where there are more hard pages; in the others for one of each way of rounding.
ALL_DTYPES = ("exact", "int8-affine", "int4-token", "lloyd4-centred")
RANKED_LIKE_INT3 = ("int4-ranked", "int2-ranked")


@pytest.mark.parametrize(
    ("codec", "dtype"),
    [
        pytest.param(
            codec,
            dtype,
            id=f"{name}-{kind}",
            marks=[pytest.mark.full] * (name in RANKED_LIKE_INT3 or (kind != "fp32" and name not in ALL_DTYPES)),
        )
        for name, codec in CODECS.items()
        for kind, dtype in DTYPES.items()
    ],
)
def test_hard_pages(codec: Codec, dtype: torch.dtype, device: torch.device) -> None:
    pages = torch.stack(list(hard_pages(80, dtype).values()))[None].to(dtype)  # one head per page
    new = torch.cat([pages, pages[:, :, :1]], dim=2)
    state = cache((codec, CODECS["exact"]), (0,), (80, 80), dtype, heads=pages.shape[1])
    compare(state, new, new, device, magnitude=float(pages.float().abs().max()))


@pytest.mark.parametrize(
    ("centred", "rule"), list(itertools.product([True, False], ["norm", "least-squares", "unbiased"]))
)
def test_scale_rules(centred: bool, rule: str, device: torch.device) -> None:
    codecs = [
        LloydMaxCodec(f"lloyd{b}", b, "", "", rotated=True, head_dim_multiple=8 // b, centred=centred, scale_rule=rule)
        for b in (4, 2)
    ]
    state = cache((codecs[0], codecs[1]), (PAGE, 3), (80, 96))
    compare(state, *(gaussian(2, 2, PAGE, dim, torch.float16) for dim in (80, 96)), device)


@pairs
def test_strides(pair: tuple[str, str], device: torch.device) -> None:
    """Transposed, every other element, broadcast over the batch, and open pages inside larger tensors."""
    state = cache(named(pair), (2, PAGE - 4))
    tokens = PAGE + 2
    transposed = gaussian(2, tokens, 2, 64, torch.float16).transpose(1, 2)
    sliced = gaussian(2, 4, 2 * tokens, 128, torch.float16)[:, 1:3, ::2, 1::2]
    expanded = gaussian(1, 2, tokens, 64, torch.float16).expand(2, -1, -1, -1)
    channels_first = gaussian(2, 2, 64, tokens, torch.float16).transpose(2, 3)
    for keys, values in ((transposed, sliced), (expanded, channels_first)):
        compare(state, keys, values, device)
    around = torch.full((2, 3, PAGE + 1, 70), float("nan"), dtype=torch.float16, device=device)
    inside, plain = state.to(device), state.to(device)
    around[:, :2, :PAGE, :64] = inside.tails[0]
    inside.tails = (around[:, :2, :PAGE, :64], inside.tails[1])
    for into in (inside, plain):
        append(transposed.to(device), sliced.to(device), *into.arguments())
    assert torch.equal(bits(inside.tails[0].contiguous()), bits(plain.tails[0]))
    assert around[:, 2].isnan().all() and around[:, :, PAGE].isnan().all() and around[..., 64:].isnan().all()


@pairs
def test_chunked_is_bulk(pair: tuple[str, str], device: torch.device) -> None:
    tokens = 2 * PAGE + 5
    state = cache(named(pair), (0, 50), heads=1)
    new = [gaussian(2, 1, tokens, 64, torch.float16).to(device) for _ in range(2)]
    bulk, chunked = state.to(device), state.to(device)
    append(*new, *bulk.arguments())
    for part in zip(*(x.split([1, 3, PAGE - 1, PAGE, 2], dim=2) for x in new), strict=True):
        append(*part, *chunked.arguments())
        chunked = chunked.next()
    assert torch.equal(bulk.new_lengths, chunked.lengths)
    for one, other in zip(itertools.chain(*bulk.planes), itertools.chain(*chunked.planes), strict=True):
        assert torch.equal(bits(one), bits(other))
    for one, other in zip(bulk.tails, chunked.tails, strict=True):
        for b, rest in enumerate(chunked.lengths[:, 1].tolist()):
            assert torch.equal(one[b, :, :rest], other[b, :, :rest])


@triton.jit
def _rounding_kernel(x_ptr, most_ptr, least_ptr, even_ptr, half_ptr, bfloat_ptr, saturated_ptr, COUNT: tl.constexpr):
    offs = tl.arange(0, COUNT)
    x = tl.load(x_ptr + offs)  # [COUNT]
    tl.store(most_ptr + offs, fp16_at_most(x))
    tl.store(least_ptr + offs, fp16_at_least(x))
    tl.store(even_ptr + offs, round_half_even(tl.minimum(tl.maximum(x, -1e6), 1e6)))
    tl.store(half_ptr + offs, round_to(x, tl.float16))
    tl.store(bfloat_ptr + offs, round_to(x, tl.bfloat16))
    tl.store(saturated_ptr + offs, round_saturating(x, tl.bfloat16))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # NumPy, of the interpreter
def test_rounding(device: torch.device) -> None:
    """fp16 numbers, the middles between them, and the float32 numbers next to both."""
    half = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    half = half[half.isfinite()].float().sort().values[:: 37 if device.type == "cpu" else 5]
    middle = (half[1:] + half[:-1]) / 2
    units = torch.arange(-300, 300) / 2
    ends = torch.tensor([0.0, 2.0**-24, 2.0**-25, 2.0**-26, 65504.0, 65519.9, 65520.0, 1e5, 3.389e38, 3.4e38])
    x = torch.cat([half, middle, units, ends, -ends])
    infinity = torch.full_like(x, float("inf"))
    x = torch.cat([x, x.nextafter(infinity), x.nextafter(-infinity)])
    x = x[x.isfinite() & ((x == 0) | (x.abs() > 1e-37))]
    count = triton.next_power_of_2(len(x))
    x = torch.cat([x, torch.ones(count - len(x))])
    kinds = (torch.float16, torch.float16, torch.float32, torch.float16, torch.bfloat16, torch.bfloat16)
    out = [torch.empty(count, dtype=kind, device=device) for kind in kinds]
    _rounding_kernel[(1,)](x.to(device), *out, COUNT=count)
    want = (
        torch_packing.fp16_at_most(x),
        torch_packing.fp16_at_least(x),
        x.clamp(-1e6, 1e6).round(),
        x.half(),
        x.bfloat16(),
        torch_packing.round_saturating(x, torch.bfloat16),
    )
    for i, (g, w) in enumerate(zip(out, want, strict=True)):
        # The sign of zero is lost by the shift of round_half_even.
        g, w = (y.cpu() + 0.0 if i == 2 else y.cpu() for y in (g, w))
        assert torch.equal(bits(g), bits(w)), i
