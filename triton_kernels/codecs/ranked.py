"""Keys with bits by channel: those of a page ranked by what their error costs, each quarter with a width of its own.

The error of a score is sum_c q_c e_c, so a step too wide costs E[q_c^2] step_c^2.  Queries are anything but isotropic
(the second moments of 64 channels are worth 2 to 7 equal ones), and so are ranges: equal bits for all channels waste
most of them.  A page therefore has an order of its channels, by E[q_c^2] range_c^2 from the largest on, and widths go
by quarter:

    int4-ranked   6 4 3 3 bits      int3-ranked   4 4 2 2      int2-ranked   4 2 2 0

Pages are as large as with equal bits, and every byte has one channel of several quarters.  With Q = D/4 and c_i[j] the
code of the channel of rank i Q + j:

    int4-ranked   codes uint8 [P, Q]    c_0 >> 2 | c_1 << 4
                  rest  uint8 [P, Q]    c_0 & 3 | c_2 << 2 | c_3 << 5
    int3-ranked   codes uint8 [P, Q]    c_0 | c_1 << 4
                  rest  uint8 [P, Q/2]  byte m: c_2 | c_3 << 2 of j = 2 m, and the same << 4 of 2 m + 1
    int2-ranked   codes uint8 [P, Q]    c_0 | c_1 << 4 | c_2 << 6

    step   uint8 [D]  bits 14 to 7 of an fp16 number: 5 of exponent, 3 of mantissa, rounded up (int2-ranked: [3 Q])
    offset fp16  [D]
    order  uint8 [D]  the channel of each rank; step and offset are in that order too.  A byte has 256 channels: of
                      more (latents), the channels c with the same c mod B are ranked among themselves, B = 2, 4, 8,
                      rank r has one with c mod B = r mod B, and its byte is c // B

    x_hat = offset + step * code                            width + (8 + 16 + 8)/P bits per element: 4.5, 3.5, 2.47

The grid of a channel goes from its minimum to its maximum, as in ``integer.py``; 2 bits of ``int3-ranked`` cover the
middle .8 of the range, because what is clipped is made good by channels that follow (``feedback.py``).  A channel of
no bits is the middle of its range.  Without second moments of the queries, ranges alone decide the order and every code
is the nearest one.

Source: measured here (docs/accuracy.md).  Relatives: Kitty (arXiv:2511.18643) and Block-GTQ (arXiv:2606.24033), which
choose bits of channels by calibration; ranges per channel are KIVI's (arXiv:2402.02750).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..pack import byte_columns, split_fields, store_bytes
from ..target import tl, triton
from ..tile_math import fp16_at_least as tile_at_least
from ..tile_math import fp16_at_most as tile_at_most
from ..tile_math import round_half_even
from ..unpack import (
    RANKED_UNITS,
    channel_blocks,
    load_channel_bytes,
    load_channels,
    load_offsets,
    load_order,
    load_steps,
    load_word_bytes,
    load_words,
    unpack_ranked_2,
    unpack_ranked_3,
    unpack_ranked_4,
)
from .base import Codec, Plane, Tile
from .cpu import CpuCodec
from .feedback import feedback_factor, importance, ranked
from .jit import KernelCodec
from .packing import fp16_at_least, fp16_at_most

_LARGEST_STEP = 247  # of 8 bits: 61440, the largest finite one
_WIDTHS = {4: (6, 4, 3, 3), 3: (4, 4, 2, 2), 2: (4, 2, 2, 0)}
_COVERED = {4: (1.0, 1.0, 1.0, 1.0), 3: (1.0, 1.0, 0.8, 0.8), 2: (1.0, 1.0, 1.0, 1.0)}


# -- kernels -----------------------------------------------------------------------------------------------------------


def _last(bits: int) -> tuple[float, ...]:
    """The largest codes of the quarters."""
    return tuple(2.0**width - 1 for width in _WIDTHS[bits])


def _factors(bits: int) -> tuple[float, ...]:
    """What makes a step of its bits at their places in float32, where exponents count from 112 less, and of levels
    that are multiplied by their unit."""
    return tuple(2.0 ** (112 - unit) for unit in RANKED_UNITS[bits])


_LAST_4, _LAST_3, _LAST_2 = tl.constexpr(_last(4)), tl.constexpr(_last(3)), tl.constexpr(_last(2))
_COVERED_4, _COVERED_3, _COVERED_2 = tl.constexpr(_COVERED[4]), tl.constexpr(_COVERED[3]), tl.constexpr(_COVERED[2])
_UNITS_4, _UNITS_3, _UNITS_2 = (tl.constexpr(RANKED_UNITS[bits]) for bits in (4, 3, 2))
_FACTORS_4, _FACTORS_3, _FACTORS_2 = tl.constexpr(_factors(4)), tl.constexpr(_factors(3)), tl.constexpr(_factors(2))


@triton.jit
def _scale_and_offset(
    planes,
    page_head,
    HEAD_DIM: tl.constexpr,
    FIELDS: tl.constexpr,
    WORDS: tl.constexpr,
    PLANE: tl.constexpr,
    FACTORS: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """``channels``; steps, in plane ``PLANE``, are divided by the units of their parts."""
    bits = load_channel_bytes(planes[PLANE], page_head, LEVELS // 2, HEAD_DIM // FIELDS // 2, WORDS)
    scale = ()
    for part in tl.static_range(LEVELS):
        step = (bits[part] << 20).to(tl.float32, bitcast=True)
        scale = scale + (step * FACTORS[part],)
    return scale, load_channels(planes[PLANE + 1], page_head, HEAD_DIM, FIELDS, WORDS)


@triton.jit
def _narrow(
    planes,
    page_head,
    HEAD_DIM: tl.constexpr,
    FIELDS: tl.constexpr,
    WORDS: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
    PLANE: tl.constexpr,
    UNITS: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """``narrow_channels``, as ``_scale_and_offset``."""
    WIDTH: tl.constexpr = HEAD_DIM // FIELDS // 2
    scale = load_steps(planes[PLANE], page_head, LEVELS, WIDTH, WORDS, UNITS, DTYPE, PTX)
    return scale, load_offsets(planes[PLANE + 1], page_head, HEAD_DIM, FIELDS, WORDS, DTYPE)


@triton.jit
def _ranked_grid(low, high, quarter, LAST: tl.constexpr, COVERED: tl.constexpr):
    """``RankedCodec._grid`` of channels in ``quarter`` (int32), all ``[COLUMNS]``: the largest code in float32, the
    step in its 8 bits as int32, and the offset in fp16."""
    last = tl.full(low.shape, LAST[0], tl.float32)
    covered = tl.full(low.shape, COVERED[0], tl.float32)
    for i in tl.static_range(1, 4):
        last = tl.where(quarter == i, tl.full(low.shape, LAST[i], tl.float32), last)
        covered = tl.where(quarter == i, tl.full(low.shape, COVERED[i], tl.float32), covered)
    middle = low * 0.5 + high * 0.5
    high = tl.where(covered < 1.0, middle + (high - middle) * covered, high)
    low = tl.where(covered < 1.0, middle + (low - middle) * covered, low)
    offset = tile_at_most(tl.where(last > 0.0, low, middle))
    width = tl.maximum(high - offset.to(tl.float32), 0.0)
    bits = tile_at_least(tl.div_rn(width, tl.maximum(last, 1.0))).to(tl.int16, bitcast=True).to(tl.int32)
    step = tl.minimum((bits + 127) >> 7, 247)
    return last, tl.where(last > 0.0, step, 0), offset


@triton.jit
def _ranked_encode(
    planes,
    page_head,
    x,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    BYTES: tl.constexpr,
    PLANE: tl.constexpr,
    LAST: tl.constexpr,
    COVERED: tl.constexpr,
):
    """Write steps, offsets and order, planes ``PLANE`` and following, and give the codes of the four quarters, four
    uint8 ``[PAGE, BYTES]``."""
    COLUMNS: tl.constexpr = BYTES * FIELDS
    QUARTER: tl.constexpr = HEAD_DIM // FIELDS
    BLOCKS: tl.constexpr = channel_blocks(HEAD_DIM)
    # What columns in byte order say of channels they say of ranks, too.
    rank, exists = byte_columns(HEAD_DIM, FIELDS, BYTES)
    wide = x.to(tl.float32)
    ranges = tl.max(wide, 0) - tl.min(wide, 0)
    size = (ranges * ranges).to(tl.int32, bitcast=True).to(tl.int64)
    # As integers, numbers that are not negative are in their own order; of equal ones the lower channel comes first.
    keys = (size << 8) | (255 - rank // BLOCKS)
    if BLOCKS > 1:  # one block of channels after the other
        keys = keys | ((BLOCKS - 1 - rank % BLOCKS).to(tl.int64) << 40)
    keys = tl.sort(tl.where(exists, keys, -1), descending=True)
    place = rank % BLOCKS * (HEAD_DIM // BLOCKS) + rank // BLOCKS
    stored = tl.gather((255 - (keys & 255)).to(tl.int32), tl.where(exists, place, 0), 0)  # [COLUMNS]
    channels = stored * BLOCKS + rank % BLOCKS
    column = channels % QUARTER * FIELDS + channels // QUARTER
    y = tl.gather(x, tl.broadcast_to(column[None, :], (PAGE, COLUMNS)), 1).to(tl.float32)
    quarter = tl.arange(0, COLUMNS) % FIELDS
    last, step, offset = _ranked_grid(tl.min(y, 0), tl.max(y, 0), quarter, LAST, COVERED)
    width = (step << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    start = offset.to(tl.float32)
    scaled = tl.div_rn(y - start[None, :], tl.where(width > 0.0, width, 1.0)[None, :])
    codes = round_half_even(tl.minimum(tl.maximum(scaled, 0.0), last[None, :])).to(tl.uint8)
    STEPS: tl.constexpr = HEAD_DIM if LAST[3] > 0.0 else 3 * QUARTER
    tl.store(planes[PLANE] + page_head * STEPS + rank, step.to(tl.uint8), mask=exists & (rank < STEPS))
    tl.store(planes[PLANE + 1] + page_head * HEAD_DIM + rank, offset, mask=exists)
    tl.store(planes[PLANE + 2] + page_head * HEAD_DIM + rank, stored.to(tl.uint8), mask=exists)
    return split_fields(codes)


@triton.jit
def _tile_4(
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
    rest = load_words(planes[1], page_head, offs_n, HEAD_DIM, PAGE, FIELDS, WORDS, TRANSPOSED)
    return unpack_ranked_4(words, rest, DTYPE, PTX), offs_n, offs_n


@triton.jit
def _channels_4(planes, page_head, HEAD_DIM: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr):
    return _scale_and_offset(planes, page_head, HEAD_DIM, FIELDS, WORDS, 2, _FACTORS_4, 8)


@triton.jit
def _narrow_4(
    planes,
    page_head,
    HEAD_DIM: tl.constexpr,
    FIELDS: tl.constexpr,
    WORDS: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    return _narrow(planes, page_head, HEAD_DIM, FIELDS, WORDS, DTYPE, PTX, 2, _UNITS_4, 8)


@triton.jit
def _encode_4(
    planes,
    page_head,
    x,
    offs_n,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    BYTES: tl.constexpr,
):
    first, second, third, fourth = _ranked_encode(
        planes, page_head, x, HEAD_DIM, PAGE, FIELDS, BYTES, 2, _LAST_4, _COVERED_4
    )
    QUARTER: tl.constexpr = HEAD_DIM // FIELDS
    store_bytes(planes[0], page_head, offs_n, (first >> 2) | (second << 4), PAGE, QUARTER)
    store_bytes(planes[1], page_head, offs_n, (first & 3) | (third << 2) | (fourth << 5), PAGE, QUARTER)


@triton.jit
def _tile_3(
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
    rest = load_word_bytes(planes[1], page_head, offs_n, HEAD_DIM, PAGE, WORDS, TRANSPOSED)
    return unpack_ranked_3(words, rest, DTYPE, PTX), offs_n, offs_n


@triton.jit
def _channels_3(planes, page_head, HEAD_DIM: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr):
    return _scale_and_offset(planes, page_head, HEAD_DIM, FIELDS, WORDS, 2, _FACTORS_3, 8)


@triton.jit
def _narrow_3(
    planes,
    page_head,
    HEAD_DIM: tl.constexpr,
    FIELDS: tl.constexpr,
    WORDS: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    return _narrow(planes, page_head, HEAD_DIM, FIELDS, WORDS, DTYPE, PTX, 2, _UNITS_3, 8)


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
    first, second, third, fourth = _ranked_encode(
        planes, page_head, x, HEAD_DIM, PAGE, FIELDS, BYTES, 2, _LAST_3, _COVERED_3
    )
    QUARTER: tl.constexpr = HEAD_DIM // FIELDS
    store_bytes(planes[0], page_head, offs_n, first | (second << 4), PAGE, QUARTER)
    even, odd = tl.split((third | (fourth << 2)).reshape(PAGE, BYTES // 2, 2))
    store_bytes(planes[1], page_head, offs_n, even | (odd << 4), PAGE, QUARTER // 2)


@triton.jit
def _tile_2(
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
    return unpack_ranked_2(words, DTYPE, PTX), offs_n, offs_n


@triton.jit
def _channels_2(planes, page_head, HEAD_DIM: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr):
    return _scale_and_offset(planes, page_head, HEAD_DIM, FIELDS, WORDS, 1, _FACTORS_2, 6)


@triton.jit
def _narrow_2(
    planes,
    page_head,
    HEAD_DIM: tl.constexpr,
    FIELDS: tl.constexpr,
    WORDS: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    return _narrow(planes, page_head, HEAD_DIM, FIELDS, WORDS, DTYPE, PTX, 1, _UNITS_2, 6)


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
    first, second, third, _ = _ranked_encode(
        planes, page_head, x, HEAD_DIM, PAGE, FIELDS, BYTES, 1, _LAST_2, _COVERED_2
    )
    store_bytes(planes[0], page_head, offs_n, first | (second << 4) | (third << 6), PAGE, HEAD_DIM // FIELDS)


@triton.jit
def _channel_of_rank(planes, page_head, HEAD_DIM: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr):
    stored = load_channel_bytes(planes[len(planes) - 1], page_head, FIELDS, HEAD_DIM // FIELDS // 2, WORDS)
    BLOCKS: tl.constexpr = channel_blocks(HEAD_DIM)
    if BLOCKS == 1:
        return stored
    else:
        channels = ()
        for part in tl.static_range(2 * FIELDS):
            rank = part // 2 * (HEAD_DIM // FIELDS) + 2 * tl.arange(0, WORDS) + part % 2
            channels = channels + (stored[part] * BLOCKS + rank % BLOCKS,)
        return channels


@triton.jit
def _order(planes, page_head, HEAD_DIM: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr):
    return load_order(planes[len(planes) - 1], page_head, HEAD_DIM, FIELDS, WORDS)


_KERNELS = {
    4: (_tile_4, _channels_4, _encode_4, _narrow_4),
    3: (_tile_3, _channels_3, _encode_3, _narrow_3),
    2: (_tile_2, _channels_2, _encode_2, _narrow_2),
}


# -- codecs ------------------------------------------------------------------------------------------------------------


def _ranks(cost: torch.Tensor) -> torch.Tensor:
    """The channel of each rank, int64 ``[..., D]``, the most expensive first, within each block of channels."""
    blocks = channel_blocks(cost.shape[-1])
    apart = cost.unflatten(-1, (-1, blocks))
    order = apart.argsort(dim=-2, descending=True, stable=True) * blocks
    return (order + torch.arange(blocks, device=cost.device)).flatten(-2)


class Grid(NamedTuple):
    """The codes of ranked channels; ``...`` are pages and heads."""

    last: torch.Tensor  # float32 [D]: the largest code of each rank
    step: torch.Tensor  # uint8 [..., D]
    offset: torch.Tensor  # fp16 [..., D]


def step_of(step: torch.Tensor) -> torch.Tensor:
    """What 8 bits of a step stand for, float32."""
    return (step.to(torch.int16) << 7).view(torch.float16).float()


def step_at_least(x: torch.Tensor) -> torch.Tensor:
    """The smallest step not below ``x`` (float32, not negative), in its 8 bits; the largest where there is none."""
    bits = fp16_at_least(x).view(torch.int16).int()
    return ((bits + 127) >> 7).clamp_max(_LARGEST_STEP).to(torch.uint8)


@functools.lru_cache(maxsize=64)
def _by_rank(quarters: tuple[float, ...], quarter: int, device: torch.device) -> torch.Tensor:
    """One number for each quarter, as float32 ``[4 * quarter]``; kept, because copies to a GPU stall it."""
    return torch.tensor(quarters, dtype=torch.float32, device=device).repeat_interleave(quarter)


def rounded_with_feedback(y: torch.Tensor, grid: Grid, factor: torch.Tensor) -> torch.Tensor:
    """Codes, uint8, of ranked channels ``y`` ``[..., P, D]``; each channel after those before it, whose errors it makes
    good as far as ``factor`` ``[..., D, D]`` says."""
    step, offset = step_of(grid.step).unsqueeze(-2), grid.offset.float().unsqueeze(-2)
    divisor = torch.where(step > 0, step, 1.0)
    codes, errors = torch.empty(y.shape, dtype=torch.uint8, device=y.device), torch.empty_like(y)
    for j in range(y.shape[-1]):
        wanted = y[..., j]
        if j:
            wanted = wanted + (errors[..., :j] @ factor[..., :j, j].unsqueeze(-1)).squeeze(-1)
        scaled = ((wanted - offset[..., j]) / divisor[..., j]).clamp_min(0).minimum(grid.last[j])
        code = torch.round(scaled)
        codes[..., j] = code.to(torch.uint8)
        errors[..., j] = y[..., j] - (offset[..., j] + step[..., j] * code)
    return codes


Rounded = Callable[[torch.Tensor, Grid, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class RankedCodec(Codec):
    """Keys whose channels have widths by quarter of their rank.

    Args:
        widths: bits of the four quarters, the most important first.
        covered: how much of a channel's range the grid of a quarter covers.
    """

    widths: tuple[int, int, int, int] = (4, 4, 2, 2)
    covered: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        quarter = head_dim // 4
        rest = {4: quarter, 3: quarter // 2, 2: 0}[self.bits]
        return (
            Plane("codes", torch.uint8, "token", quarter),
            *([Plane("rest", torch.uint8, "token", rest)] if rest else []),
            Plane("step", torch.uint8, "page", head_dim if self.widths[3] else 3 * quarter, _LARGEST_STEP),
            Plane("offset", torch.float16, "page", head_dim),
            Plane("order", torch.uint8, "page", head_dim),
        )

    def _encode(
        self,
        x: torch.Tensor,
        model_dtype: torch.dtype,
        metric: torch.Tensor | None = None,
        rounded: Rounded = rounded_with_feedback,
    ) -> tuple[torch.Tensor, ...]:
        """``metric``: second moments of the queries, float32, broadcasts to ``[..., D, D]`` for pages and heads."""
        low, high = x.amin(-2), x.amax(-2)  # [..., D]
        order = _ranks(importance(high - low, metric))
        grid = self._grid(low.gather(-1, order), high.gather(-1, order))
        y = x.gather(-1, order.unsqueeze(-2).expand_as(x))
        if metric is None:
            codes = self._nearest(y, grid)
        else:
            codes = rounded(y, grid, feedback_factor(ranked(metric.expand(*low.shape, -1), order)))
        steps = grid.step[..., : self.planes(x.shape[-1])[-3].width]
        return (*self._pack(codes), steps, grid.offset, (order // channel_blocks(x.shape[-1])).to(torch.uint8))

    def _grid(self, low: torch.Tensor, high: torch.Tensor) -> Grid:
        """The grids of ranked channels between ``low`` and ``high`` (float32 ``[..., D]``)."""
        quarter, device = low.shape[-1] // 4, low.device
        last = _by_rank(tuple(2.0**width - 1 for width in self.widths), quarter, device)
        covered = _by_rank(self.covered, quarter, device)
        # Halves first: the sum of both ends may be beyond float32.
        middle = low * 0.5 + high * 0.5
        low = torch.where(covered < 1, middle + (low - middle) * covered, low)
        high = torch.where(covered < 1, middle + (high - middle) * covered, high)
        offset = torch.where(last > 0, fp16_at_most(low), fp16_at_most(middle))
        step = step_at_least((high - offset.float()).clamp_min(0) / last.clamp_min(1))
        return Grid(last, torch.where(last > 0, step, 0), offset)

    @staticmethod
    def _nearest(y: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Codes, uint8, of ranked channels ``y`` ``[..., P, D]``."""
        step, offset = step_of(grid.step).unsqueeze(-2), grid.offset.float().unsqueeze(-2)
        divisor = torch.where(step > 0, step, 1.0)  # a step of zero: every element is the offset, code 0
        return torch.round(((y - offset) / divisor).clamp_min(0).minimum(grid.last)).to(torch.uint8)

    def _pack(self, codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first, second, third, fourth = codes.chunk(4, -1)
        if self.bits == 4:
            return (first >> 2) | (second << 4), (first & 3) | (third << 2) | (fourth << 5)
        if self.bits == 3:
            nibbles = third | (fourth << 2)
            return first | (second << 4), nibbles[..., ::2] | (nibbles[..., 1::2] << 4)
        return (first | (second << 4) | (third << 6),)

    def _unpack(self, planes: Sequence[torch.Tensor]) -> torch.Tensor:
        """Codes, uint8 ``[..., P, D]``, of ranked channels."""
        codes = planes[0]
        if self.bits == 4:
            rest = planes[1]
            parts = [((codes & 15) << 2) | (rest & 3), codes >> 4, (rest >> 2) & 7, rest >> 5]
        elif self.bits == 3:
            nibbles = torch.stack((planes[1] & 15, planes[1] >> 4), -1).flatten(-2)
            parts = [codes & 15, codes >> 4, nibbles & 3, nibbles >> 2]
        else:
            parts = [codes & 15, (codes >> 4) & 3, codes >> 6, torch.zeros_like(codes)]
        return torch.cat(parts, -1)

    def tile(self, planes: Sequence[torch.Tensor]) -> Tile:
        step, offset, order = planes[-3:]
        step = torch.nn.functional.pad(step_of(step), (0, offset.shape[-1] - step.shape[-1]))
        blocks, dim = channel_blocks(order.shape[-1]), order.shape[-1]
        place = (order.long() * blocks + torch.arange(dim, device=order.device) % blocks).argsort(-1)
        levels = self._unpack(planes).float()
        levels = levels.gather(-1, place.unsqueeze(-2).expand_as(levels))
        return Tile(levels, channel_scale=step.gather(-1, place), channel_offset=offset.float().gather(-1, place))

    @property
    def kernel(self) -> KernelCodec:
        *functions, narrow = _KERNELS[self.bits]
        return KernelCodec(
            *functions,
            fields=4,
            code_planes=1,  # the second one is masked beside the first and asks for no registers of a look-up
            channel_scale=True,
            channel_offset=True,
            integer_codes=True,
            channel_of=_channel_of_rank,
            order=_order,
            narrow_channels=narrow,
            empty_parts=2 * self.widths.count(0),
        )

    def cpu(self, head_dim: int) -> CpuCodec:
        count = len(self.planes(head_dim))
        return CpuCodec(
            signs=1 if self.bits > 2 else None,
            channel_scale=count - 3,
            channel_offset=count - 2,
            order=count - 1,
            covered=self.covered,
        )

    def error_bound(self, x: torch.Tensor) -> torch.Tensor:
        """Of codes that are the nearest ones; feedback trades errors of single channels for those of scores."""
        y = x.float()
        low, high = y.amin(-2), y.amax(-2)
        order = _ranks(importance(high - low, None))
        grid = self._grid(low.gather(-1, order), high.gather(-1, order))
        y = y.gather(-1, order.unsqueeze(-2).expand_as(y))
        start, width = grid.offset.float().unsqueeze(-2), step_of(grid.step).unsqueeze(-2)
        clipped = (start - y).clamp_min(0) + (y - start - width * grid.last).clamp_min(0)
        rounding = 4 * torch.finfo(torch.float32).eps * (start.abs() + width * (grid.last + 1))
        return (width / 2 + clipped + rounding).norm(dim=-1) + 1e-6 * y.norm(dim=-1)


_SUMMARY = "{} bits per channel over a page, more for those that count, rounded with feedback"
_SOURCE = "measured here: docs/accuracy.md"

INT4_RANKED = RankedCodec(
    "int4-ranked", 4, _SUMMARY.format(4), _SOURCE, head_dim_multiple=8, uses_queries=True, widths=_WIDTHS[4]
)
INT3_RANKED = RankedCodec(
    "int3-ranked",
    3,
    _SUMMARY.format(3),
    _SOURCE,
    head_dim_multiple=8,
    uses_queries=True,
    widths=_WIDTHS[3],
    covered=_COVERED[3],
)
INT2_RANKED = RankedCodec(
    "int2-ranked", 2, _SUMMARY.format(2), _SOURCE, head_dim_multiple=8, uses_queries=True, widths=_WIDTHS[2]
)
