"""What every store knows of the keys and values that it takes: codecs, planes of a page, heads, dtype, device."""

from collections.abc import Sequence

import torch

from ..errors import BatchSizeError, CacheMismatchError, UnsupportedModelError
from ..triton_kernels.codecs import Codec
from ..triton_kernels.ops import Implementation, PagedSide
from .parameters import in_pages, on_every_page, placed
from .pool import PlaneShape


class StoreLayout:
    """The part of a store that does not depend on what it holds; it has the open pages.

    Args:
        keys: codec of the keys.
        values: codec of the values.
        page_size: tokens per page.
        like_keys: a key tensor ``[batch, heads, any, key_dim]`` whose shape, dtype and device the store adopts.
        like_values: the same for values; their dtype is at least that of the keys (see ``held_dtypes``).
        impl: what is to run on the pages.

    Raises:
        UnsupportedModelError: a head_dim that a codec cannot store.
        WrongModelError: a codec's planes per layer are of another shape.
    """

    def __init__(
        self,
        keys: Codec,
        values: Codec,
        page_size: int,
        like_keys: torch.Tensor,
        like_values: torch.Tensor,
        impl: Implementation,
    ) -> None:
        self.codecs = (placed(keys, like_keys), placed(values, like_values))
        like_keys, like_values = (
            like[:, :, :0].to(dtype)
            for like, dtype in zip((like_keys, like_values), held_dtypes(like_keys, like_values), strict=True)
        )
        self.page_size = page_size
        self.impl = impl
        self.plane_shapes: list[PlaneShape] = []
        for codec, like in zip(self.codecs, (like_keys, like_values), strict=True):
            heads, head_dim = like.shape[1], like.shape[3]
            if head_dim % codec.head_dim_multiple:
                raise UnsupportedModelError(
                    f"codec {codec.name!r} needs a head_dim that is a multiple of {codec.head_dim_multiple}, "
                    f"this model has {head_dim}; choose another policy."
                )
            self.plane_shapes += [
                (p.dtype or like.dtype, (heads, *p.shape(page_size))) for p in in_pages(codec, head_dim)
            ]
        self.vectors = [(like.shape[1], like.shape[3]) for like in (like_keys, like_values)]  # heads, head_dim
        self._key_planes = len(in_pages(keys, like_keys.shape[3]))
        stored = [in_pages(codec, dim) for codec, (_, dim) in zip(self.codecs, self.vectors, strict=True)]
        # The first plane is what is stored of the elements, whole vectors with ``exact``; the others scale it.
        scales = [i > 0 for planes in stored for i in range(len(planes))]
        self._scale_planes = [
            i for i, scale in enumerate(scales) if scale and self.plane_shapes[i][0].is_floating_point
        ]
        self._open = tuple(  # the open pages, whose shape, dtype and device are the store's
            like.new_empty(*like.shape[:2], page_size, like.shape[3]) for like in (like_keys, like_values)
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

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of keys and values as they are held; see ``held_dtypes``."""
        return self._open[0].dtype, self._open[1].dtype

    def elements_per_token(self) -> int:
        """Key and value elements of one token of one sequence."""
        return sum(heads * head_dim for heads, head_dim in self.vectors)

    def sides(self, planes: tuple[torch.Tensor, ...], tails: tuple[torch.Tensor, ...]) -> tuple[PagedSide, PagedSide]:
        """Keys and values in ``planes``, with ``tails`` for open pages."""
        n, pages = self._key_planes, planes[0].shape[0]
        keys, values = (
            PagedSide(codec, mine + on_every_page(codec, pages), tail, self.page_size)
            for codec, mine, tail in zip(self.codecs, (planes[:n], planes[n:]), tails, strict=True)
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

    def _saturated(self, planes: Sequence[torch.Tensor], pages: torch.Tensor) -> int:
        """How many of ``pages`` (int64, on the planes' device) have a scale or an offset at the end of its range, where
        codecs put what is beyond it; waits for the device.

        Reads no codes: the scales are a 64th of a page, or less.  Values that are just as large as the end count too.
        """
        if pages.is_meta or not self._scale_planes:
            return 0
        found = None
        for plane in (planes[i] for i in self._scale_planes):
            scales = plane[pages]
            if scales.numel() and float(scales.abs().amax()) >= (end := torch.finfo(plane.dtype).max):  # hardly ever
                beyond = (scales.abs() >= end).flatten(1).any(1)
                found = beyond if found is None else found | beyond
        return 0 if found is None else int(found.sum())

    def check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Refuse keys and values that do not fit, before anything is changed.

        Raises:
            BatchSizeError: another batch size than the sequences held.
            CacheMismatchError: other heads, head_dim or device, no floating dtype, or unequal numbers of tokens.
        """
        if keys.shape[0] != self.batch_size:
            raise BatchSizeError(
                f"this cache holds a batch of {self.batch_size}, the call has {keys.shape[0]}; "
                "call cache.reset() or make a new cache."
            )
        for name, new, tail in zip(("keys", "values"), (keys, values), self._open, strict=True):
            held = (tail.shape[0], tail.shape[1], keys.shape[2], tail.shape[3])
            if tuple(new.shape) != held or not new.is_floating_point() or new.device != tail.device:
                raise CacheMismatchError(
                    f"this cache holds {name} of shape {list(held)}, {tail.dtype} on {tail.device}; the call has "
                    f"{list(new.shape)}, {new.dtype} on {new.device}; was it filled by another model? "
                    "Call cache.reset() or make a new cache."
                )


def held_dtypes(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes in which keys and values are held whose first ones are these.

    Under autocast rotary keys are float32 and values are not; transformers' own cache then holds both in float32, and
    nothing is rounded when the next call is without autocast.
    """
    return keys.dtype, torch.promote_types(keys.dtype, values.dtype)


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` in ``dtype``; what is beyond its range becomes its ends, because infinity times zero is no number."""
    limit = torch.finfo(dtype).max
    return x.to(dtype) if torch.finfo(x.dtype).max <= limit else x.clamp(-limit, limit).to(dtype)
