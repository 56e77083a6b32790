"""The first tokens of each sequence as they came, beside the page in which they lie.

    page 0       t1 t1 t2 t3 ... t63      sealed: t0 takes no part in its scales, and its place holds a copy of t1
    first        t0                       in the model's dtype, [batch, heads, sinks, head_dim]
    first_at     0                        where attention reads t0 instead of what the page holds

The first token of a text takes much of what attention gives, whatever it says (StreamingLLM, arXiv:2309.17453), with
keys unlike all others: quantized it costs more than the rest of the page, and it stretches the ranges of the others.
``sinks`` tokens of each sequence are kept so, from the first one on that is no padding, as far as its page reaches.

Nothing here is written again: a change makes another ``FirstTokens``, and forks go on with the one they have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .table import to_device

_NOT_YET, _GONE = -1, -2  # still to come or in the open page; given back with a window, or never held

Tensors = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
NOTHING: Tensors = (None, None, None)


class FirstTokens:
    """What one store holds so.

    Args:
        count: ``sinks``.
        at: int32 ``[batch]``: position, among the tokens held, of the first of them; negative where none are held.
        rows: keys and values, ``[batch, heads, count, head_dim]`` contiguous; None while no sequence has any.
        page_size: tokens per page.
    """

    def __init__(
        self, count: int, at: np.ndarray, rows: tuple[torch.Tensor, torch.Tensor] | None, page_size: int
    ) -> None:
        held = rows is not None and bool((at >= 0).any())
        self.count, self.at, self._page = count, at.astype(np.int32, copy=False), page_size
        self.rows = rows if held else None
        self._wanted = count > 0 and bool((at == _NOT_YET).any())
        # As ``PagedSide`` has them: keys, values, positions.
        self.tensors: Tensors = NOTHING
        if self.rows is not None:
            self.tensors = (*self.rows, to_device(self.at.copy(), self.rows[0].device))

    @classmethod
    def none(cls, count: int, batch: int, page_size: int) -> FirstTokens:
        """Those of an empty store."""
        return cls(count, np.full(batch, _NOT_YET, np.int32), None, page_size)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(x.nbytes for x in self.tensors if x is not None)

    def _with(self, at: np.ndarray, rows: tuple[torch.Tensor, torch.Tensor] | None = None) -> FirstTokens:
        return FirstTokens(self.count, at, rows or self.rows, self._page)

    def seal(
        self,
        tails: Sequence[torch.Tensor],
        new: Sequence[torch.Tensor],
        held: int,
        start: int,
        pages: int,
        padding: np.ndarray | None,
    ) -> tuple[FirstTokens, np.ndarray | None]:
        """Those once ``pages`` more pages are sealed.

        Args:
            tails: open pages of keys and of values, with ``held`` tokens.
            new: what follows them, ``[batch, heads, tokens, head_dim]``.
            held: tokens in the open page.
            start: position of the open page's first token.
            pages: pages of each sequence.
            padding: bool ``[batch, held + tokens]``: which of the tokens are padding; None if none is.

        Returns:
            Them, and which tokens, of the first of these pages, take no part in the scales: first tokens and padding,
            bool ``[batch, some pages * page_size]``; None if all do.
        """
        if not pages or (padding is None and not self._wanted):
            return self, None
        shape = len(self.at), pages, self._page
        padding = np.zeros(shape, bool) if padding is None else padding[:, : pages * self._page]
        padding = padding.reshape(len(self.at), -1)
        fresh = ~padding.all(1) & (self.at == _NOT_YET) & (self.count > 0)
        begin = padding.argmin(1)  # the first that is none
        end = np.minimum(begin + self.count, (begin // self._page + 1) * self._page)
        token = np.arange(padding.shape[1])
        unread = padding | (fresh[:, None] & (token >= begin[:, None]) & (token < end[:, None]))
        # A page of nothing else has its scales from them.
        alone = np.repeat(unread.reshape(shape).all(-1), self._page, 1)
        unread = np.where(alone, padding, unread)
        some = -(-(int(np.flatnonzero(unread.any(0)).max(initial=-1)) + 1) // self._page) * self._page
        later = unread[:, :some] if some else None
        if not fresh.any():
            return self, later
        places = np.minimum(begin[:, None] + np.arange(self.count), end[:, None] - 1)  # [batch, count]
        places = np.where(fresh[:, None], places, 0)
        rows, last = [], max(held, int(places.max()) + 1)
        for i, (tail, x) in enumerate(zip(tails, new, strict=True)):
            content = torch.cat([tail[:, :, :held], x[:, :, : last - held]], 2)
            where = to_device(places, content.device)[:, None, :, None]
            found = content.gather(2, where.expand(-1, content.shape[1], -1, content.shape[3]))
            if self.rows is not None:
                found = torch.where(to_device(fresh, content.device)[:, None, None, None], found, self.rows[i])
            rows.append(found)
        return self._with(np.where(fresh, begin + start, self.at), (rows[0], rows[1])), later

    def crop(self, kept: int, tails: Sequence[torch.Tensor]) -> FirstTokens:
        """Those once what was sealed from the position ``kept`` on is no more, or is in the open pages ``tails`` again,
        of which it is the first: they are put there."""
        back = self.at >= kept
        if not back.any():
            return self
        for tail, rows in zip(tails, self.rows or (), strict=False):
            for b in np.flatnonzero(back):
                place = int(self.at[b]) - kept
                if place < self._page:
                    some = min(self.count, self._page - place)
                    tail[b, :, place : place + some] = rows[b, :, :some]
        return self._with(np.where(back, _NOT_YET, self.at))

    def select(self, rows: torch.Tensor) -> FirstTokens:
        """Those of the sequences ``rows``, int64 on the CPU."""
        kept = self.rows
        if kept is not None:
            there = rows.to(kept[0].device)
            kept = kept[0].index_select(0, there), kept[1].index_select(0, there)
        return self._with(self.at[rows.numpy()], kept)

    def give_back(self, tokens: int) -> FirstTokens:
        """Those once the oldest ``tokens`` tokens are given back."""
        moved = np.where(self.at >= tokens, self.at - tokens, _GONE)
        return self._with(np.where(self.at >= 0, moved, self.at))

    def skip(self, tokens: int, padding: np.ndarray | None) -> FirstTokens:
        """Those once the first ``tokens`` tokens, of which none are held, are never held; ``padding``, bool ``[batch,
        tokens or more]``, says which of them, and what follows, are padding."""
        begun = np.ones(len(self.at), bool) if padding is None else ~padding[:, :tokens].all(1)
        return self._with(np.where(begun & (self.at == _NOT_YET), _GONE, self.at))

    def saved(self) -> dict[str, torch.Tensor]:
        """What :meth:`restore` takes: ``first_at``, int32 ``[batch]``, and, if there are any, ``keys.first`` and
        ``values.first``, ``[batch, heads, sinks, head_dim]``; nothing without ``sinks``."""
        tensors = {"first_at": torch.from_numpy(self.at.copy())} if self.count else {}
        if self.rows is not None:
            tensors |= {"keys.first": self.rows[0], "values.first": self.rows[1]}
        return tensors

    def restore(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> FirstTokens:
        """Those that ``saved`` gave, on ``device``."""
        if "first_at" not in tensors:
            return self
        rows = None
        if "keys.first" in tensors:
            rows = tensors["keys.first"].clone().to(device), tensors["values.first"].clone().to(device)
        return self._with(tensors["first_at"].numpy().copy(), rows)
