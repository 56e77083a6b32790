"""Blocks: which sealed pages belong to which request.

A block is one sealed page of each layer, and its id is the id of the page in all of them.  transformers' allocator
keeps the table of each request, reference counts and hashes; here stand what a block is made of, and that the tokens of
the last, open page are in none.

    tokens of a request   0 ..... 63 | 64 .... 127 | 128 ... 150
    block table           block 7    | block 2     |             -> planes of all layers
    slot                                           | 23 tokens   -> ``OpenPages``

A page is sealed by the first token that does not fit into the open one, so ``t`` tokens take ``(t - 1) // page_size``
blocks, or as many for each of several lanes of layers (``model.py``): they stand side by side in the table.  Where
layers see the last ``window`` tokens only, blocks are given back in front.
"""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from transformers.generation.continuous_batching.cache_allocators import CachePool, FullAttentionCacheAllocator

from ..pages.layout import StoreLayout
from .model import Place
from .slots import OpenPages

ALIGNMENT = 128  # bytes, of transformers' sectors; a block that is a multiple of it is a sector of its own
GIVEN_BACK = 0  # stands in a block table for a block that is given back: transformers never hands out its first one


class PageAllocator(FullAttentionCacheAllocator):
    """Sealed pages of the layers of one kind.

    Args:
        index: of this kind of blocks, to the pool.
        kind: its name.
        layouts: what a block has a page of, position by position; all of one page size.
        layers: the layers.
        lanes: blocks for each page of tokens.
        allow_block_sharing: whether requests may share blocks.
        window: tokens that the layers' queries see, themselves included; 0: all.
    """

    supports_block_table = False

    def __init__(
        self,
        index: int,
        kind: str,
        layouts: Sequence[StoreLayout],
        layers: Sequence[int],
        *,
        lanes: int,
        allow_block_sharing: bool,
        window: int,
    ) -> None:
        self.layer_type, self.layouts, self.lanes, self.window = kind, layouts, lanes, window
        # What was given back can be shared with nobody, so a request keeps its blocks to itself.
        self.supports_block_sharing = window == 0
        planes = [plane for layout in layouts for plane in layout.plane_shapes]
        block = sum(prod(shape) * dtype.itemsize for dtype, shape in planes)
        self._before_cache_tensor_init(
            index=index,
            layer_indices=list(layers),
            tokens_per_page=layouts[0].page_size,
            bytes_per_page=-(-block // ALIGNMENT) * ALIGNMENT,
            allow_block_sharing=allow_block_sharing,
        )
        # To transformers a block is one page: those of different layers need not have the same size.
        self.pages_per_block = 1
        self.tokens_per_block, self.bytes_per_block = self.tokens_per_page, self.bytes_per_page
        self.block_physical_stride = self.rows_per_token * self.tokens_per_block
        self.attached: dict[str, int] = {}  # tokens of a shared prefix with which a request began
        self.shared_tokens = 0  # tokens of all prefixes that were found, so far
        self.open: OpenPages

    def register_cache_tensor(
        self, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: torch.Tensor, pool: CachePool
    ) -> None:
        """Cut the planes of each position's pages out of ``cache_tensor`` (uint8), plane by plane: kernels want each to
        be contiguous, ``[blocks, heads, *Plane.shape(page_size)]``.  Every kind of block cuts alike."""
        self.bytes_per_sector = bytes_per_sector
        blocks = cache_tensor.numel() // self.bytes_per_block
        planes: list[dict[int, torch.Tensor]] = [{} for _ in self.layouts]
        cuts = [(i, n, *plane) for i, layout in enumerate(self.layouts) for n, plane in enumerate(layout.plane_shapes)]
        start = 0
        for position, n, dtype, shape in sorted(cuts, key=lambda cut: -cut[2].itemsize):  # so that each is aligned
            size = blocks * prod(shape) * dtype.itemsize
            planes[position][n] = cache_tensor[start : start + size].view(dtype).view(blocks, *shape)
            start += size
        self.planes = [tuple(found[n] for n in range(len(found))) for found in planes]
        self._after_cache_tensor_init(non_trash_bytes, bytes_per_sector, cache_tensor, pool)

    # -- blocks --------------------------------------------------------------------------------------------------------

    def sealed(self, request_id: str, past: int) -> int:
        """Sealed pages of a request that holds ``past`` tokens.  After a shared prefix, which is whole pages, its open
        page is empty; at any other time that has a token."""
        whole = self.attached.get(request_id) == past
        return (past if whole else max(0, past - 1)) // self.tokens_per_page

    def _compute_blocks_needed(self, allocated_blocks: int, past_length: int, query_length: int) -> int:
        return max(0, (past_length + query_length - 1) // self.tokens_per_page * self.lanes - allocated_blocks)

    def most_blocks(self, tokens: int, step: int) -> int:
        """Blocks that a request has at most on its way to ``tokens`` tokens, of which a step brings up to ``step``."""
        pages = max(0, tokens - 1) // self.tokens_per_page
        if self.window:
            pages = min(pages, (self.window + step) // self.tokens_per_page + 1)
        return pages * self.lanes

    def tables(self, request_id: str) -> list[list[int]]:
        """The blocks of a request, lane by lane."""
        return [self.block_table[request_id][lane :: self.lanes] for lane in range(self.lanes)]

    def allocate_cache_to_request(self, request_id: str, past_length: int, query_length: int) -> None:
        """Give a request the blocks that its next tokens complete, and a slot; there must be both."""
        self.open.take(request_id)
        super().allocate_cache_to_request(request_id, past_length, query_length)

    def give_back_outlived(self, request_id: str, past: int) -> None:
        """Give back the blocks of which no token after ``past`` others sees anything."""
        if not self.window:
            return
        table = self.block_table.get(request_id, [])
        outlived = max(0, past - self.window + 1) // self.tokens_per_page
        for i in range(min(outlived * self.lanes, len(table)) - 1, -1, -1):
            if table[i] == GIVEN_BACK:
                break
            self.pool.free_blocks(self.index, [table[i]])
            table[i] = GIVEN_BACK

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        """A request has ended, or must make room."""
        if self.window and request_id in self.block_table:
            self.block_table[request_id] = [b for b in self.block_table[request_id] if b != GIVEN_BACK]
        super().free_blocks(request_id, no_cache)
        self.attached.pop(request_id, None)
        self.open.give_back(request_id)

    # -- sharing -------------------------------------------------------------------------------------------------------

    def acquire_prefix_blocks(self, request_id: str, prefix_len: int, block_ids: list[int]) -> None:
        """A request begins with blocks that are there."""
        super().acquire_prefix_blocks(request_id, prefix_len, block_ids)
        self.open.take(request_id)
        self.attached[request_id] = prefix_len
        self.shared_tokens += prefix_len

    def count_shareable_blocks(self, source_request_id: str, past_length: int) -> int:
        """Sealed blocks of a request, if they may be shared; one that is allocated and not sealed never is."""
        if not self.use_block_sharing:
            return 0
        return min(self.sealed(source_request_id, past_length) * self.lanes, len(self.block_table[source_request_id]))

    def count_non_shareable_blocks(self, source_request_id: str, past_length: int) -> int:
        """Fresh blocks that a fork of a request needs."""
        given_back = self.block_table[source_request_id].count(GIVEN_BACK)
        return super().count_non_shareable_blocks(source_request_id, past_length) - given_back

    def fork_blocks(
        self, source_request_id: str, dest_request_id: str, past_length: int
    ) -> tuple[list[int], list[int]]:
        """Blocks and a slot for a fork of a request; what is to be copied, from and to, open pages apart."""
        source = self.block_table[source_request_id]
        shared = self.count_shareable_blocks(source_request_id, past_length)
        for block in source[:shared]:
            self.ledger.acquire(block)
        copied = [block for block in source[shared:] if block != GIVEN_BACK]
        fresh = self.pool.get_free_blocks(self.index, len(copied))
        given_back = [GIVEN_BACK] * (len(source) - shared - len(copied))
        self.block_table[dest_request_id] = source[:shared] + given_back + fresh
        self.open.take(dest_request_id)
        if source_request_id in self.attached:
            self.attached[dest_request_id] = self.attached[source_request_id]
        return copied, fresh

    def copy_blocks(self, source_block_ids: list[int], dest_block_ids: list[int]) -> None:
        """Copy the pages of some blocks to others."""
        for planes in self.planes:
            for plane in planes:
                plane[dest_block_ids] = plane[source_block_ids]


def allocators_of(
    places: Mapping[int, Place], windows: Mapping[str, int], layouts: Mapping[int, StoreLayout], share: bool
) -> dict[str, PageAllocator]:
    """An allocator for each kind of blocks.

    Args:
        places: where each layer's pages are.
        windows: the window of each kind.
        layouts: what each layer stores of a page.
        share: whether requests may share blocks.
    """
    found: dict[str, PageAllocator] = {}
    for kind, window in windows.items():
        mine = {layer: place for layer, place in places.items() if place.kind == kind}
        found[kind] = PageAllocator(
            len(found),
            kind,
            [layouts[layer] for layer, place in mine.items() if place.lane == 0],
            list(mine),
            lanes=max(place.lane for place in mine.values()) + 1,
            allow_block_sharing=share,
            window=window,
        )
    return found
