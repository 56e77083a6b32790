"""An open page for each live request: its most recent 1 to ``page_size`` tokens, in the model's dtype."""

import heapq
import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from ..pages.layout import StoreLayout


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory of zeros.  On a CPU it is the system's to find when something is written: a budget is a limit there, and
    not memory that is taken."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


class OpenPages:
    """Open pages of all layers in ``count`` slots, made once.

    A request has the same slot in every layer.  The lowest free one is taken, so that the slots of live requests stay
    neighbours: kernels read a run of them in one call, where they lie.

    Args:
        layouts: what each layer stores of a token, by the layer's index.
        count: requests that can be live at a time.
        device: where the pages live.
    """

    def __init__(self, layouts: Mapping[int, StoreLayout], count: int, device: torch.device) -> None:
        self.count = count
        # Keys and values of each layer, [count, heads, page_size, head_dim].
        self.tails = {
            index: tuple(
                zeros((count, heads, layout.page_size, head_dim), dtype, device)
                for (heads, head_dim), dtype in zip(layout.vectors, layout.dtypes, strict=True)
            )
            for index, layout in layouts.items()
        }
        self.of: dict[str, int] = {}  # slot of each live request
        self._free = list(range(count))

    @staticmethod
    def bytes_per_slot(layouts: Iterable[StoreLayout]) -> int:
        """Bytes of one request's open pages in all layers."""
        return sum(layout.page_size * layout.dense_bytes_per_token() for layout in layouts)

    @property
    def free(self) -> int:
        """Slots that no request has."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(tail.nbytes for tails in self.tails.values() for tail in tails)

    def take(self, request_id: str) -> int:
        """The slot of a request, a free one if it has none; there must be one."""
        if request_id not in self.of:
            self.of[request_id] = heapq.heappop(self._free)
        return self.of[request_id]

    def give_back(self, request_id: str) -> None:
        """A request is no longer live; nothing happens if it was not."""
        if (slot := self.of.pop(request_id, None)) is not None:
            heapq.heappush(self._free, slot)

    def copy(self, sources: list[int], destinations: list[int]) -> None:
        """Copy the open pages of some slots to others, in all layers."""
        for tails in self.tails.values():
            for tail in tails:
                tail[destinations] = tail[sources]
