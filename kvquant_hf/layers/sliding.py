"""A layer with a sliding window: pages of its last tokens only.

    window 40, page_size 16, tokens 0 to 149 seen: token 150 will see tokens 111 to 150

    given back   pages 0 to 5
    held                       page 6   | page 7     | page 8     | open page
                               96 . 111 | 112 .. 127 | 128 .. 143 | 144 .. 149

What the next token sees begins somewhere in the first page held: attention gets whole pages, and the mask that
transformers builds for them (it asks for their first position) hides the rest.

Pages are given back at the start of the next step, not at the end of the one that has outlived them.  So every query of
a long chunk sees its whole window, what a step returned stays readable until the next, and the tokens of the last step
can be taken back.  Decoding that takes back more (speculation over several steps) asks for it by
``activate_past_recording``: nothing is then given back before the next ``crop``.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import RollbackError
from ..pages.budget import Pool
from ..pages.layout import plain_tensors
from ..pages.store import PagedStore
from .paged import PagedLayer


class SlidingStore(PagedStore):
    """A ``PagedStore`` that gives pages back at the front; ``dropped_pages`` per sequence so far."""

    SAVED = (*PagedStore.SAVED, "dropped_pages")
    dropped_pages = 0

    def drop_front(self, count: int, capacity: int) -> None:
        """Give back the ``count`` oldest sealed pages; a pool of more than ``capacity`` pages is made smaller."""
        self.dropped_pages += count
        self.first = self.first.give_back(count * self.page_size)
        self.table.keep(count, self.sealed_pages)
        self._lengths = None
        if self.pool.capacity > capacity:
            self.table.compact()
        self.version += 1

    def clear(self) -> None:
        super().clear()
        self.dropped_pages = 0


class SlidingPagedLayer(PagedLayer):
    """A ``PagedLayer`` that holds the last ``window`` tokens and at most one page more than they need.

    Args:
        window: tokens that a query sees, itself included.
        arguments: those of ``PagedLayer``.
    """

    store: SlidingStore | None
    store_type = SlidingStore

    def __init__(self, window: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.window = self.held_window = window
        self.record_past = False

    @property
    def length(self) -> int:
        """Tokens seen, those given back included."""
        return self.first + super().length

    @property
    def first(self) -> int:
        """Position of the first token held."""
        return 0 if self.store is None else self.store.dropped_pages * self.page_size

    @property
    def first_of_next_step(self) -> int:
        """Position of the first token that the next step attends to."""
        if self.store is None or self.record_past:
            return self.first
        return self.first + self._outlived() * self.page_size

    @property
    def dense_bytes(self) -> int:
        """Bytes of the tokens that the next one sees, in the model's dtype."""
        if self.store is None or self.store.length == 0:
            return 0
        return self.store.dense_bytes() * min(self.window - 1, self.length) // self.store.length

    def _outlived(self) -> int:
        """Sealed pages of which the next token sees nothing."""
        assert self.store is not None
        pages = _first_seen(self.length, self.window) // self.page_size - self.store.dropped_pages
        return min(max(0, pages), self.store.sealed_pages)

    def pages_for(self, batch: int, tokens: int) -> dict[Pool, int]:
        """As of ``PagedLayer``; pages that the step gives back first or never makes are not needed."""
        saved = self._skipped(tokens)
        if self.store is not None and self.store.length and not self.record_past:
            saved = self._outlived()
        return {pool: max(0, n - batch * saved) for pool, n in super().pages_for(batch, tokens).items()}

    def _skipped(self, tokens: int) -> int:
        """Pages that a first prompt of so many tokens never makes: it is attended to as it came, and no later token
        sees them."""
        exact = self.exact_prefill and self.length == 0 and tokens > 1 and not self.record_past
        return _first_seen(tokens, self.window) // self.page_size if exact else 0

    def _trim(self) -> None:
        if self.store is not None and (pages := self._outlived()):
            with plain_tensors():
                # What the window needs, a page that is being filled, and what the pool takes in advance.
                capacity = self.store.batch_size * (-(-self.window // self.page_size) + 1)
                self.store.drop_front(pages, capacity + capacity // 32)

    def _write(self, keys: torch.Tensor, values: torch.Tensor, exact: bool) -> None:
        assert self.store is not None
        if self.record_past:
            return super()._write(keys, values, exact)
        self._trim()
        skipped, first = self._skipped(keys.shape[2]), self.store.first
        if skipped:
            self.store.first = first.skip(skipped * self.page_size, self._padding_of(keys))
        self.store.dropped_pages += skipped
        keys, values = (x[:, :, skipped * self.page_size :] for x in (keys, values))
        try:
            super()._write(keys, values, exact)
        except BaseException:
            self.store.dropped_pages -= skipped
            self.store.first = first
            raise

    def check_drop(self, count: int) -> None:
        left = self.length - count
        if left > 0 and self.first > _first_seen(left, self.window):
            raise RollbackError(
                f"cannot take back {count} tokens: the window of {self.window} tokens before them begins at token "
                f"{_first_seen(left, self.window)}, and pages before {self.first} are given back; call "
                "cache.activate_past_recording() before the tokens that may be taken back, or cache.reset() and read "
                "the text again."
            )

    def drop(self, count: int) -> None:
        """Drop the last ``count`` tokens.

        Raises:
            RollbackError: tokens that the next one would see have been given back; nothing is dropped.
        """
        self.check_drop(count)
        if self.store is not None and count >= self.length:
            self.store.clear()
        else:
            super().drop(count)

    def clear(self) -> None:
        super().clear()
        self.record_past = False

    def settle(self) -> None:
        """Give back what was kept for taking tokens back."""
        if self.record_past:
            self._trim()


def _first_seen(tokens: int, window: int) -> int:
    """First position that the token after ``tokens`` others sees."""
    return max(0, tokens - window + 1)
