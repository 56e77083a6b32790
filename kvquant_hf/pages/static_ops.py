"""What a static cache does on the device besides append and attention, as operators that ``torch.compile`` takes whole.

Lengths are only ever on the device, so nothing here may depend on them in Python while a graph is recorded.
"""

from typing import Any

import torch
from torch import library

from ..errors import CacheFullError
from ..triton_kernels.codecs import CODECS
from ..triton_kernels.ops import PagedSide, dense_attention, gather_dense, put_first, round_keys
from .moments import Moments, metric_of


def tokens_of(lengths: torch.Tensor, page_size: int) -> torch.Tensor:
    """Tokens of each sequence, int64 ``[batch]``, from ``lengths`` ``[batch, 2]``: sealed pages, open tokens."""
    return lengths[:, 0].long() * page_size + lengths[:, 1]


def full_message(needed: object, max_length: int) -> str:
    """What ``CacheFullError`` says."""
    return (
        f"this static cache takes {max_length} tokens and is to hold {needed}; make it with a larger max_length, "
        "generate fewer tokens, or call cache.reset()."
    )


def begin_step(
    before: torch.Tensor, lengths: torch.Tensor, tokens: int, page_size: int, max_length: int, wait: bool
) -> None:
    """Copy ``lengths`` to ``before`` if there is room for ``tokens`` more tokens.

    Args:
        before, lengths: int32 ``[batch, 2]``; the first is written.
        tokens: tokens that are about to be appended to each sequence.
        page_size: tokens per page.
        max_length: tokens that each sequence may have.
        wait: whether the host may wait for the device to know.  Where it may not, as in a graph, the device itself
            stops the program (an assertion) before anything is written outside of the pages.

    Raises:
        CacheFullError: there is no room; nothing has changed.
    """
    needed = tokens_of(lengths, page_size).amax() + tokens
    if not wait:
        torch._assert_async(needed <= max_length, full_message("more", max_length))
    elif int(needed) > max_length:
        raise CacheFullError(full_message(int(needed), max_length))
    before.copy_(lengths)


compiled_begin_step = library.custom_op("kvquant_hf::begin_step", begin_step, mutates_args=("before",))


@compiled_begin_step.register_fake
def _(*args: object) -> None:
    return None


def round_first(
    codec: str,
    planes: list[torch.Tensor],
    tail: torch.Tensor,
    keys: torch.Tensor,
    pages: torch.Tensor,
    diagonal: torch.Tensor,
    correlations: torch.Tensor,
    impl: str,
) -> None:
    """Round the keys of a first prompt, in pages already, in the metric of a calibration.

    Args:
        codec: name of the keys' codec.
        planes: its planes; written.
        tail: open pages ``[batch, heads, page_size, head_dim]``.
        keys: what the pages hold, ``[batch, heads, count * page_size, head_dim]``.
        pages: int64 ``[batch, count]``.
        diagonal, correlations: ``Moments`` of the queries.
        impl: what is to run.
    """
    side = PagedSide(CODECS[codec], planes, tail, tail.shape[2])
    metric = metric_of(Moments(diagonal, correlations)).expand(len(keys), -1, -1, -1)
    round_keys(side, keys, pages, metric, impl=impl)  # type: ignore[arg-type]  # an operator knows strings


compiled_round_first = library.custom_op("kvquant_hf::round_first", round_first, mutates_args=("planes",))


@compiled_round_first.register_fake
def _(*args: object) -> None:
    return None


@library.custom_op("kvquant_hf::multiply_out", mutates_args=())
def multiply_out(
    codec: str,
    planes: list[torch.Tensor],
    tail: torch.Tensor,
    first: torch.Tensor | None,
    first_at: torch.Tensor | None,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    max_length: int,
) -> torch.Tensor:
    """Keys or values in the model's dtype, ``[batch, heads, max_length, head_dim]``, zeros behind the tokens held.

    Reserved pages are decoded too and not used, because how many are sealed is known on the device only.

    Args:
        codec: name of the side's codec.
        planes: its planes.
        tail: open pages ``[batch, heads, page_size, head_dim]``.
        first, first_at: tokens that are read as they came, see ``PagedSide``.
        page_table: int32 ``[batch, (max_length - 1) // page_size]``.
        lengths: int32 ``[batch, 2]``: sealed pages and tokens in the open page of each sequence.
        max_length: tokens of the result.
    """
    heads, page_size, head_dim = tail.shape[1:]
    dense = tail.new_zeros(tail.shape[0], heads, max_length, head_dim)
    side = PagedSide(CODECS[codec], planes, tail[:, :, :0], page_size)
    packed = gather_dense(side, page_table)
    position = torch.arange(max_length, device=tail.device)
    sealed = lengths[:, :1] * page_size
    in_open_page = (position - sealed).clamp(0, page_size - 1)  # [batch, max_length]
    dense.copy_(tail.gather(2, in_open_page[:, None, :, None].expand(-1, heads, -1, head_dim)))
    count = packed.shape[2]
    dense[:, :, :count] = torch.where((position < sealed)[:, None, :count, None], packed, dense[:, :, :count])
    put_first(dense, side._replace(first=first, first_at=first_at))
    return dense.masked_fill_((position >= sealed + lengths[:, 1:])[:, None, :, None], 0.0)


@multiply_out.register_fake
def _(codec: str, planes: object, tail: torch.Tensor, *args: Any) -> torch.Tensor:
    max_length = args[-1]
    return tail.new_empty(tail.shape[0], tail.shape[1], max_length, tail.shape[3])


@library.custom_op("kvquant_hf::dense_attention", mutates_args=())
def compiled_dense_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """``ops.dense_attention`` for graphs: a first prompt that is compiled, with a softcap or sinks."""
    options = {"scale": scale, "causal": causal, "mask": mask, "softcap": softcap, "sinks": sinks}
    return dense_attention(query, keys, values, **options)  # type: ignore[arg-type]  # a dict of unlike values


@compiled_dense_attention.register_fake
def _(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *args: object) -> torch.Tensor:
    return query.new_empty(*query.shape[:3], values.shape[3])
