"""The door to attention over packed pages: callers see these functions, not what runs behind them."""

from .reference import PagedSide, gather_dense, paged_attention_reference

__all__ = ["IMPLEMENTATION", "PagedSide", "gather_dense", "paged_attention"]

# What ``paged_attention`` runs today, as ``cache.report()`` names it.
IMPLEMENTATION = "reference"

paged_attention = paged_attention_reference
