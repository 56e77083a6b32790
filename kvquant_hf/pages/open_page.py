"""The open page of a store, and what is held beside it while nothing is sealed."""

import torch

from .layout import StoreLayout
from .pool import PagePool
from .table import PageTable


class OpenPage(StoreLayout):
    """The part of a ``PagedStore`` that has its open pages; ``loose`` is what they are to hold, see ``append_open``."""

    pool: PagePool
    table: PageTable
    loose: tuple[torch.Tensor, torch.Tensor] | None
    tail_length: int
    version: int
    _lengths: torch.Tensor | None
    _tail_shared: bool

    @property
    def sealed_pages(self) -> int:
        """Sealed pages per sequence."""
        return self.table.ids.shape[1]

    @property
    def _tail(self) -> tuple[torch.Tensor, ...]:
        """The open pages of keys and values, ``[batch, heads, page_size, dim]``; what is held beside them goes in."""
        if self.loose is not None:
            for tail, loose in zip(self._open, self.loose, strict=True):
                tail[:, :, : self.tail_length] = loose
            self.loose = None
        return self._open

    @_tail.setter
    def _tail(self, tails: tuple[torch.Tensor, ...]) -> None:
        self._open, self.loose = tails, None
        self.pool.made_of_planes.pop(self, None)

    def append_open(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Store new tokens where no page is sealed yet and they fit into the open one, as quickly as that can be done:
        beside it, in one tensor each, until somebody asks for the open page.

        Args:
            keys: ``[batch, heads, tokens, key_dim]``.
            values: ``[batch, heads, tokens, value_dim]``.

        Returns:
            All keys and values that are held, ``[batch, heads, length, dim]``, not to be written.  None if this is not
            the place for them; nothing is stored then.
        """
        held, loose, length = self.tail_length, self.loose, self.tail_length + keys.shape[2]
        if length > self.page_size or self.dtypes != (keys.dtype, values.dtype):
            return None
        if loose is None:
            if self.sealed_pages or self._tail_shared:
                return None
            loose = self._open[0][:, :, :held], self._open[1][:, :, :held]
        try:
            loose = torch.cat((loose[0], keys), 2), torch.cat((loose[1], values), 2)
        except RuntimeError:  # of another shape or device, which append() says in words
            return None
        if loose[1].shape[2] != length:
            return None
        self.loose, self._lengths, self.tail_length, self.version = loose, None, length, self.version + 1
        return loose
