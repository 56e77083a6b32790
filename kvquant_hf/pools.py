"""Page pools of a model, which its caches share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .errors import PoolMismatchError, UnknownPolicyError
from .pages.budget import Budget
from .pages.pool import LayerPool
from .policies.fingerprint import fingerprint
from .policies.table import PolicyLike
from .reports.report import format_size
from .transformers_api.auto import budget_in_bytes, policy_for


@dataclass(frozen=True)
class PoolReport:
    """Pools at one moment, all layers together.

    Args:
        policy: name of the policy.
        page_size: tokens per page.
        layers: pools that exist; a layer's is made with its first keys.
        max_pages: pages that each layer may have, or None.
        max_bytes: bytes that all pools may have, or None.
        used_pages: pages that some cache holds, summed over the layers, each once.
        used_bytes: their bytes.
        unused_bytes: bytes reserved and held by no cache.
        claimed_bytes: bytes that steps being computed were promised and have not taken yet.
        free_bytes: bytes that caches can still take, unused ones included; None without a budget.
        offloaded_bytes: bytes of the pools in the CPU's memory, of layers on another device.
    """

    policy: str
    page_size: int
    layers: int
    max_pages: int | None
    max_bytes: int | None
    used_pages: int
    used_bytes: int
    unused_bytes: int
    claimed_bytes: int
    free_bytes: int | None
    offloaded_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        free = "no budget" if self.free_bytes is None else f"{format_size(self.free_bytes)} free"
        return (
            f"{self.policy}, pages of {self.page_size} tokens in {self.layers} layers: {self.used_pages} used "
            f"({format_size(self.used_bytes)}), {format_size(self.unused_bytes)} unused, {free}"
        )


class PagePools:
    """Where the caches of one model get their pages: one pool per layer, and a budget over them.

    Caches made with ``pool=`` draw from it until the last page; what a cache gives back (``reset``, ``del``, ``crop``)
    the others can take.  Thread-safe: each cache may run in a thread of its own.

    Args:
        config: the model's config.
        policy: as for ``QuantizedPagedCache``.
        page_size: tokens per page; a multiple of 8.
        max_pages: pages that each layer may have, over all caches.
        max_bytes: bytes of the packed pages of all layers and caches, reserved ones included; not counted are open
            pages and page tables.  Give one of the two, or neither for no bound.
        offload: keep the pages in the CPU's memory and bring each layer's to the device ahead of its turn.
        bits, kv_budget, max_length: as for ``QuantizedPagedCache``; ``kv_budget`` is ``max_bytes`` too.

    Raises:
        UnknownPolicyError: unknown policy, or an option that is out of range.
        UnsupportedModelError: ``"auto"`` for a model whose config does not say what a page holds.
        WrongModelError: a policy by layer that was tuned for another model.

    Example:
        >>> pools = PagePools(model.config, "int4", max_bytes=2_000_000_000)
        >>> caches = [QuantizedPagedCache(model.config, pool=pools) for _ in requests]
    """

    def __init__(
        self,
        config: Any,
        policy: PolicyLike = "int4",
        *,
        page_size: int = 64,
        max_pages: int | None = None,
        max_bytes: int | None = None,
        offload: bool = False,
        bits: float | None = None,
        kv_budget: int | str | None = None,
        max_length: int | None = None,
    ) -> None:
        if not isinstance(page_size, int) or page_size < 8 or page_size % 8:
            raise UnknownPolicyError(f"page_size must be a positive multiple of 8, got {page_size!r}.")
        for name, bound in (("max_pages", max_pages), ("max_bytes", max_bytes)):
            if bound is not None and (not isinstance(bound, int) or isinstance(bound, bool) or bound < 1):
                raise UnknownPolicyError(f"{name} must be a positive integer, got {bound!r}.")
        given = {"max_pages": max_pages, "max_bytes": max_bytes, "kv_budget": kv_budget}
        names = [name for name, bound in given.items() if bound is not None]
        if len(names) > 1:
            raise UnknownPolicyError(f"{' and '.join(names)} are ways to give a budget; leave all but one of them out.")
        if kv_budget is not None:
            kv_budget = max_bytes = budget_in_bytes(kv_budget)
        elif max_length is not None:
            raise UnknownPolicyError("max_length says for how many tokens a kv_budget is; leave it out without one.")
        if not isinstance(offload, bool):
            raise UnknownPolicyError(f"offload must be True or False, got {offload!r}.")
        budget = {"bits": bits, "kv_budget": kv_budget, "max_length": max_length}
        self.policy = policy_for(config, policy, page_size, **budget)  # type: ignore[arg-type]
        self.page_size = page_size
        self.offload = offload
        self.budget = Budget(max_pages, max_bytes)
        self._fingerprint = fingerprint(config)
        self.policy.check_model(self._fingerprint)
        self._layers: list[LayerPool] = []

    def check(self, config: Any, **options: Any) -> PagePools:
        """These pools, if they suit a cache of ``config`` with ``options`` (of :class:`PagePools`).

        Raises:
            PoolMismatchError: they do not.
        """
        if fingerprint(config) != self._fingerprint:
            raise PoolMismatchError(
                f"these pools were made for the config {self._fingerprint}, the cache is for {fingerprint(config)}; "
                "make pools of its own for each model."
            )
        bits = options.pop("bits", None) if "policy" in options else None
        held = {"policy": self.policy, "page_size": self.page_size, "offload": self.offload}
        for name, value in options.items():
            if name not in held:
                raise PoolMismatchError(f"{name} belongs to shared pools as a whole; give it to PagePools instead.")
            if name == "policy":
                value = policy_for(config, value, self.page_size, bits=bits)
            if value != held[name]:
                raise PoolMismatchError(
                    f"these pools have {name}={getattr(held[name], 'name', held[name])!r}, the cache asks for "
                    f"{getattr(value, 'name', value)!r}; leave {name} out, or make other pools."
                )
        return self

    def layer_pools(self) -> Iterator[LayerPool]:
        """What the paged layers of one cache draw from, first layer first, without end."""
        for i in itertools.count():
            with self.budget.lock:
                if i == len(self._layers):
                    self._layers.append(LayerPool(self.budget, self.offload))
            yield self._layers[i]

    def report(self) -> PoolReport:
        """What the pools hold for all caches."""
        budget = self.budget
        with budget.lock:
            pools = budget.pools
            used = [pool.used for pool in pools]
            used_bytes = sum(n * pool.page_bytes for n, pool in zip(used, pools, strict=True))
            claimed = budget.promised_bytes
            limit = budget.max_bytes
            if budget.max_pages is not None:
                limit = sum(budget.max_pages * pool.page_bytes for pool in pools)
            return PoolReport(
                policy=self.policy.name,
                page_size=self.page_size,
                layers=len(pools),
                max_pages=budget.max_pages,
                max_bytes=budget.max_bytes,
                used_pages=sum(used),
                used_bytes=used_bytes,
                unused_bytes=sum(pool.nbytes for pool in pools) - used_bytes,
                claimed_bytes=claimed,
                free_bytes=None if limit is None else limit - used_bytes - claimed,
                offloaded_bytes=sum(pool.host_bytes for pool in pools),
            )

    def __deepcopy__(self, memo: dict[int, object]) -> PagePools:
        return self  # forks draw from the same pools
