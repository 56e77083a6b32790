"""The tokens of one layer: a page table over sealed pages, and one open page in the model's dtype.

    logical tokens   0 ........ 63 | 64 ....... 127 | 128 ... 150
    page table       page 7        | page 2         |               -> PagePool, packed planes
    open page                                       | 23 tokens     -> ``tail``, exact

The open page is sealed (quantized into the pool) by the first token that does not fit in it, not by the one that fills
it: the most recent 1 to ``page_size`` tokens are always exact, taking back the last few tokens is exact, and a chunk of
one page attends to exactly what the same tokens attend to one by one.  A sealed page is never written again.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from .errors import BatchSizeError, CacheMismatchError, UnsupportedModelError
from .padding import padded_pages, replace_padding
from .paging import PagePool
from .triton_kernels.codecs import Codec
from .triton_kernels.ops import Implementation, PagedSide, append_pages, choose, gather_dense
from .views import Footprint, StoreView


class PagedStore:
    """Keys and values of one layer.

    Args:
        keys: codec of the keys.
        values: codec of the values.
        page_size: tokens per page.
        like_keys: a key tensor ``[batch, heads, any, key_dim]`` whose shape, dtype and device the store adopts.
        like_values: the same for values.
        impl: what is to run on the pages.

    Raises:
        UnsupportedModelError: a head_dim that a codec cannot store.
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
    ) -> None:
        self.codecs = (keys, values)
        self.page_size = page_size
        self.impl = impl
        planes = []
        for codec, like in zip(self.codecs, (like_keys, like_values), strict=True):
            heads, head_dim = like.shape[1], like.shape[3]
            if head_dim % codec.head_dim_multiple:
                raise UnsupportedModelError(
                    f"codec {codec.name!r} needs a head_dim that is a multiple of {codec.head_dim_multiple}, "
                    f"this model has {head_dim}; choose another policy."
                )
            planes += [(p.dtype or like.dtype, (heads, *p.shape(page_size))) for p in codec.planes(head_dim)]
        self.vectors = [(like.shape[1], like.shape[3]) for like in (like_keys, like_values)]  # heads, head_dim
        self.pool = PagePool(planes, like_keys.device)
        self._key_planes = len(keys.planes(like_keys.shape[3]))
        self._table = np.zeros((like_keys.shape[0], 0), dtype=np.int32)
        self._device_table: torch.Tensor | None = None
        self._lengths: torch.Tensor | None = None
        self._tail = tuple(
            like.new_empty(*like.shape[:2], page_size, like.shape[3]) for like in (like_keys, like_values)
        )
        self._tail_shared = False
        self._blank = -1  # a page of padding alone, as long as the table holds it
        self.tail_length = 0
        self.reopened_pages = 0
        self.version = 0
        choose(impl, self.dtype, *self.view()[:2])

    # -- what it holds -------------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self._table.shape[0]

    @property
    def sealed_pages(self) -> int:
        """Sealed pages per sequence."""
        return self._table.shape[1]

    @property
    def length(self) -> int:
        """Tokens held per sequence."""
        return self.sealed_pages * self.page_size + self.tail_length

    @property
    def device(self) -> torch.device:
        """Where the pages live."""
        return self._tail[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype, as the keys arrive."""
        return self._tail[0].dtype

    @property
    def page_table(self) -> torch.Tensor:
        """int32 ``[batch, sealed_pages]`` on the store's device."""
        if self._device_table is None:
            self._device_table = torch.from_numpy(self._table.copy()).to(self.device)
        return self._device_table

    @property
    def lengths(self) -> torch.Tensor:
        """int32 ``[batch, 2]`` on the store's device: sealed pages and tokens in the open page of each sequence."""
        if self._lengths is None:
            lengths = torch.tensor([[self.sealed_pages, self.tail_length]], dtype=torch.int32)
            self._lengths = lengths.repeat(self.batch_size, 1).to(self.device)
        return self._lengths

    def view(self) -> StoreView:
        """The current content, for attention."""
        keys, values = self._sides(self._tail)
        return StoreView(keys, values, self.page_table, self.lengths, self.tail_length)

    def _sides(self, tails: tuple[torch.Tensor, ...]) -> tuple[PagedSide, PagedSide]:
        """Keys and values with ``tails`` for open pages."""
        n, planes = self._key_planes, tuple(self.pool.planes)  # a snapshot: another fork may make the pool grow
        keys = PagedSide(self.codecs[0], planes[:n], tails[0], self.page_size)
        return keys, PagedSide(self.codecs[1], planes[n:], tails[1], self.page_size)

    def footprint(self) -> Footprint:
        """Bytes held, measured on the tensors."""
        packed = np.unique(self._table).size * self.pool.page_bytes
        unused = self.pool.nbytes - self.pool.used * self.pool.page_bytes
        open_page = sum(tail.untyped_storage().nbytes() for tail in self._tail)
        tables = self._table.nbytes + sum(x.nbytes for x in (self._device_table, self._lengths) if x is not None)
        return Footprint(packed, open_page, unused, tables)

    def elements_per_token(self) -> int:
        """Key and value elements of one token of one sequence."""
        return sum(heads * head_dim for heads, head_dim in self.vectors)

    def dense_bytes(self) -> int:
        """Bytes that the same tokens take in the model's dtype."""
        return self.batch_size * self.length * self.elements_per_token() * self.dtype.itemsize

    # -- appending -----------------------------------------------------------------------------------------------------

    def check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Refuse keys and values that do not fit, before anything is changed.

        Raises:
            BatchSizeError: another batch size than the sequences held.
            CacheMismatchError: other heads, head_dim, dtype, device, or unequal numbers of tokens.
        """
        if keys.shape[0] != self.batch_size:
            raise BatchSizeError(
                f"this cache holds a batch of {self.batch_size}, the call has {keys.shape[0]}; "
                "call cache.reset() or make a new cache."
            )
        for name, new, tail in zip(("keys", "values"), (keys, values), self._tail, strict=True):
            held = (tail.shape[0], tail.shape[1], keys.shape[2], tail.shape[3])
            if tuple(new.shape) != held or new.dtype != tail.dtype or new.device != tail.device:
                raise CacheMismatchError(
                    f"this cache holds {name} of shape {list(held)}, {tail.dtype} on {tail.device}; the call has "
                    f"{list(new.shape)}, {new.dtype} on {new.device}; was it filled by another model? "
                    "Call cache.reset() or make a new cache."
                )

    def append(self, keys: torch.Tensor, values: torch.Tensor, padding: np.ndarray | None = None) -> None:
        """Store new tokens after those held; on an error the store is as before.

        Args:
            keys: ``[batch, heads, tokens, key_dim]``, any strides.
            values: ``[batch, heads, tokens, value_dim]``.
            padding: bool ``[batch, tail_length + tokens]``, which tokens of the open page and of the new ones are
                padding; None if none is.

        Raises:
            CacheMismatchError: see :meth:`check`.
        """
        self.check(keys, values)
        count = max(0, (self.tail_length + keys.shape[2] - 1) // self.page_size)  # lazily: see the module's docstring
        rest = self.tail_length + keys.shape[2] - count * self.page_size
        # Another open page instead of the old one overwritten: what stops this half way leaves the store as it was.
        copied = count > 0 or self._tail_shared
        tails = tuple(tail.clone() for tail in self._tail) if copied else self._tail
        blank = np.zeros((self.batch_size, count), dtype=bool)
        if padding is not None and (padded := padding[:, : count * self.page_size]).any():
            blank = padded_pages(padded, self.page_size)
            keys, values = (self._pad(x, tail, padded) for x, tail in zip((keys, values), tails, strict=True))
        lengths = torch.empty_like(self.lengths)
        with self.pool.lock:
            pages = self._allocate(blank)
            try:
                table, device_table = self._table, self.page_table
                if count:
                    table = np.concatenate([table, pages], axis=1)
                    device_table = torch.from_numpy(table.copy()).to(self.device)
                sides = self._sides(tails)
                append_pages(keys, values, *sides, device_table, self.lengths, lengths, impl=self.impl)
            except BaseException:
                self.pool.release(pages)
                raise
        self._table, self._device_table, self._lengths = table, device_table, lengths
        self._tail, self._tail_shared, self.tail_length = tails, self._tail_shared and not copied, rest
        self.version += 1

    def _pad(self, new: torch.Tensor, tail: torch.Tensor, padding: np.ndarray) -> torch.Tensor:
        """``new`` with its padding replaced as far as it is about to be sealed; in ``tail`` it is replaced in place."""
        held = self.tail_length
        sealed = padding.shape[1] - held
        content = torch.cat([tail[:, :, :held], new[:, :, :sealed]], dim=2)
        content = replace_padding(content, padding, self.page_size)
        tail[:, :, :held] = content[:, :, :held]
        return torch.cat([content[:, :, held:], new[:, :, sealed:]], dim=2)

    def _allocate(self, blank: np.ndarray) -> np.ndarray:
        """Page ids for the shape of ``blank``, sequence by sequence; those that are blank are one page of the store."""
        pages = np.empty(blank.shape, dtype=np.int32)
        known = self._blank in self._table  # -1 never is
        shared = int(blank.sum())
        ids = self.pool.allocate(blank.size - shared + (shared > 0 and not known))
        pages[~blank] = ids[: blank.size - shared]
        if shared:
            self._blank = self._blank if known else int(ids[-1])
            pages[blank] = self._blank
            self.pool.retain(pages[blank][0 if known else 1 :])
        return pages

    # -- everything that only moves table entries ----------------------------------------------------------------------

    def crop(self, count: int) -> None:
        """Drop the last ``count`` tokens.  Within the open page this is exact; a sealed page that must be cut is
        decoded once into the open page (``reopened_pages`` counts them)."""
        pages, rest = divmod(max(0, self.length - count), self.page_size)
        if count > self.tail_length:
            table, dropped = self._table[:, :pages].copy(), self._table[:, pages:]
            if rest:
                view = self.view()
                page = view.page_table[:, pages : pages + 1]
                tails = tuple(tail.new_empty(tail.shape) for tail in self._tail)
                for tail, side in zip(tails, view[:2], strict=True):
                    tail[:, :, :rest] = gather_dense(side._replace(tail=side.tail[:, :, :0]), page)[:, :, :rest]
                self._tail, self._tail_shared = tails, False
                self.reopened_pages += self.batch_size
            self.tail_length = rest
            self._replace_table(table, dropped)
        else:
            self.tail_length -= count
        self._lengths = None
        self.version += 1

    def select(self, indices: torch.Tensor) -> None:
        """Make sequence ``indices[i]`` the new sequence i.  Sealed pages are shared, the open page is copied."""
        rows = indices.to("cpu", torch.int64).numpy()
        table, dropped = self._table[rows], self._table
        tail = tuple(tail.index_select(0, indices.to(self.device)) for tail in self._tail)
        self.pool.retain(table)
        self._tail, self._tail_shared = tail, False
        self._replace_table(table, dropped)
        self.version += 1

    def fork(self) -> "PagedStore":
        """A second store with the same tokens.  Pages are shared; the open page is copied by whoever writes first."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._table = self._table.copy()
        self.pool.retain(twin._table)
        self._tail_shared = twin._tail_shared = True
        return twin

    def to(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply ``move`` to every tensor held, for offloading."""
        self.pool.planes = [move(plane) for plane in self.pool.planes]
        self._tail = tuple(move(tail) for tail in self._tail)
        self._device_table = self._lengths = None
        self.version += 1

    def clear(self) -> None:
        """Drop all tokens and give the pages back."""
        self.tail_length = 0
        self._replace_table(self._table[:, :0].copy(), self._table)
        self.version += 1

    def _replace_table(self, table: np.ndarray, dropped: np.ndarray) -> None:
        """Set the page table and give back the pages ``dropped``."""
        self._table, self._device_table, self._lengths = table, None, None
        if self._blank not in table:
            self._blank = -1
        self.pool.release(dropped)

    def restore(self, tensors: Mapping[str, torch.Tensor], integers: Mapping[str, int]) -> None:
        """Hold what ``layer_state.snapshot`` took from another store; this one is new, and nothing is checked."""
        table, count = tensors["table"].numpy().copy(), tensors["keys.open"].shape[2]
        pages = self.pool.allocate(int(table.max(initial=-1)) + 1)
        for name, side in zip(("keys", "values"), self._sides(self._tail), strict=True):
            for plane, rows in zip(side.codec.planes(side.head_dim), side.planes, strict=True):
                rows.copy_(tensors[f"{name}.{plane.name}"])
            side.tail[:, :, :count] = tensors[f"{name}.open"]
        self.pool.retain(table)
        self.pool.release(pages)
        self._table, self._device_table, self._lengths, self.tail_length = table, None, None, count
        vars(self).update(integers)

    def __deepcopy__(self, memo: dict[int, object]) -> "PagedStore":
        return self.fork()

    def __del__(self) -> None:
        # Pages of a forked store go back to the pool they are shared with.  A store whose constructor failed has none.
        if "_table" in self.__dict__ and self._table.size:
            self.pool.abandon(self._table)
