"""How many blocks and how many open pages find room in the memory that there is."""

import inspect
from typing import Any

from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler

from ..errors import BatchingError, OutOfPages
from ..reports.report import format_size
from .config import QuantizedBatchingConfig

TYPICAL_TOKENS = 256  # of a request, where nobody says how many there are at a time
_MOST_BY_DEFAULT = 64  # requests at a time: more would take memory from long ones that may come
_TRASH_SECTORS = 2  # which transformers puts in front of the blocks
_SHARDED = "kv_tp_size" in inspect.signature(PagedAttentionMemoryHandler.__init__).parameters  # from 5.24 on


class PageMemory(PagedAttentionMemoryHandler):
    """transformers' sizing, with open pages in the budget and without what only dense attention needs: masks, and the
    keys and values read back from the cache.

    Args:
        open_bytes: bytes of one request's open pages in all layers.
        typical_blocks: blocks of a request of ``TYPICAL_TOKENS``.
        shards: devices that the heads are spread over.
        arguments: those of transformers' class; ``cb_config`` must be ours.
    """

    def __init__(self, open_bytes: int, typical_blocks: int, shards: int = 1, **arguments: Any) -> None:
        super().__init__(**arguments, **({"kv_tp_size": shards} if _SHARDED else {}))
        self.cb_config: QuantizedBatchingConfig
        self.open_bytes, self.typical_blocks = open_bytes, typical_blocks
        self.num_attention_masks = self.kv_heads_at_peak = 0

    @property
    def bytes_per_cache_token(self) -> int:
        """Nothing is held per token of the cache beside its pages."""
        return 0

    def num_sectors_from_config(self) -> int | None:
        """Sectors that the config fixes, those of open pages included; None: what memory there is decides."""
        cb = self.cb_config
        if cb.max_bytes is not None:
            return max(1, cb.max_bytes // self.bytes_per_sector - _TRASH_SECTORS)
        return None if cb.num_blocks is None else max(1, cb.num_blocks * self.bytes_per_block // self.bytes_per_sector)

    def divide(self) -> tuple[int, int, int]:
        """Tokens per step, sectors of blocks, and slots for open pages.

        Raises:
            OutOfPages: not even one block of each kind finds room.
        """
        tokens, sectors = self.infer_max_batch_tokens_and_num_sectors()
        budget = sectors * self.bytes_per_sector
        slots = self.cb_config.max_requests
        if slots is None:
            fitting = max(1, budget // (self.open_bytes + self.typical_blocks * self.bytes_per_sector))
            most = self.cb_config.max_requests_per_batch or _MOST_BY_DEFAULT
            slots = min(fitting, most, _MOST_BY_DEFAULT, tokens)  # that a step can take
        left = (budget - slots * self.open_bytes) // self.bytes_per_sector
        if left < 1:
            raise OutOfPages(
                f"{format_size(budget)} for pages have no room for a block of {format_size(self.bytes_per_sector)} "
                f"beside the open pages of {slots} requests, {format_size(self.open_bytes)} each; raise num_blocks or "
                "max_bytes, or lower max_requests."
            )
        return tokens, left, slots


def longest_request(cache: Any) -> int:
    """Tokens, prompt and new ones together, of the longest request that the cache can hold if it is alone and that the
    model has positions for."""
    positions = getattr(cache.config, "max_position_embeddings", None) or 2**31
    low, high = 1, positions
    while low < high:
        middle = (low + high + 1) // 2
        try:
            cache.check_fits(middle, 1)
            low = middle
        except BatchingError:
            high = middle - 1
    return min(low + 1, positions)
