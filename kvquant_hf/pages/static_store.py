"""The tokens of one layer in memory that is reserved once: for ``torch.compile`` and CUDA graphs.

    page table       page 0  | page 1  | page 2  | page 3      reserved for max_length tokens, every page of its own
    lengths          2 sealed, 23 open                         on the device, changed there
    open page        23 tokens                                 one buffer

Pages are sealed as in ``store.py``, and hold the same bytes.  What differs is who knows how many there are: a step
reads ``lengths`` and writes them on the device, so that the same graph can be replayed for every token, and no tensor
is ever replaced, so that its address stays what the graph has recorded.  Whatever asks for a number of tokens in Python
waits for the device.
"""

from collections import Counter
from typing import NamedTuple

import torch

from ..errors import StaticCacheError
from ..triton_kernels.codecs import Codec
from ..triton_kernels.ops import Implementation, PagedSide, append_pages, choose, gather_dense
from .layout import StoreLayout, without_autocast
from .moments import Moments
from .sinks import NOTHING, FirstTokens
from .static_ops import begin_step, compiled_begin_step, compiled_round_first, round_first, tokens_of
from .views import Footprint


class StaticView(NamedTuple):
    """What attention reads; the tensors stay, their content changes with every step."""

    keys: PagedSide
    values: PagedSide
    page_table: torch.Tensor  # int32 [batch, (max_length - 1) // page_size]
    lengths: torch.Tensor  # int32 [batch, 2]: sealed pages, tokens in the open page


