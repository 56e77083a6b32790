"""What every store knows of the keys and values that it takes: codecs, planes of a page, heads, dtype, device."""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..errors import BatchSizeError, CacheMismatchError, UnsupportedModelError
from ..triton_kernels.codecs import Codec
from ..triton_kernels.ops import Implementation, PagedSide
from .moments import Moments, metric_of
from .parameters import in_pages, on_every_page, placed, placed_prior
from .pool import PlaneShape
from .queries import SeenQueries


class StoreLayout:
    """The part of a store that does not depend on what it holds; it has the open pages.

    Args:
        keys: codec of the keys.
        values: codec of the values.
        page_size: tokens per page.
        like_keys: a key tensor ``[batch, heads, any, key_dim]`` whose shape, dtype and device the store adopts.
        like_values: the same for values; ``dtypes`` says in which dtype both are held (see ``held_dtypes``).
        impl: what is to run on the pages.
        prior: moments of queries, by which keys are rounded before there are any; for codecs with ``uses_queries``.

    Raises:
        UnsupportedModelError: a head_dim that a codec cannot store.
        WrongModelError: a codec's planes per layer, or the prior, are of another shape.
    """

    seen: SeenQueries | None = None  # where keys are rounded by queries
    rounded_pages = 0  # of each sequence, where none are seen: rounded by those of a calibration

    def __init__(
        self,
        keys: Codec,
        values: Codec,
        page_size: int,
        like_keys: torch.Tensor,
        like_values: torch.Tensor,
        impl: Implementation,
        prior: Moments | None = None,
    ) -> None:
        self.prior = placed_prior(prior, like_keys)
        self.codecs = (placed(keys, like_keys), placed(values, like_values))
        self.page_size = page_size
        self.impl = impl
        self.vectors = [(like.shape[1], like.shape[3]) for like in (like_keys, like_values)]  # heads, head_dim
        self.dtypes = held_dtypes(like_keys, like_values)
        self.plane_shapes: list[PlaneShape] = []
        # The first plane is what is stored of the elements, whole vectors with ``exact``; the others scale it.
        self._scale_planes: list[tuple[int, int | None]] = []  # which, and the largest number of bytes
        for codec, (heads, head_dim), dtype in zip((keys, values), self.vectors, self.dtypes, strict=True):
            if head_dim % codec.head_dim_multiple:
                raise UnsupportedModelError(
                    f"codec {codec.name!r} needs a head_dim that is a multiple of {codec.head_dim_multiple}, "
                    f"this model has {head_dim}; choose another policy."
                )
            for i, plane in enumerate(in_pages(codec, head_dim)):
                stored = plane.dtype or dtype
                if plane.largest or (i and stored.is_floating_point):
                    self._scale_planes.append((len(self.plane_shapes), plane.largest))
                self.plane_shapes.append((stored, (heads, *plane.shape(page_size))))
        self._key_planes = len(in_pages(keys, self.vectors[0][1]))
        batch = like_keys.shape[0]
        self._open = tuple(  # the open pages, whose shape, dtype and device are the store's
            like.new_empty((batch, heads, page_size, head_dim), dtype=dtype)
            for like, (heads, head_dim), dtype in zip((like_keys, like_values), self.vectors, self.dtypes, strict=True)
        )

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self._open[0].shape[0]

    @property
    def device(self) -> torch.device:
        """Where the pages live."""
        return self._open[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype, as the first keys arrived."""
        return self._open[0].dtype

    def saw(self, query: torch.Tensor) -> None:
        """Queries ``[batch, query_heads, tokens, key_dim]`` have attended to what is held."""
        if self.seen is not None:
            with plain_tensors(), without_autocast(self.device.type):
                self.seen.see(query)
                self.round_keys()

    def round_keys(self) -> None:
        """Round the keys that were just sealed by the queries seen (``queries.py``); the pages stay the same ones."""

    def fixed_metric(self) -> torch.Tensor | None:
        """In what keys are rounded where nobody sees queries, float32 ``[1, heads, head_dim, head_dim]``; None: as they
        come, to the nearest code."""
        return None if self.prior is None else metric_of(self.prior).unsqueeze(0)

    def elements_per_token(self) -> int:
        """Key and value elements of one token of one sequence."""
        return sum(heads * head_dim for heads, head_dim in self.vectors)

    def sides(
        self,
        planes: tuple[torch.Tensor, ...],
        tails: tuple[torch.Tensor, ...],
        first: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None),
    ) -> tuple[PagedSide, PagedSide]:
        """Keys and values in ``planes``, with ``tails`` for open pages; ``first``: keys and values of the first tokens
        and where they are, see ``PagedSide``."""
        n, pages = self._key_planes, planes[0].shape[0]
        keys, values = (
            PagedSide(codec, mine + on_every_page(codec, pages), tail, self.page_size, rows, first[2])
            for codec, mine, tail, rows in zip(self.codecs, (planes[:n], planes[n:]), tails, first[:2], strict=True)
        )
        return keys, values

    def dense_bytes_per_token(self) -> int:
        """Bytes of one token of one sequence in the model's dtype."""
        return sum(heads * dim * dtype.itemsize for (heads, dim), dtype in zip(self.vectors, self.dtypes, strict=True))

    def is_like(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether an empty store for these tensors would have this one's batch size and dtypes."""
        return keys.shape[0] == self.batch_size and self.dtypes == held_dtypes(keys, values)

    def promoted(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
        """Dtypes that ``torch.cat`` of what is held and new tensors has, which readers of both expect."""
        held = self.dtypes
        if held == (keys.dtype, values.dtype):
            return held
        return torch.promote_types(held[0], keys.dtype), torch.promote_types(held[1], values.dtype)

    def fitted(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """New keys and values in the dtypes in which they are held, checked.

        A model under ``torch.autocast`` in one call and not in the next hands over another dtype.  transformers' own
        cache is then rewritten in the wider one; pages are written once, so new tokens become what the first ones were:
        the same numbers where that is the wider one, rounded once where it is not.  What is beyond its range saturates.

        Raises:
            BatchSizeError, CacheMismatchError: see :meth:`check`.
        """
        self.check(keys, values)
        if self.dtypes == (keys.dtype, values.dtype):
            return keys, values
        return _cast(keys, self.dtypes[0]), _cast(values, self.dtypes[1])

    def saturated(self, planes: Sequence[torch.Tensor], pages: np.ndarray) -> int:
        """How many of ``pages`` have a scale or an offset at the end of its range, where codecs put what is beyond it;
        waits for the device.

        Reads no codes but those without scales: the scales are a 64th of a page, or a ninth.  Values that are just as
        large as the end count too.
        """
        found, rows = np.zeros(len(pages), dtype=bool), torch.from_numpy(pages).long()
        for plane, largest in ((planes[i], largest) for i, largest in self._scale_planes if not planes[i].is_meta):
            held = plane[rows.to(plane.device)].cpu()
            if largest is not None:
                if largest < 128:
                    held &= 127  # a copy, without its signs
                found |= (held >= largest).flatten(1).any(1).numpy()
                continue
            end, infinity, size = _end_of_range(plane.dtype)
            sizes = _as_integers(held)
            sizes &= size  # without their signs floats are in the order of their bits
            if sizes.size and sizes.max() >= end:  # hardly ever
                found |= ((sizes >= end) & (sizes <= infinity)).reshape(len(pages), -1).any(1)
        return int(found.sum())

    def check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Refuse keys and values that do not fit, before anything is changed.

        Raises:
            BatchSizeError: another batch size than the sequences held.
            CacheMismatchError: other heads, head_dim or device, no floating dtype, or unequal numbers of tokens.
        """
        batch, _, tokens, _ = keys.shape
        if batch != self._open[0].shape[0]:
            raise BatchSizeError(
                f"this cache holds a batch of {self.batch_size}, the call has {batch}; "
                "call cache.reset() or make a new cache."
            )
        device = self.device
        for i, new in enumerate((keys, values)):
            heads, head_dim = self.vectors[i]
            held = (batch, heads, tokens, head_dim)
            if new.shape != held or not new.dtype.is_floating_point or new.device != device:
                side = ("keys", "values")[i]
                raise CacheMismatchError(
                    f"this cache holds {side} of shape {list(held)}, {self.dtypes[i]} on {device}; the call has "
                    f"{list(new.shape)}, {new.dtype} on {new.device}; was it filled by another model? "
                    "Call cache.reset() or make a new cache."
                )


def held_dtypes(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes in which keys and values are held whose first ones are these.

    Under autocast rotary keys are float32 and values are not; transformers' own cache then holds both in float32, and
    nothing is rounded when the next call is without autocast.
    """
    return keys.dtype, torch.promote_types(keys.dtype, values.dtype)


def _as_integers(floats: torch.Tensor) -> np.ndarray:
    """The bits of ``floats`` on the CPU, the same memory; numpy looks at a few numbers in a tenth of torch's time."""
    return floats.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[floats.itemsize]).numpy()


@functools.cache
def _end_of_range(dtype: torch.dtype) -> tuple[int, int, int]:
    """The bits of the largest number and of infinity, and all bits but the sign."""
    ends = _as_integers(torch.tensor([torch.finfo(dtype).max, float("inf")], dtype=dtype))
    return int(ends[0]), int(ends[1]), int(np.iinfo(ends.dtype).max)


_AS_IT_IS = contextlib.nullcontext()


def plain_tensors() -> contextlib.AbstractContextManager[None]:
    """Make tensors that can be written later, also when the caller is in inference mode now and not then."""
    if torch.is_inference_mode_enabled() or torch.is_grad_enabled():
        return _without_modes()
    return _AS_IT_IS  # entering both modes takes as long as storing a token


@contextlib.contextmanager
def _without_modes() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """``torch.autocast`` switched off where it is on; elsewhere nothing, because entering it takes as long as storing a
    token."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _AS_IT_IS


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` in ``dtype``; what is beyond its range becomes its ends, because infinity times zero is no number."""
    limit = torch.finfo(dtype).max
    return x.to(dtype) if torch.finfo(x.dtype).max <= limit else x.clamp(-limit, limit).to(dtype)
