"""Pages rounded once more, with feedback in the metric of the queries (``codecs/feedback.py``).

Order, grids and the factors of the metric are torch's, for some pages and all heads at a time.  What is sequential is
one launch: a program for each page and head takes the channels one after the other, all tokens at once, and passes on
what each leaves undone:

    owed[i] += U_ji * error_j     for all channels i behind j, float32 [channels, tokens] in registers

The same operations as in torch, summed in another order, so a number on the edge between two codes may get either.
Nothing waits for the host.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from . import launching
from .append_reference import round_pages
from .codecs.base import Codec
from .codecs.ranked import Grid, step_of
from .pages import PagedSide
from .target import tl, triton
from .tile_math import round_half_even

FACTOR_BYTES = 64 << 20  # of factors at a time, in float64; what torch needs on the way is a few times that


@triton.jit
def _round_kernel(
    codes_ptr,
    y_ptr,
    factor_ptr,
    step_ptr,
    offset_ptr,
    last_ptr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Grid: (pages * heads,).  Channels are in the order in which they are rounded, each ``[PAGE]`` in one run."""
    page_head = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, PAGE)
    offs_c = tl.arange(0, CHANNELS)
    owed = tl.zeros([CHANNELS, PAGE], tl.float32)
    for j in range(HEAD_DIM):
        at = page_head * HEAD_DIM + j
        y = tl.load(y_ptr + at * PAGE + offs_n)  # [PAGE]
        factor = tl.load(factor_ptr + at * HEAD_DIM + offs_c, mask=offs_c < HEAD_DIM, other=0.0)  # [CHANNELS]
        step, offset, last = tl.load(step_ptr + at), tl.load(offset_ptr + at), tl.load(last_ptr + j)
        wanted = y + tl.sum(tl.where((offs_c == j)[:, None], owed, 0.0), 0)
        scaled = tl.div_rn(wanted - offset, tl.where(step > 0.0, step, 1.0))
        code = round_half_even(tl.minimum(tl.maximum(scaled, 0.0), last))
        tl.store(codes_ptr + at * PAGE + offs_n, code.to(tl.uint8))
        error = y - (offset + step * code)
        owed += factor[:, None] * error[None, :]


def round_constants(head_dim: int, page_size: int) -> dict[str, Any]:
    """The constants of ``_round_kernel``, and how it is launched."""
    channels = triton.next_power_of_2(head_dim)
    return {
        "HEAD_DIM": head_dim,
        "CHANNELS": channels,
        "PAGE": page_size,
        # 64 numbers of a thread.
        "num_warps": min(max(channels * page_size // (64 * 32), 1), 16),
        "enable_fp_fusion": False,
    }


def rounded_by_kernel(y: torch.Tensor, grid: Grid, factor: torch.Tensor) -> torch.Tensor:
    """``codecs.ranked.rounded_with_feedback``, which see."""
    page_size, head_dim = y.shape[-2:]
    y = y.transpose(-1, -2).contiguous()
    codes = torch.empty_like(y, dtype=torch.uint8)
    launching.launch(
        _round_kernel,
        (y.shape[:-2].numel(), 1, 1),
        codes,
        y,
        factor.contiguous(),
        step_of(grid.step),
        grid.offset.float(),
        grid.last,
        **round_constants(head_dim, page_size),
    )
    return codes.transpose(-1, -2)


def _encode(
    codec: Codec, planes: Sequence[torch.Tensor], x: torch.Tensor, ids: torch.Tensor, metric: torch.Tensor
) -> None:
    """``append_reference.encode_pages``, which see."""
    options: dict[str, Any] = {"metric": metric, "rounded": rounded_by_kernel}
    for stored, plane in zip(planes, codec._encode(x.float(), x.dtype, **options), strict=True):
        stored.index_copy_(0, ids.reshape(-1), plane.flatten(0, 1))


def round_triton(side: PagedSide, x: torch.Tensor, pages: torch.Tensor, metric: torch.Tensor) -> None:
    """``ops.round_keys``, which see."""
    batch, heads, _, head_dim = x.shape
    encode = functools.partial(_encode, metric=metric.unsqueeze(1))
    step = max(1, FACTOR_BYTES // (batch * heads * head_dim * head_dim * 8))
    for first in range(0, pages.shape[1], step):
        last = min(first + step, pages.shape[1])
        round_pages(side, x[:, :, first * side.page_size : last * side.page_size], pages[:, first:last], encode)
