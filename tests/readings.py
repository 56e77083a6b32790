"""Text read through caches in tests: a cache with a damaged page, and when two readings agree."""

from typing import Any

import torch

from kvquant_hf import QuantizedPagedCache


class Damaged(QuantizedPagedCache):
    """A page of the second layer is full of zeros as soon as it is sealed; ``page`` is its number in the sequence."""

    page = 0

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        returned = super().update(keys, values, layer_idx, *args, **kwargs)
        store = self.paged_layers[layer_idx].store
        if layer_idx == 1 and store.sealed_pages > self.page:
            for plane in store.pool.planes:
                plane[store.page_table[:, self.page].long()] = 0
        return returned


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the KLDs of two runs of the same arithmetic in another order agree, position by position.

    Models are in float64 here, so that no code falls on the other side of a boundary; attention over pages multiplies
    in float32, whose noise in a KLD is about 1e-12.  Roots of small KLDs are distances, so noise of 1e-12 moves a root
    by 1e-6 at most; ten times that is allowed.
    """
    a, b = (kld.clamp(min=0).sqrt() for kld in (one, other))
    return float((a - b).abs().max()) < 1e-5
