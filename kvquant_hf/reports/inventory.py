"""What the layers of a cache hold, measured on their tensors."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ..pages.store import PagedStore
from .calls import CallLog
from .report import CacheReport


class Paged(Protocol):
    """What is asked of a layer in pages."""

    store: PagedStore | None
    held_window: int
    sinks: int

    @property
    def length(self) -> int:
        """Tokens held."""

    @property
    def dense_bytes(self) -> int:
        """Bytes of the tokens held, in the model's dtype."""


def take_inventory(
    policy: str,
    page_size: int,
    paged: Sequence[Paged],
    others: Sequence[Any],
    log: CallLog,
    pools_shared: bool,
    latent_rank: int | None,
) -> CacheReport:
    """The report of one cache.

    Args:
        policy: name of the policy.
        page_size: tokens per page.
        paged: the layers in pages.
        others: the layers of transformers' own.
        log: what ran on them.
        pools_shared: whether other caches draw from the same pools; what nobody holds is then not this cache's.
        latent_rank: width of the latents of an MLA model.
    """
    saturated = sum(layer.store.saturated_pages() for layer in paged if layer.store is not None)
    log.saturated(saturated)
    stores = [layer.store for layer in paged if layer.store is not None]
    prints = [store.footprint() for store in stores]
    windows = [str(layer.held_window) for layer in paged if layer.held_window]
    unused = 0 if pools_shared else sum(p.unused for p in prints)
    per_page = [store.elements_per_token() * store.batch_size for store in stores]
    return CacheReport(
        policy=policy,
        page_size=page_size,
        sinks=max((layer.sinks for layer in paged), default=0),
        tokens=max((layer.length for layer in paged), default=0),
        batch_size=max((store.batch_size for store in stores), default=0),
        paged_layers=len(paged),
        sliding_layers=dict(Counter(windows)),
        vectors=dict(Counter(_vectors(store, latent_rank) for store in stores)),
        other_layers=dict(Counter(type(layer).__name__ for layer in others)),
        bytes=sum(p.total - p.unused for p in prints) + unused,
        packed_bytes=sum(p.packed for p in prints),
        open_page_bytes=sum(p.open_page for p in prints),
        unused_bytes=unused,
        shared_bytes=sum(p.shared for p in prints),
        holders=max((p.holders for p in prints), default=0),
        devices=dict(sum((store.devices() for store in stores), Counter())),
        other_bytes=sum(_dense_bytes(layer) for layer in others),
        dense_bytes=sum(layer.dense_bytes for layer in paged),
        dtype=str(stores[0].dtype).removeprefix("torch.") if stores else "",
        elements=sum(n * store.length for n, store in zip(per_page, stores, strict=True)),
        sealed_elements=sum(n * store.sealed_pages * page_size for n, store in zip(per_page, stores, strict=True)),
        reopened_pages=sum(store.reopened_pages for store in stores),
        saturated_pages=saturated,
        feedback_pages=sum(_feedback_pages(store) for store in stores),
        nearest_pages=sum(_nearest_pages(store) for store in stores),
        implementation=" and ".join(sorted(log.paged)),
        implementation_reason=log.reason,
        paged_calls=log.paged.total(),
        prefill_calls=log.prefill,
        open_calls=log.open,
        fallback_calls=sum(log.fallbacks.values()),
        fallback_reasons=dict(log.fallbacks),
        restarts=dict(log.restarts),
        dropped=log.dropped,
    )


def _nearest_pages(store: PagedStore) -> int:
    """Pages whose keys might have been rounded by queries and were not."""
    if store.seen is not None:
        return store.seen.nearest
    return store.sealed_pages * store.batch_size - _feedback_pages(store) if store.codecs[0].uses_queries else 0


def _feedback_pages(store: PagedStore) -> int:
    """Pages whose keys were rounded by queries, or, where a store sees none, by those of a calibration."""
    if store.seen is not None:
        return store.seen.rounded
    return store.batch_size * store.rounded_pages


def _vectors(store: PagedStore, latent_rank: int | None) -> str:
    """What ``store`` holds of a token, in words."""
    latent = store.vectors[0] == (1, latent_rank)  # MLA hands over what it makes keys and values from
    names = ("latents", "rotary keys") if latent else ("keys", "values")
    return ", ".join(f"{name} {heads} x {dim}" for name, (heads, dim) in zip(names, store.vectors, strict=True))


def _dense_bytes(layer: Any) -> int:
    """Bytes of a layer of transformers' own: keys and values, and the tensors in its dicts of states."""
    held = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    held += [x for value in vars(layer).values() if isinstance(value, dict) for x in value.values()]
    return sum(x.nbytes for x in held if isinstance(x, torch.Tensor))
