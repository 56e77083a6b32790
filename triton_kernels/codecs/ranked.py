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
    order  uint8 [D]  the channel of each rank; step and offset are in that order too

    x_hat = offset + step * code                            width + (8 + 16 + 8)/P bits per element: 4.5, 3.5, 2.47

The grid of a channel goes from its minimum to its maximum, as in ``integer.py``; 2 bits of ``int3-ranked`` cover the
middle .8 of the range, because what is clipped is made good by channels that follow (``feedback.py``).  A channel of
no bits is the middle of its range.  Without second moments of the queries, ranges alone decide the order and every code
is the nearest one.

Source: measured here (docs/accuracy.md).  Relatives: Kitty (arXiv:2511.18643) and Block-GTQ (arXiv:2606.24033), which
choose bits of channels by calibration; ranges per channel are KIVI's (arXiv:2402.02750).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .base import Codec, Plane, Tile
from .cpu import CpuCodec
from .feedback import feedback_factor, importance, ranked
from .packing import fp16_at_least, fp16_at_most

_LARGEST_STEP = 247  # of 8 bits: 61440, the largest finite one


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
        self, x: torch.Tensor, model_dtype: torch.dtype, metric: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """``metric``: second moments of the queries, float32, broadcasts to ``[..., D, D]`` for pages and heads."""
        low, high = x.amin(-2), x.amax(-2)  # [..., D]
        order = importance(high - low, metric).argsort(dim=-1, descending=True, stable=True)
        grid = self._grid(low.gather(-1, order), high.gather(-1, order))
        y = x.gather(-1, order.unsqueeze(-2).expand_as(x))
        factor = None if metric is None else feedback_factor(ranked(metric.expand(*low.shape, -1), order))
        codes = self._codes(y, grid, factor)
        steps = grid.step[..., : self.planes(x.shape[-1])[-3].width]
        return (*self._pack(codes), steps, grid.offset, order.to(torch.uint8))

    def _grid(self, low: torch.Tensor, high: torch.Tensor) -> Grid:
        """The grids of ranked channels between ``low`` and ``high`` (float32 ``[..., D]``)."""
        quarter, device = low.shape[-1] // 4, low.device
        last = torch.tensor([2.0**width - 1 for width in self.widths], device=device).repeat_interleave(quarter)
        covered = torch.tensor(self.covered, device=device).repeat_interleave(quarter)
        # Halves first: the sum of both ends may be beyond float32.
        middle = low * 0.5 + high * 0.5
        low = torch.where(covered < 1, middle + (low - middle) * covered, low)
        high = torch.where(covered < 1, middle + (high - middle) * covered, high)
        offset = torch.where(last > 0, fp16_at_most(low), fp16_at_most(middle))
        step = step_at_least((high - offset.float()).clamp_min(0) / last.clamp_min(1))
        return Grid(last, torch.where(last > 0, step, 0), offset)

    @staticmethod
    def _codes(y: torch.Tensor, grid: Grid, factor: torch.Tensor | None) -> torch.Tensor:
        """Codes, uint8, of ranked channels ``y`` ``[..., P, D]``; each channel after those before it, whose errors it
        makes good as far as ``factor`` ``[..., D, D]`` says."""
        step, offset = step_of(grid.step).unsqueeze(-2), grid.offset.float().unsqueeze(-2)
        divisor = torch.where(step > 0, step, 1.0)  # a step of zero: every element is the offset, code 0
        if factor is None:
            return torch.round(((y - offset) / divisor).clamp_min(0).minimum(grid.last)).to(torch.uint8)
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
        place = order.long().argsort(-1)
        levels = self._unpack(planes).float()
        levels = levels.gather(-1, place.unsqueeze(-2).expand_as(levels))
        return Tile(levels, channel_scale=step.gather(-1, place), channel_offset=offset.float().gather(-1, place))

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
        order = importance(high - low, None).argsort(dim=-1, descending=True, stable=True)
        grid = self._grid(low.gather(-1, order), high.gather(-1, order))
        y = y.gather(-1, order.unsqueeze(-2).expand_as(y))
        start, width = grid.offset.float().unsqueeze(-2), step_of(grid.step).unsqueeze(-2)
        clipped = (start - y).clamp_min(0) + (y - start - width * grid.last).clamp_min(0)
        rounding = 4 * torch.finfo(torch.float32).eps * (start.abs() + width * (grid.last + 1))
        return (width / 2 + clipped + rounding).norm(dim=-1) + 1e-6 * y.norm(dim=-1)


_SUMMARY = "{} bits per channel over a page, more for those that count, rounded with feedback"
_SOURCE = "measured here: docs/accuracy.md"

INT4_RANKED = RankedCodec(
    "int4-ranked", 4, _SUMMARY.format(4), _SOURCE, head_dim_multiple=8, uses_queries=True, widths=(6, 4, 3, 3)
)
INT3_RANKED = RankedCodec(
    "int3-ranked",
    3,
    _SUMMARY.format(3),
    _SOURCE,
    head_dim_multiple=8,
    uses_queries=True,
    widths=(4, 4, 2, 2),
    covered=(1.0, 1.0, 0.8, 0.8),
)
INT2_RANKED = RankedCodec(
    "int2-ranked", 2, _SUMMARY.format(2), _SOURCE, head_dim_multiple=8, uses_queries=True, widths=(4, 2, 2, 0)
)
