"""What every store knows of the keys and values that it takes: codecs, planes of a page, heads, dtype, device."""

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
        like_values: the same for values.
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
        self._tail = tuple(
            like.new_empty(*like.shape[:2], page_size, like.shape[3]) for like in (like_keys, like_values)
        )

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self._tail[0].shape[0]

    @property
    def device(self) -> torch.device:
        """Where the pages live."""
        return self._tail[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype, as the keys arrive."""
        return self._tail[0].dtype

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
