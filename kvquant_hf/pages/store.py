"""The tokens of one layer: a page table over sealed pages, and one open page in the model's dtype.

    logical tokens   0 ........ 63 | 64 ....... 127 | 128 ... 150
    page table       page 7        | page 2         |               -> PagePool, packed planes
    open page                                       | 23 tokens     -> ``tail``, exact

The open page is sealed (quantized into the pool) by the first token that does not fit in it, not by the one that fills
it: the most recent 1 to ``page_size`` tokens are always exact, taking back the last few tokens is exact, and a chunk of
one page attends to exactly what the same tokens attend to one by one.  A sealed page is never written again.
"""

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import torch

from ..triton_kernels.codecs import Codec
from ..triton_kernels.ops import Implementation, PagedSide, append_pages, choose
from .budget import Claim
from .layout import plain_tensors, without_autocast
from .moments import Moments
from .open_page import OpenPage
from .padding import padded_pages, replace_new
from .parameters import in_pages
from .pool import PagePool, PlaneShape
from .queries import Fresh, SeenQueries
from .sinks import FirstTokens
from .table import PageTable, to_device
from .views import Footprint, StoreView


class PagedStore(OpenPage):
    """Keys and values of one layer.

    Args:
        keys: codec of the keys.
        values: codec of the values.
        page_size: tokens per page.
        like_keys: a key tensor ``[batch, heads, any, key_dim]`` whose shape, dtype and device the store adopts.
        like_values: the same for values.
        impl: what is to run on the pages.
        sinks: first tokens of each sequence that are read as they came, see ``sinks.py``.
        make_pool: called with the planes of a page and the device; a pool that other stores may draw from too.
        prior: moments of queries to begin with, see ``queries.py``; None: none.

    Raises:
        UnsupportedModelError: a head_dim that a codec cannot store.
        WrongModelError: a codec's planes per layer, or the prior, are of another shape.
        ImplementationError: ``impl`` cannot run on such pages.
    """

    SAVED: tuple[str, ...] = ("reopened_pages",)  # integer attributes that a saved store keeps

    def __init__(
        self,
        keys: Codec,
        values: Codec,
        page_size: int,
        like_keys: torch.Tensor,
        like_values: torch.Tensor,
        impl: Implementation = "auto",
        make_pool: Callable[[list[PlaneShape], torch.device], PagePool] = PagePool,
        sinks: int = 0,
        prior: Moments | None = None,
    ) -> None:
        self.first = FirstTokens.none(sinks, like_keys.shape[0], page_size)
        self.loose = None
        super().__init__(keys, values, page_size, like_keys, like_values, impl, prior)
        self.pool = make_pool(self.plane_shapes, like_keys.device)
        self.claim: Claim | None = None  # where the pages of the current step were promised
        self.table = PageTable(self.pool, like_keys.shape[0], like_keys.device)
        self._lengths, self._tail_shared = None, False
        self.seen = SeenQueries(*self.vectors[0], self.prior, like_keys.shape[0]) if keys.uses_queries else None
        self.tail_length = 0
        self.reopened_pages = 0
        self.version = 0
        # Into an open page on the CPU tokens are copied as quickly as kernels can be called to do it.
        self._copied = choose(impl, self.dtype, *self._sides()).name != "triton"

    # -- what it holds -------------------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """Tokens held per sequence."""
        return self.table.ids.shape[1] * self.page_size + self.tail_length

    @property
    def page_table(self) -> torch.Tensor:
        """int32 ``[batch, sealed_pages]`` on the store's device."""
        return self.table.on_device

    @property
    def lengths(self) -> torch.Tensor:
        """int32 ``[batch, 2]`` on the store's device: sealed pages and tokens in the open page of each sequence."""
        if self._lengths is None:
            lengths = np.array([[self.sealed_pages, self.tail_length]] * self.batch_size, dtype=np.int32)
            self._lengths = to_device(lengths.reshape(-1, 2), self.device)
        return self._lengths

    def view(self) -> StoreView:
        """The current content, for attention."""
        return StoreView(*self._sides(), self.page_table, self.lengths, self.tail_length)

    def _sides(
        self, tails: tuple[torch.Tensor, ...] | None = None, first: FirstTokens | None = None
    ) -> tuple[PagedSide, PagedSide]:
        """Keys and values with these open pages and ``first``; a snapshot: another fork may make the pool grow."""
        first = first or self.first
        if tails is not None or self.pool.offloads:
            return self.sides(tuple(self.pool.planes), self._tail if tails is None else tails, first.tensors)
        tails = self._tail
        sides: tuple[PagedSide, PagedSide] | None = self.pool.made_of_planes.get(self)
        if sides is None or sides[0].first_at is not first.tensors[2]:
            with self.pool.lock:  # not while another thread moves the planes
                sides = self.pool.made_of_planes[self] = self.sides(tuple(self.pool.planes), tails, first.tensors)
        return sides

    def saturated_pages(self, last: int | None = None) -> int:
        """Pages held, each once, or of the ``last`` of each sequence, whose scales are at the end of their range."""
        ids = self.table.ids if last is None else self.table.ids[:, self.sealed_pages - last :]
        return self.saturated(self.pool.lying, ids[0] if len(ids) == 1 else np.unique(ids))

    def footprint(self) -> Footprint:
        """Bytes held, measured on the tensors."""
        tables = self.table.nbytes + self.lengths.nbytes
        tables += sum(parameter.nbytes for codec in self.codecs for parameter in codec.parameters)
        tables += self.seen.nbytes if self.seen else 0
        return Footprint.of(self.pool, self.table.ids, self._exact_bytes, tables)

    @property
    def _exact_bytes(self) -> int:
        return sum(tail.untyped_storage().nbytes() for tail in self._tail) + self.first.nbytes

    def devices(self) -> Counter[str]:
        """Bytes of the pool and the open page by the device on which they lie."""
        here = self.pool.device_bytes + self._exact_bytes
        return Counter({str(self.device): here}) + Counter(cpu=self.pool.host_bytes)

    def dense_bytes(self) -> int:
        """Bytes that the same tokens take in the model's dtype."""
        return self.batch_size * self.length * self.dense_bytes_per_token()

    # -- appending -----------------------------------------------------------------------------------------------------

    def pages_for(self, tokens: int) -> int:
        """Pages that storing ``tokens`` more tokens of every sequence takes from the pool, at most."""
        return self.batch_size * max(0, (self.tail_length + tokens - 1) // self.page_size)

    def append(self, keys: torch.Tensor, values: torch.Tensor, padding: np.ndarray | None = None) -> None:
        """Store new tokens after those held; on an error the store is as before.

        Args:
            keys: ``[batch, heads, tokens, key_dim]``, any strides.
            values: ``[batch, heads, tokens, value_dim]``.
            padding: bool ``[batch, tail_length + tokens]``, which tokens of the open page and of the new ones are
                padding; None if none is.

        Raises:
            CacheMismatchError: see :meth:`check`.
            OutOfPages: the pool's budget has no more.
        """
        keys, values = self.fitted(keys, values)
        held, length = self.tail_length, self.tail_length + keys.shape[2]
        if length <= self.page_size and not self._tail_shared and self._copied:
            (tail_keys, tail_values), self._lengths = self._tail, None
            tail_keys[:, :, held:length] = keys
            tail_values[:, :, held:length] = values
            self.tail_length, self.version = length, self.version + 1
            return
        with plain_tensors():
            self._append(keys, values, length, padding)

    def _append(self, keys: torch.Tensor, values: torch.Tensor, length: int, padding: np.ndarray | None) -> None:
        """:meth:`append`, by the kernels; ``length``: tokens of the open page and new ones."""
        lengths = torch.empty_like(self.lengths)
        if length <= self.page_size and not self._tail_shared:
            append_pages(keys, values, *self._sides(), self.page_table, self.lengths, lengths, impl=self.impl)
            self._lengths, self.tail_length, self.version = lengths, length, self.version + 1
            return
        count = max(0, (length - 1) // self.page_size)  # lazily: see the module's docstring
        # Another open page instead of the old one overwritten: what stops this half way leaves the store as it was.
        tails = tuple(tail.clone() for tail in self._tail)
        before = self._tail[0]
        blank = None if padding is None else padded_pages(padding[:, : count * self.page_size], self.page_size)
        held, start = self.tail_length, self.sealed_pages * self.page_size
        first, unread = self.first.seal(tails, (keys, values), held, start, count, padding)
        if unread is not None:
            content = zip((keys, values), tails, strict=True)
            keys, values = (replace_new(x, tail, held, unread, self.page_size) for x, tail in content)
            before = tails[0].clone()
        with self.pool.lock, without_autocast(self.device.type):
            pages = self.table.take(count, blank, self.claim)
            try:
                on_device, sides = self.table.followed_by(pages), self._sides(tails, first)
                append_pages(keys, values, *sides, on_device, self.lengths, lengths, impl=self.impl)
            except BaseException:
                self.pool.release(pages)
                raise
            self.table.append(pages, blank, on_device)
            self._lengths, self._tail, self.first = lengths, tails, first
            self.tail_length = length - count * self.page_size
            if not self.pool.offloads:
                self.pool.made_of_planes[self] = sides  # under the lock: else of planes that are moved by now
        self._tail_shared = False
        self.version += 1
        if self.seen is not None and count:
            self.seen.sealed(Fresh(self.version, before, held, keys, on_device[:, -count:].long()))

    def round_keys(self) -> None:
        if self.seen is not None:
            with self.pool.lock:  # a pool that grows meanwhile would keep the codes of before
                self.seen.round(self.version, self._sides()[0], self.impl)

    # -- everything that only moves table entries ----------------------------------------------------------------------

    def crop(self, count: int) -> None:
        """Drop the last ``count`` tokens.  Within the open page this is exact; a sealed page that must be cut is
        decoded once into the open page (``reopened_pages`` counts them)."""
        self._tail = self._tail  # what is held beside it goes in
        pages, rest = divmod(max(0, self.length - count), self.page_size)
        if count > self.tail_length:
            if rest:
                self._tail, self._tail_shared = self.view().opened(pages, rest), False
                self.reopened_pages += self.batch_size
            self.first = self.first.crop(pages * self.page_size, self._tail if rest else ())
            self.tail_length = rest
            self.table.keep(0, pages)
        else:
            self.tail_length -= count
        self._lengths = None
        self.version += 1

    def select(self, indices: torch.Tensor) -> None:
        """Make sequence ``indices[i]`` the new sequence i; ``indices`` is anything that a tensor takes as an index.
        Sealed pages are shared, the open page is copied."""
        rows = torch.arange(self.batch_size)[indices.cpu()]
        tail = tuple(tail.index_select(0, rows.to(self.device)) for tail in self._tail)
        self.table.select(rows.numpy())
        if self.seen is not None:
            self.seen.select(rows)
        self._tail, self._tail_shared, self._lengths = tail, False, None
        self.first = self.first.select(rows)
        self.version += 1

    def fork(self) -> "PagedStore":
        """A second store with the same tokens.  Pages are shared; the open page is copied by whoever writes first."""
        twin = object.__new__(type(self))
        self._tail = self._tail  # what is held beside it goes in, once
        twin.__dict__.update(self.__dict__)
        twin.table, twin.claim, twin.seen = self.table.fork(), None, self.seen and self.seen.fork()
        self._tail_shared = twin._tail_shared = True
        return twin

    def clear(self) -> None:
        """Drop all tokens and give the pages back."""
        self.tail_length, self._lengths, self.loose = 0, None, None
        self.seen = self.seen and self.seen.empty(self.batch_size)
        self.table.keep(0, 0)
        self.first = FirstTokens.none(self.first.count, self.batch_size, self.page_size)
        self.version += 1

    def restore(self, tensors: Mapping[str, torch.Tensor], integers: Mapping[str, int]) -> None:
        """Hold what ``layer_state.snapshot`` took from another store; this one is new, and nothing is checked."""
        table, count = tensors["table"].numpy().copy(), tensors["keys.open"].shape[2]
        pages = self.pool.allocate(int(table.max(initial=-1)) + 1)
        for name, side in zip(("keys", "values"), self._sides(), strict=True):
            for plane, rows in zip(in_pages(side.codec, side.head_dim), side.planes, strict=False):
                rows.copy_(tensors[f"{name}.{plane.name}"])
            side.tail[:, :, :count] = tensors[f"{name}.open"]
        self.table.adopt(table, pages)
        self._lengths, self.tail_length = None, count
        self.first = self.first.restore(tensors, self.device)
        vars(self).update(integers)

    def __deepcopy__(self, memo: dict[int, object]) -> "PagedStore":
        return self.fork()