class StaticStore(StoreLayout):
    """Keys and values of one layer, at most ``max_length`` tokens of each sequence.

    Args:
        keys, values, page_size, like_keys, like_values, impl: as of ``PagedStore``.
        max_length: tokens that each sequence may have.
        sinks: first tokens of each sequence that are read as they came, see ``sinks.py``.  They are kept with the first
            prompt, in place of which the open page has others already; a prompt that is shorter keeps none.
        prior: moments of queries; keys of a first prompt are rounded by them, of which it is known how many there are.

    Raises:
        UnsupportedModelError: a head_dim that a codec cannot store.
        ImplementationError: ``impl`` cannot run on such pages.
    """

    def __init__(
        self,
        keys: Codec,
        values: Codec,
        page_size: int,
        like_keys: torch.Tensor,
        like_values: torch.Tensor,
        impl: Implementation,
        max_length: int,
        sinks: int = 0,
        prior: Moments | None = None,
    ) -> None:
        super().__init__(keys, values, page_size, like_keys, like_values, impl, prior)
        self.max_length = max_length
        batch, device = like_keys.shape[0], like_keys.device
        count = batch * ((max_length - 1) // page_size)  # the last page is sealed by a token that never comes
        planes = tuple(torch.empty(count, *shape, dtype=dtype, device=device) for dtype, shape in self.plane_shapes)
        self._pages = torch.arange(count, dtype=torch.int32, device=device).view(batch, count // batch)
        self.page_table = self._pages.clone()
        self.lengths = torch.zeros(batch, 2, dtype=torch.int32, device=device)
        self._before = torch.zeros(batch, 2, dtype=torch.int32, device=device)  # lengths when the step began
        self.reopened_pages = 0
        self._planes = planes
        self._first = tuple(x.new_zeros(*x.shape[:2], sinks, x.shape[3]) for x in self._open)
        self._first_at = torch.full((batch,), -1, dtype=torch.int32, device=device)
        first = (self._first[0], self._first[1], self._first_at) if sinks else NOTHING
        self._keys, self._values = self.sides(planes, self._open, first)
        self._view = StaticView(self._keys, self._values, self.page_table, self.lengths)
        # Pages, shape, dtype and device of what keys and values stand for.
        self.about = {
            name: (pages, torch.Size((*pages.tail.shape[:2], max_length, pages.head_dim)), pages.tail.dtype, device)
            for name, pages in (("keys", self._keys), ("values", self._values))
        }
        if not torch.compiler.is_compiling():  # marking cannot be traced; a first prompt is seldom compiled
            for tensor in (*planes, *self._exact, self.page_table, self.lengths, self._before):
                torch._dynamo.mark_static_address(tensor)
            choose(impl, self.dtype, self._keys, self._values)

    @property
    def _exact(self) -> tuple[torch.Tensor, ...]:
        """What is in the model's dtype, and where the first tokens of it are."""
        return (*self._open, *self._first, self._first_at)

    @property
    def held(self) -> torch.Tensor:
        """Tokens held, an int64 scalar on the device."""
        return tokens_of(self.lengths, self.page_size)[0]

    @property
    def length(self) -> int:
        """Tokens held per sequence; waits for the device."""
        return int(self.held)

    @property
    def sealed_pages(self) -> int:
        """Sealed pages per sequence; waits for the device."""
        return int(self.lengths[0, 0])

    def view(self) -> StaticView:
        """The content, for attention."""
        return self._view

    def append(self, keys: torch.Tensor, values: torch.Tensor, check: bool = True, first: bool = False) -> None:
        """Store new tokens after those held.

        Args:
            keys: ``[batch, heads, tokens, key_dim]``, any strides.
            values: ``[batch, heads, tokens, value_dim]``.
            check: whether to see to it that there is room; the layers of a cache are level, so one of them is enough.
            first: whether nothing is held.

        Raises:
            CacheFullError: there is no room; nothing has changed.
        """
        if check:
            compiling = torch.compiler.is_compiling()
            wait = not (keys.is_cuda if compiling else _capturing(keys))
            begin = compiled_begin_step if compiling else begin_step
            begin(self._before, self.lengths, keys.shape[2], self.page_size, self.max_length, wait)
        else:
            self._before.copy_(self.lengths)
        with without_autocast(keys.device.type):
            append_pages(
                keys,
                values,
                self._keys,
                self._values,
                self.page_table,
                self._before,
                self.lengths,
                impl=self.impl,
            )
            count = (keys.shape[2] - 1) // self.page_size
            if first and count and self.prior is not None:
                self._round(keys[:, :, : count * self.page_size], count, self.prior)

    def _round(self, keys: torch.Tensor, count: int, prior: Moments) -> None:
        """Round the first ``count`` pages, which hold ``keys``, by the ``prior``."""
        side, pages = self._keys, self.page_table[:, :count].long()
        run = compiled_round_first if torch.compiler.is_compiling() else round_first
        run(side.codec.name, list(side.planes), side.tail, keys, pages, *prior, self.impl)
        self.rounded_pages = count

    def keep_first(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the first tokens of a first prompt without padding; nobody waits for the device.

        Returns:
            The prompt as pages are to hold it: with copies of the token after them.
        """
        count = self._first[0].shape[2]
        if count == 0:
            return keys, values
        if keys.shape[2] < count:
            self._first_at.fill_(-1)
            return keys, values
        self._first_at.zero_()
        for first, x in zip(self._first, (keys, values), strict=True):
            first.copy_(x[:, :, :count])
        after = slice(count, count + 1)
        if keys.shape[2] == count:
            return keys, values
        new = [torch.cat([x[:, :, after].expand(-1, -1, count, -1), x[:, :, count:]], 2) for x in (keys, values)]
        return new[0], new[1]

    def hold_first(self, first: FirstTokens) -> None:
        """Keep ``first`` of a first prompt with padding."""
        self._first_at.copy_(torch.from_numpy(first.at))
        for held, rows in zip(self._first, first.rows or (), strict=False):
            held.copy_(rows)

    def crop(self, count: int) -> None:
        """Drop the last ``count`` tokens, as ``PagedStore.crop``."""
        held = self.length
        pages, rest = divmod(max(0, held - count), self.page_size)
        open_tokens = held - self.sealed_pages * self.page_size
        if count > open_tokens:
            self._crop_pages(pages, rest)
        else:
            self.lengths[:, 1] -= count
        # First tokens that are not all held any more are nothing but tokens of the open page.
        at, number = self._first_at.tolist(), self._first[0].shape[2]
        for b, begin in enumerate(at):
            end = min(begin + number, (begin // self.page_size + 1) * self.page_size)
            if number and begin >= 0 and end > held - count:
                for tail, first in zip(self._open, self._first, strict=True):
                    place = begin % self.page_size
                    tail[b, :, place : place + end - begin] = first[b, :, : end - begin]
                self._first_at[b] = -1

    def _crop_pages(self, pages: int, rest: int) -> None:
        """Keep ``pages`` sealed pages and ``rest`` tokens of the next one."""
        if rest:
            page = self.page_table[:, pages : pages + 1]
            for side in (self._keys, self._values):
                dense = gather_dense(side._replace(tail=side.tail[:, :, :0], first=None), page)
                side.tail[:, :, :rest] = dense[:, :, :rest]
            self.reopened_pages += self.batch_size
        self.lengths.copy_(self.lengths.new_tensor([pages, rest]))
        self.rounded_pages = min(self.rounded_pages, pages)
        self._part(pages)

    def _part(self, pages: int) -> None:
        """Give every sequence pages of its own from ``pages`` on, none of them among the first ``pages`` of any."""
        used = torch.isin(self._pages.flatten(), self.page_table[:, :pages].flatten())
        free = self._pages.flatten()[~used][: self.page_table[:, pages:].numel()]
        self.page_table[:, pages:] = free.view_as(self.page_table[:, pages:])

    def select(self, indices: torch.Tensor) -> None:
        """Make sequence ``indices[i]`` the new sequence i.  Sealed pages are shared, the open page is copied; reserved
        pages stay with the place that they are reserved for.

        Raises:
            StaticCacheError: another number of sequences.
        """
        rows = torch.arange(self.batch_size, device=self.device)[indices.to(self.device)]
        if len(rows) != self.batch_size:
            raise StaticCacheError(
                f"a static cache keeps its batch size, {self.batch_size}, and {len(rows)} sequences were selected; use "
                "a cache without static=True."
            )
        sealed = torch.arange(self.page_table.shape[1], device=self.device) < self.lengths[:, :1]
        self.page_table.copy_(torch.where(sealed, self.page_table[rows], self.page_table))
        for tensor in (*self._exact, self.lengths):
            tensor.copy_(tensor[rows])

    def clear(self) -> None:
        """Drop all tokens; the memory stays reserved."""
        self.lengths.zero_()
        self.rounded_pages = 0
        self._first_at.fill_(-1)
        self.page_table.copy_(self._pages)

    # -- for reports ---------------------------------------------------------------------------------------------------

    def dense_bytes(self) -> int:
        """Bytes that the same tokens take in the model's dtype."""
        return self.batch_size * self.length * self.dense_bytes_per_token()

    def saturated_pages(self) -> int:
        """As of ``PagedStore``."""
        return self.saturated(self._planes, self.page_table[:, : self.sealed_pages].unique().cpu().numpy())

    def footprint(self) -> Footprint:
        """Bytes held, measured on the tensors; what is reserved for tokens to come is unused."""
        planes = sum(plane.nbytes for plane in self._planes)
        page_bytes = planes // max(1, self._pages.numel())
        pages, holders = self.page_table[:, : self.sealed_pages].unique(return_counts=True)
        packed, shared = (int(n) * page_bytes for n in (pages.numel(), (holders > 1).sum()))
        open_page = sum(x.nbytes for x in self._exact)
        tables = sum(x.nbytes for x in (self._pages, self.page_table, self.lengths, self._before))
        most = int(holders.max()) if holders.numel() else 0
        return Footprint(packed, open_page, planes - packed, tables, shared, most)

    def devices(self) -> Counter[str]:
        """Bytes of the pages and the open page by the device on which they lie."""
        return Counter({str(self.device): sum(x.nbytes for x in (*self._planes, *self._exact))})


def _capturing(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being recorded, in which nobody may wait."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
