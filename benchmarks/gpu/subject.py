"""What is measured: attention over packed pages and appending to them, called as the cache calls them.

The one place that imports the interface.  Pages hold encoded random vectors, and a sequence's pages lie anywhere in the
pool, as they do after a while of serving.
"""

from typing import Literal, NamedTuple

import torch

from kvquant_hf.policies.table import parse_policy
from kvquant_hf.triton_kernels.codecs import CODECS, Codec
from kvquant_hf.triton_kernels.ops import PagedSide, append_pages, paged_attention

from .plan import DTYPE, PAGE, Cell

__all__ = ["Packed", "agrees", "append", "attend", "pack", "random_query", "random_vectors"]

Implementation = Literal["auto", "triton", "reference"]
# Pages that are really encoded; the pool repeats them.  Kernels see other addresses, which is what costs time.
_ENCODED = 64


class Packed(NamedTuple):
    """A layer's cache: both sides, ``page_table`` int32 ``[batch, pages]``, ``lengths`` int32 ``[batch, 2]``."""

    keys: PagedSide
    values: PagedSide
    page_table: torch.Tensor
    lengths: torch.Tensor


def random_vectors(*shape: int, device: torch.device, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    """Normal vectors with a bias per channel, as keys have them; ``shape`` ends with head_dim."""
    # In place: these are the largest tensors of a run.
    return torch.randn(shape, device=device, dtype=dtype).add_(torch.randn(shape[-1], device=device, dtype=dtype))


def random_query(cell: Cell, queries: int, device: torch.device) -> torch.Tensor:
    """``[batch, query_heads, queries, head_dim]``, long enough for a few keys to take most of the weight.

    Over many keys that weigh the same the values average out, and a result would hardly show which of them were read.
    """
    return 3 * torch.randn(cell.batch, cell.shape.query_heads, queries, cell.shape.head_dim, device=device, dtype=DTYPE)


def _side(codec: Codec, cell: Cell, pages: int, device: torch.device) -> PagedSide:
    heads, dim = cell.shape.kv_heads, cell.shape.head_dim
    encoded = min(pages, _ENCODED)
    planes = []
    for plane in codec.encode(random_vectors(encoded, heads, PAGE, dim, device=device)):
        planes.append(plane.repeat(-(-pages // encoded), *[1] * (plane.dim() - 1)).contiguous())
    return PagedSide(codec, planes, random_vectors(cell.batch, heads, PAGE, dim, device=device), PAGE)


def pack(policy: str, cell: Cell, device: torch.device, *, held: int = PAGE, spare: int = 0) -> Packed:
    """A filled cache of one layer.

    Args:
        policy: as ``parse_policy`` takes it.
        cell: shapes; ``cell.sealed`` pages of each sequence are sealed.
        device: where.
        held: tokens in the open page, 1 to ``PAGE``.
        spare: entries of the page table, each with a page of its own, behind the sealed ones of a sequence.
    """
    parsed = parse_policy(policy)
    width = cell.sealed + spare
    pages = max(cell.batch * width, 1)
    keys, values = (_side(CODECS[codec], cell, pages, device) for codec in (parsed.keys, parsed.values))
    table = torch.randperm(pages, device=device)[: cell.batch * width].view(cell.batch, width).int()
    lengths = torch.tensor([[cell.sealed, held]] * cell.batch, dtype=torch.int32, device=device)
    return Packed(keys, values, table, lengths)


def attend(query: torch.Tensor, packed: Packed, impl: Implementation = "triton") -> torch.Tensor:
    """Causal attention of ``query`` ``[batch, query_heads, queries, head_dim]``, its own tokens included in pages."""
    scale = query.shape[-1] ** -0.5
    return paged_attention(query, packed.keys, packed.values, packed.page_table, packed.lengths, scale=scale, impl=impl)


def append(new: torch.Tensor, packed: Packed, new_lengths: torch.Tensor, impl: Implementation = "triton") -> None:
    """Store ``new`` ``[batch, kv_heads, tokens, head_dim]`` as keys and as values.

    ``packed.lengths`` stays as it is, so that the same call can be repeated.
    """
    append_pages(new, new, packed.keys, packed.values, packed.page_table, packed.lengths, new_lengths, impl=impl)


def agrees(result: torch.Tensor, reference: torch.Tensor) -> str | None:
    """Why ``result`` is not ``reference`` up to the rounding of its dtype, or None if it is.

    Query, weights and output are rounded to 16 bits once each, and values that are counted from an offset cancel up to
    four times their own size: twelve unit roundoffs of the result's norm in all.  A wrong page or scale is off by a
    third of it and more.
    """
    unit = torch.finfo(result.dtype).eps / 2
    error = (result.double() - reference.double()).norm() / reference.double().norm()
    if not error <= 12 * unit:
        return f"differs from the reference by {float(error):.1e} of its norm, {12 * unit:.1e} are allowed"
    return None
