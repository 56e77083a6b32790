"""Codes of eight coordinates together, whose signs cost nothing: less error than Lloyd-Max's at the same bytes.

A block is eight coordinates of a rotated vector, with codes c_0 .. c_7 of 2 or 3 bits.  The lowest bits of the codes
tell the signs, by parities that no coordinate has a part in alone (indices below are mod 4):

    u_i = c_i mod 2   (i = 0 .. 7)           v_i = u_i xor u_{i+4}   (i = 0 .. 3)
    coordinates i and i + 4 are negative where v_{i+1} xor v_{i+2} = 1
    level of a coordinate = its sign * T[c]

The sign of a coordinate does not depend on its own code, so each of the 256 patterns u offers it another 2 (or 4) of
the 8 (or 16) levels +-T, and the nearest of all patterns is taken.  T is not symmetric: a code stands for a level of
either sign, and the two halves of +-T lie between each other's levels.  This is a coset code: u chooses one of the
cosets into which +-T is divided, as in trellis-coded quantization, but in blocks of eight, decoded without a memory.

    bits                       2        3
    mean squared error         0.0940   0.0256      of a unit Gaussian
    Lloyd-Max                  0.1175   0.0345

``benchmarks/octet_tables.py`` computed the literals of T: nearest codes and means of their coordinates in turn.

Encoding is exact.  Given v, signs are known and the pairs (i, i + 4) do not depend on each other: the best of two u_i
each, then the best of 16 v.  Sums are made in one order, so that codes depend neither on the shape of a call nor on the
machine; ties go to the lowest v, then to u_i = 0, then to the lowest code.

    codes   uint8 [P, D/4]   bit    7 6               5 4              3 2              1 0
                             code   channel j + 3D/4  channel j + D/2  channel j + D/4  channel j       j = 0 .. D/4 - 1

    high    uint8 [P, D/8]   bit 2 f + p, the third bit of a code: channel 2 w + p + f D/4      w = 0 .. D/8 - 1
            (3 bits only)                                                                       p = 0, 1    f = 0 .. 3
    scale   fp16 [P, 1]                                                        2 or 3 + 16/D bits per element

A block is two neighbouring bytes of codes, the 16-bit word that kernels read: coordinate i is field i of the even byte,
i + 4 of the odd one.  With x the exclusive or of the bytes, bits 0, 2, 4 and 6 of rotr8(x, 2) xor rotr8(x, 4) are the
signs of the fields of both.

References: Ungerboeck 1982 (IEEE Trans. Information Theory 28) and Marcellin & Fischer 1990 (IEEE Trans. Communications
38) for levels in cosets; EDEN (arXiv:2108.08842) for the scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..ptx import octet_lookup
from ..target import tl, triton
from ..tile_math import lookup_levels
from ..tile_math import round_saturating as tile_saturating
from ..unpack import load_word_bytes, load_words, unpack_octets
from .base import Plane, Tile
from .cpu import CpuCodec
from .jit import KernelCodec, no_channels
from .lloyd_max import lookup
from .packing import pack_fields, round_saturating
from .turboquant import Bucket, LloydMaxCodec, unbiased_scale, unit_rows

LEVELS: dict[int, tuple[float, ...]] = {
    2: (-1.8466, -0.6101, 0.1771, 1.0539),
    3: (-2.451, -1.322, -0.7509, -0.3054, 0.1002, 0.5187, 1.0111, 1.7555),
}

_SOME = 1 << 18  # numbers that are searched at a time: work memory is about fifty times as much


def signed(table: tuple[float, ...]) -> tuple[float, ...]:
    """What signed codes stand for: ``table``, then its negatives."""
    return table + tuple(-level for level in table)


def _search(x: torch.Tensor, table: tuple[float, ...]) -> torch.Tensor:
    """``search`` of rows ``[R, D]``."""
    x = x.unflatten(-1, (4, -1, 2))  # [R, field, block, byte]

    def error(y: torch.Tensor, parity: int) -> torch.Tensor:
        best = (y - table[parity]).square()
        for code in range(parity + 2, len(table), 2):
            best = torch.minimum(best, (y - table[code]).square())
        return best

    least = {}  # of both coordinates of a pair, by sign and v: [R, field, block]
    for sign, y in enumerate((x, -x)):
        (even, odd), (even_next, odd_next) = (error(y, parity).unbind(-1) for parity in (0, 1))
        least[sign, 0] = torch.minimum(even + odd, even_next + odd_next)
        least[sign, 1] = torch.minimum(even + odd_next, even_next + odd)
    best, which = None, torch.zeros(x.shape[0], x.shape[2], dtype=torch.uint8, device=x.device)
    for pattern in range(16):
        bits = [pattern >> i & 1 for i in range(4)]
        terms = [least[bits[(i + 1) % 4] ^ bits[(i + 2) % 4], bits[i]][:, i] for i in range(4)]
        cost = (terms[0] + terms[1]) + (terms[2] + terms[3])
        if best is None:
            best = cost
            continue
        which.masked_fill_(cost < best, pattern)
        best = torch.minimum(best, cost)
    v = which.unsqueeze(1) >> torch.arange(4, dtype=torch.uint8, device=x.device).view(4, 1) & 1  # [R, field, block]
    negative = (v.roll(-1, 1) ^ v.roll(-2, 1)).bool()
    y = torch.where(negative.unsqueeze(-1), -x, x)
    (even, odd), (even_next, odd_next) = (error(y, parity).unbind(-1) for parity in (0, 1))
    v = v.bool()
    first = even + torch.where(v, odd_next, odd)
    u = even_next + torch.where(v, odd, odd_next) < first
    u = torch.stack([u, u ^ v], -1)
    codes = u.to(torch.uint8)
    best = (y - torch.where(u, table[1], table[0])).square()
    for code in range(2, len(table), 2):
        other = (y - torch.where(u, table[code + 1], table[code])).square()
        codes += 2 * (other < best)  # errors fall towards the nearest level, then rise
        best = torch.minimum(best, other)
    return (codes + len(table) * negative.unsqueeze(-1).to(torch.uint8)).flatten(1)


def search(u: torch.Tensor, table: tuple[float, ...]) -> torch.Tensor:
    """Signed codes of the nearest levels.

    Args:
        u: unit-variance numbers, float32 ``[..., D]``; D a multiple of 8.
        table: the four or eight levels T, sorted.

    Returns:
        uint8 ``[..., D]``: the code, and ``len(table)`` more where the level is negated.
    """
    rows = u.reshape(-1, u.shape[-1])
    codes = [_search(some, table) for some in rows.split(max(1, _SOME // u.shape[-1]))]
    return torch.cat(codes).view(u.shape)


def pack_high(codes: torch.Tensor) -> torch.Tensor:
    """The plane of third bits, uint8 ``[..., D / 8]``, of codes below 8 ``[..., D]``."""
    bits = (codes >> 2 & 1).unflatten(-1, (4, -1, 2)).transpose(-3, -2).flatten(-2)  # [..., D / 8, 8]
    return (bits.int() << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)


def expand_octets(codes: torch.Tensor, high: torch.Tensor | None, table: tuple[float, ...]) -> torch.Tensor:
    """The levels that the planes stand for, float32 ``[..., D]``; ``high`` only with eight levels."""
    words = codes.unflatten(-1, (-1, 2)).int()  # [..., D / 8, 2]
    fields = torch.arange(0, 8, 2, device=codes.device).view(4, 1, 1)
    differ = (words[..., 0] ^ words[..., 1]) * 257
    signs = ((differ >> 2) ^ (differ >> 4)).unsqueeze(-1).unsqueeze(-3)  # [..., 1, D / 8, 1]
    index = (words.unsqueeze(-3) >> fields & 3) + len(table) * (signs >> fields & 1)  # [..., 4, D / 8, 2]
    if high is not None:
        bits = high.int().unsqueeze(-1).unsqueeze(-3)
        index += (bits >> (fields + torch.arange(2, device=codes.device)) & 1) << 2
    return lookup(index.flatten(-3), signed(table))


# -- kernels -----------------------------------------------------------------------------------------------------------

_LEVELS_2, _LEVELS_3 = tl.constexpr(LEVELS[2]), tl.constexpr(LEVELS[3])
_LOOKUP_2, _LOOKUP_3 = tl.constexpr(octet_lookup(LEVELS[2])), tl.constexpr(octet_lookup(LEVELS[3]))


@triton.jit
def _tile(
    planes,
    page_head,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    WORDS: tl.constexpr,
    DTYPE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PTX: tl.constexpr,
):
    words = load_words(planes[0], page_head, offs_n, HEAD_DIM, PAGE, FIELDS, WORDS, TRANSPOSED)
    if len(planes) == 3:
        high = load_word_bytes(planes[1], page_head, offs_n, HEAD_DIM, PAGE, WORDS, TRANSPOSED)
        levels = unpack_octets(words, high, _LEVELS_3, 8, _LOOKUP_3, DTYPE, PTX)
    else:
        levels = unpack_octets(words, words, _LEVELS_2, 4, _LOOKUP_2, DTYPE, PTX)
    scale = tl.load(planes[len(planes) - 1] + page_head * PAGE + offs_n)  # [N]
    return levels, scale.to(tl.float32), offs_n


@triton.jit
def _least_error(y, TABLE: tl.constexpr, COUNT: tl.constexpr, PARITY: tl.constexpr):
    """Squared distance of ``y`` to the nearest level whose code has the lowest bit ``PARITY``."""
    best = y - tl.full(y.shape, TABLE[PARITY], tl.float32)
    best = best * best
    for code in tl.static_range(PARITY + 2, COUNT, 2):
        other = y - tl.full(y.shape, TABLE[code], tl.float32)
        best = tl.minimum(best, other * other)
    return best


@triton.jit
def _nearest_code(y, u, TABLE: tl.constexpr, COUNT: tl.constexpr):
    """The code of the nearest level among those with the lowest bit ``u``, int32."""
    code = u.to(tl.int32)
    best = y - tl.where(u, tl.full(y.shape, TABLE[1], tl.float32), tl.full(y.shape, TABLE[0], tl.float32))
    best = best * best
    for c in tl.static_range(2, COUNT, 2):
        other = y - tl.where(u, tl.full(y.shape, TABLE[c + 1], tl.float32), tl.full(y.shape, TABLE[c], tl.float32))
        other = other * other
        code += tl.where(other < best, 2, 0)
        best = tl.minimum(best, other)
    return code


@triton.jit
def _coordinates(x):
    """``x`` ``[N, C]`` in byte order by coordinate of a block: eight ``[N, C / 8]``."""
    # The columns of a word by byte and, in two dimensions, by field.
    even, odd = tl.split(x.reshape(x.shape[0], x.shape[1] // 8, 2, 2, 2))
    zero, two = tl.split(even)
    one, three = tl.split(odd)
    x0, x4 = tl.split(zero)
    x1, x5 = tl.split(one)
    x2, x6 = tl.split(two)
    x3, x7 = tl.split(three)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _pair_errors(even, odd, TABLE: tl.constexpr, COUNT: tl.constexpr):
    """Errors of a pair of coordinates: the least for v = 0 and for v = 1."""
    a, b = _least_error(even, TABLE, COUNT, 0), _least_error(even, TABLE, COUNT, 1)
    c, d = _least_error(odd, TABLE, COUNT, 0), _least_error(odd, TABLE, COUNT, 1)
    return tl.minimum(a + c, b + d), tl.minimum(a + d, b + c)


@triton.jit
def _nearest_pattern(x, TABLE: tl.constexpr, COUNT: tl.constexpr):
    """v of the nearest levels of the coordinates ``x``, int32: v_i is bit i."""
    least = ()  # by field, sign and v
    for i in tl.static_range(4):
        least = least + _pair_errors(x[i], x[i + 4], TABLE, COUNT) + _pair_errors(-x[i], -x[i + 4], TABLE, COUNT)
    best = (least[0] + least[4]) + (least[8] + least[12])
    which = tl.zeros(best.shape, tl.int32)
    for p in tl.static_range(1, 16):
        first = least[((p >> 1) ^ (p >> 2)) % 2 * 2 + p % 2] + least[4 + ((p >> 2) ^ (p >> 3)) % 2 * 2 + (p >> 1) % 2]
        last = least[8 + ((p >> 3) ^ p) % 2 * 2 + (p >> 2) % 2] + least[12 + (p ^ (p >> 1)) % 2 * 2 + (p >> 3) % 2]
        cost = first + last
        which = tl.where(cost < best, p, which)
        best = tl.minimum(best, cost)
    return which


@triton.jit
def _encode(
    planes,
    page_head,
    x,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    BYTES: tl.constexpr,
    TABLE: tl.constexpr,
    COUNT: tl.constexpr,
):
    squares, norm, unit = unit_rows(x, HEAD_DIM)
    unit = _coordinates(unit)  # of each block, [N, W]
    which = _nearest_pattern(unit, TABLE, COUNT)
    words, high, product = tl.zeros_like(which), tl.zeros_like(which), tl.zeros_like(unit[0])
    for i in tl.static_range(4):
        v = ((which >> i) & 1) != 0
        negative = (((which >> ((i + 1) % 4)) ^ (which >> ((i + 2) % 4))) & 1) != 0
        even, odd = tl.where(negative, -unit[i], unit[i]), tl.where(negative, -unit[i + 4], unit[i + 4])
        a, b = _least_error(even, TABLE, COUNT, 0), _least_error(even, TABLE, COUNT, 1)
        c, d = _least_error(odd, TABLE, COUNT, 0), _least_error(odd, TABLE, COUNT, 1)
        u = b + tl.where(v, c, d) < a + tl.where(v, d, c)
        even_code, odd_code = _nearest_code(even, u, TABLE, COUNT), _nearest_code(odd, u ^ v, TABLE, COUNT)
        words |= ((even_code & 3) | ((odd_code & 3) << 8)) << (2 * i)
        high |= ((even_code >> 2) | ((odd_code >> 2) << 1)) << (2 * i)
        # Both signs were taken off; blocks past the head are zero.
        product += even * lookup_levels(even_code, TABLE, COUNT, tl.float32)
        product += odd * lookup_levels(odd_code, TABLE, COUNT, tl.float32)
    WIDTH: tl.constexpr = HEAD_DIM // 8
    offs_w = tl.arange(0, BYTES // 2)
    places = page_head * (PAGE * WIDTH) + offs_n[:, None] * WIDTH + offs_w[None, :]
    exists = (offs_w < WIDTH)[None, :]
    tl.store(planes[0].to(tl.pointer_type(tl.int16)) + places, words.to(tl.int16), mask=exists)
    if COUNT == 8:
        tl.store(planes[1] + places, high.to(tl.uint8), mask=exists)
    scale = unbiased_scale(squares, tl.sum(product, 1) * (norm * HEAD_DIM**-0.5))
    tl.store(planes[len(planes) - 1] + page_head * PAGE + offs_n, tile_saturating(scale, tl.float16))


@triton.jit
def _encode_2(
    planes,
    page_head,
    x,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    BYTES: tl.constexpr,
):
    _encode(planes, page_head, x, offs_n, HEAD_DIM, PAGE, FIELDS, BYTES, _LEVELS_2, 4)


@triton.jit
def _encode_3(
    planes,
    page_head,
    x,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    BYTES: tl.constexpr,
):
    _encode(planes, page_head, x, offs_n, HEAD_DIM, PAGE, FIELDS, BYTES, _LEVELS_3, 8)


# -- codecs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OctetCodec(LloydMaxCodec):
    """Values: codes of 2 or 3 bits of rotated vectors, eight coordinates at a time."""

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        codes = Plane("codes", torch.uint8, "token", head_dim // 4)
        high = Plane("high", torch.uint8, "token", head_dim // 8)
        scale = Plane("scale", torch.float16, "token", 1)
        return (codes, scale) if self.bits == 2 else (codes, high, scale)

    def _nearest(self, unit: torch.Tensor, bucket: Bucket) -> tuple[torch.Tensor, torch.Tensor]:
        codes = bucket(unit, LEVELS[self.bits])
        return codes, lookup(codes, signed(LEVELS[self.bits]))

    def _encode(self, x: torch.Tensor, model_dtype: torch.dtype, bucket: Bucket = search) -> tuple[torch.Tensor, ...]:
        fit = self._fit(x, bucket)
        low, scale = pack_fields(fit.codes & 3, 2), round_saturating(fit.scale, torch.float16)
        return (low, scale) if self.bits == 2 else (low, pack_high(fit.codes), scale)

    def tile(self, planes: Sequence[torch.Tensor]) -> Tile:
        codes, *high, scale = planes
        levels = expand_octets(codes, high[0] if high else None, LEVELS[self.bits])
        return Tile(levels, token_scale=scale.squeeze(-1).float())

    @property
    def kernel(self) -> KernelCodec:
        encode = _encode_2 if self.bits == 2 else _encode_3
        return KernelCodec(_tile, no_channels, encode, fields=4, code_planes=self.bits - 1, token_scale=True)

    def cpu(self, head_dim: int) -> CpuCodec:
        high = None if self.bits == 2 else 1
        table = signed(LEVELS[self.bits])
        return CpuCodec(table, signs=high, token_scale=self.bits - 1, bucketed=True, octets=True)

    def error_bound(self, x: torch.Tensor) -> torch.Tensor:
        """Bound from the distance of the nearest levels, plus what the stored scale differs from the ideal one.

        With t the angle between r and L the error is |r| tan t, and the ray along L passes no farther from the vector u
        of length sqrt(D) than L is: sin t <= |u - L| / sqrt(D).  Codes found in another order of sums are as near, but
        for rounding.  A vector that is nearer to no level than to zero would need thousands of channels.
        """
        y = self.to_domain(x.float())
        fit = self._fit(y, search)
        norm = fit.residual.norm(dim=-1)
        sine = ((fit.unit - fit.levels).norm(dim=-1) / x.shape[-1] ** 0.5 + 1e-4).clamp_max(0.999)
        stored = round_saturating(fit.scale, torch.float16).float()
        rounding = ((stored - fit.scale).abs() * fit.levels).norm(dim=-1)
        arithmetic = 2e-6 * y.norm(dim=-1) + 1e-18 * x.shape[-1] ** 0.5  # as in `LloydMaxCodec`
        return norm * sine / (1 - sine.square()).sqrt() + rounding + arithmetic


OCTET2, OCTET3 = (
    OctetCodec(
        f"octet{bits}",
        bits,
        f"{bits} bit in blocks of eight with free signs, rotated",
        "coset codes as in trellis-coded quantization, Marcellin & Fischer 1990",
        rotated=True,
        head_dim_multiple=8,
        scale_rule="unbiased",
    )
    for bits in (2, 3)
)
