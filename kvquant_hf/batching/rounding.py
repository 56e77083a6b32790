"""New tokens into pages; keys of pages that they complete are rounded in the metric of a calibration, if there is one.

A page may be shared by requests with other queries, so those of none of them count: who reads a page finds what it
would have made of it.
"""

import torch

from ..pages.layout import StoreLayout, without_autocast
from ..pages.table import to_device
from ..triton_kernels.ops import Implementation, PagedSide, append_pages, round_keys
from .step import Group


def append(
    new: tuple[torch.Tensor, torch.Tensor],
    sides: tuple[PagedSide, PagedSide],
    group: Group,
    lane: int,
    layout: StoreLayout,
    impl: Implementation,
) -> None:
    """Store the new tokens of a group in one layer.

    Args:
        new: keys and values ``[rows, heads, new, head_dim]``.
        sides: the pages, with the open ones of the group.
        group: which rows.
        lane: of the layer.
        layout: what the layer stores.
        impl: what is to run.

    Raises:
        ImplementationError: the implementation that was asked for cannot run.
    """
    metric = layout.fixed_metric() if group.sealing.size else None
    content = None if metric is None else _whole_pages(group, sides[0], new[0])
    append_pages(*new, *sides, group.tables[lane], group.lengths, group.after, impl=impl)
    if metric is not None and content is not None:
        pages = to_device(group.sealed[lane].reshape(len(content), -1), content.device)
        with without_autocast(content.device.type):
            round_keys(sides[0], content, pages, metric.expand(len(content), -1, -1, -1), impl=impl)


def _whole_pages(group: Group, side: PagedSide, new: torch.Tensor) -> torch.Tensor:
    """What the pages that a group seals will hold, ``[rows that seal, heads, count * page_size, head_dim]``."""
    rows = to_device(group.sealing, new.device)
    tokens = group.sealed[0].size // group.sealing.size * side.page_size
    tail = side.tail.index_select(0, rows)[:, :, : group.held]
    return torch.cat((tail, new.index_select(0, rows)[:, :, : tokens - group.held]), 2)
