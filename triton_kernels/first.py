"""The first tokens of sequences, read as they came and not from their page: where they lie, in plain torch."""

import torch

from .pages import PagedSide


class FirstTokens:
    """Where they lie, for ``[batch, n]`` tokens that ``side`` may have (see ``PagedSide``).

    ``position``, int64 ``[batch, n]``, are their positions, and ``there``, bool ``[batch, n]``, which of them exist:
    none of a sequence that has none, else those up to the end of the page in which the first of them lies.
    """

    def __init__(self, side: PagedSide) -> None:
        assert side.first is not None and side.first_at is not None
        at = side.first_at.long().unsqueeze(-1)  # [batch, 1]
        self._begin, count = at, side.first.shape[2]
        self._end = torch.minimum(at + count, (at // side.page_size + 1) * side.page_size)
        self.position = at + torch.arange(count, device=at.device)
        self.there = (at >= 0) & (self.position < self._end)

    def replaces(self, token: torch.Tensor) -> torch.Tensor:
        """Whether tokens at the positions ``token`` ``[count]`` are not read in pages; ``[batch, 1, 1, count]``."""
        return ((token >= self._begin) & (token < self._end))[:, None, None]

    def by_head(self, seen: torch.Tensor | None) -> torch.Tensor | None:
        """What is seen, ``[batch, queries, n]``, beside ``[batch, heads, group, queries, n]``."""
        return None if seen is None else seen[:, None, None]

    def of_each(self, mask: torch.Tensor) -> torch.Tensor:
        """The columns of these tokens, ``[batch, heads or 1, queries or 1, n]``, of a mask for all tokens."""
        places = self.position.clamp(0, mask.shape[-1] - 1)[:, None, None].expand(-1, *mask.shape[1:3], -1)
        return mask.expand(len(places), -1, -1, -1).gather(-1, places)

    def rows(self, side: PagedSide, dtype: torch.dtype) -> torch.Tensor:
        """The tokens of keys or values, ``[batch, heads, n, head_dim]``, zeros where there are none: memory is whatever
        it was there, and zero times that may be no number."""
        assert side.first is not None
        return side.first.to(dtype).masked_fill(~self.there[:, None, :, None], 0.0)


def put_first(dense: torch.Tensor, side: PagedSide) -> None:
    """Write the first tokens of ``side`` to their places in ``dense`` ``[batch, heads, tokens, head_dim]``."""
    if side.first is None or dense.shape[2] == 0:
        return
    # Those that do not exist are the last one that does, written twice; without any, what is there already.
    first, shape = FirstTokens(side), side.first.shape
    last = first.there.sum(-1, keepdim=True) - 1  # [batch, 1]
    within = torch.minimum(torch.arange(shape[2], device=dense.device), last.clamp(min=0))
    rows = side.first.gather(2, within[:, None, :, None].expand(shape))
    places = first.position.gather(1, within).clamp(min=0)[:, None, :, None].expand(shape)
    dense.scatter_(2, places, torch.where((last >= 0)[:, None, :, None], rows, dense.gather(2, places)))
