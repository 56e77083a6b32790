"""What a batching run holds and what ran in it, at one moment."""

from dataclasses import asdict, dataclass
from typing import Any

from ..reports.report import format_size
from .cache import QuantizedBatchingCache


@dataclass(frozen=True)
class BatchingReport:
    """A batching run at one moment.

    Args:
        policy: name of the policy.
        page_size: tokens per page and block.
        blocks: blocks that requests can have.
        used_blocks: blocks that live requests have, shared ones counted once.
        most_used_blocks: the most that were at the end of a step.
        cached_blocks: blocks that no live request has and that are kept for the next prompt that begins alike; given
            away when memory is short.
        bytes_per_block: bytes of a block: a sealed page of each layer, or of some, where layers that see all tokens and
            layers that see a window take blocks of their own.
        dense_bytes_per_block: bytes of as many tokens in the model's dtype.
        requests: requests that may hold pages at a time; each has an open page in every layer.
        live_requests: requests that do.
        open_page_bytes: bytes of all open pages, those of requests to come included.
        bytes: everything reserved: blocks, open pages, and two blocks' worth that transformers never hands out.
        shared_tokens: tokens of prompts that were found in blocks and not computed again.
        implementation: what read the pages: ``"triton"``, ``"cpu"``, ``"reference"``, or several.
        implementation_reason: why the kernels did not run, if they might have.
        paged_calls, prefill_calls: attention calls: on pages; on the exact keys and values of a first prompt.
        out_of_range: whether a page had keys or values beyond what its scales can hold, which a ``KVQuantRangeWarning``
            said; on a GPU, which is not waited for, nobody looks.
    """

    policy: str
    page_size: int
    blocks: int
    used_blocks: int
    most_used_blocks: int
    cached_blocks: int
    bytes_per_block: int
    dense_bytes_per_block: int
    requests: int
    live_requests: int
    open_page_bytes: int
    bytes: int
    shared_tokens: int
    implementation: str
    implementation_reason: str
    paged_calls: int
    prefill_calls: int
    out_of_range: bool

    @property
    def ratio(self) -> float:
        """Blocks in the memory of a dense one."""
        return self.dense_bytes_per_block / self.bytes_per_block

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody has."""
        return self.blocks - self.used_blocks - self.cached_blocks

    def as_dict(self) -> dict[str, Any]:
        """All fields and what is derived from them, ready for JSON."""
        return asdict(self) | {"ratio": self.ratio, "free_blocks": self.free_blocks}

    def __str__(self) -> str:
        ran = f" ({self.implementation})" if self.implementation else ""
        used = f"{self.used_blocks} used (at most {self.most_used_blocks})"
        rows = [
            ("policy", f"{self.policy}, pages of {self.page_size} tokens"),
            ("blocks", f"{self.blocks}: {used}, {self.cached_blocks} kept, {self.free_blocks} free"),
            (
                "of a block",
                f"{format_size(self.bytes_per_block)} against {format_size(self.dense_bytes_per_block)} dense: ratio "
                f"{self.ratio:.2f}",
            ),
            (
                "requests",
                f"{self.live_requests} live of at most {self.requests}, open pages {format_size(self.open_page_bytes)}",
            ),
            ("reserved", format_size(self.bytes)),
            ("prefixes", f"{self.shared_tokens} tokens found in blocks"),
            ("attention calls", f"{self.paged_calls} in pages{ran}, {self.prefill_calls} exact prefill"),
            *(
                [("out of range", "keys or values were cut off at the ends of their scales")]
                if self.out_of_range
                else []
            ),
            *([("kernels", f"not used: {self.implementation_reason}")] if self.implementation_reason else []),
        ]
        return "\n".join(f"{label:<17} {text}" for label, text in rows)


def count_blocks(cache: QuantizedBatchingCache) -> tuple[int, int]:
    """Blocks that live requests have, and blocks that are kept for the next prompt that begins alike."""
    kinds = cache.cache_allocators.values()
    cached = sum(len(kind.ledger.cached_blocks) for kind in kinds)
    free = cache.pool.num_free_sectors + sum(cache.pool.count_free_blocks(kind.index) for kind in kinds)
    return cache.pages.num_blocks - free - cached, cached


def report_of(cache: QuantizedBatchingCache, most_used: int) -> BatchingReport:
    """The report of a run, in which ``most_used`` blocks were used at a time."""
    pages = cache.pages
    policy: Any = cache.policy
    used, cached = count_blocks(cache)
    dense = sum(layout.dense_bytes_per_token() for layout in pages.layouts) * pages.tokens_per_page
    return BatchingReport(
        policy=policy.name,
        page_size=pages.tokens_per_page,
        blocks=pages.num_blocks,
        used_blocks=used,
        most_used_blocks=most_used,
        cached_blocks=cached,
        bytes_per_block=pages.bytes_per_block,
        dense_bytes_per_block=dense,
        requests=cache.open.count,
        live_requests=len(cache.open.of),
        open_page_bytes=cache.open.nbytes,
        bytes=cache.cache_tensor.nbytes + cache.open.nbytes,
        shared_tokens=pages.shared_tokens,
        implementation=", ".join(sorted(dict(cache.log.paged))),
        implementation_reason=cache.log.reason,
        paged_calls=cache.log.paged.total(),
        prefill_calls=cache.log.prefill,
        out_of_range=cache.log.out_of_range,
    )
