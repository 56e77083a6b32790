"""What queries see by their positions, and the online softmax, in plain torch: what every loop over pages needs."""

from typing import NamedTuple

import torch


class View(NamedTuple):
    """What consecutive queries may see by their positions: ``first`` is the position of the first of ``queries``."""

    first: int
    queries: int
    causal: bool
    window: int  # the last so many positions up to the query's own; 0 for all

    def pages(self, page_size: int, pages: int) -> tuple[int, int]:
        """Range of pages that any of the queries sees."""
        last = min(pages, (self.first + self.queries - 1) // page_size + 1) if self.causal else pages
        first = max(0, self.first - self.window + 1) // page_size if self.window else 0
        return min(first, last), last

    def seen(self, token: torch.Tensor) -> torch.Tensor | None:
        """bool ``[..., queries, count]`` for tokens at the positions ``token`` ``[..., count]``, or None where all are
        seen."""
        if not (self.causal or self.window):
            return None
        position = torch.arange(self.first, self.first + self.queries, device=token.device).unsqueeze(-1)
        token = token.unsqueeze(-2)
        seen = token <= position if self.causal else torch.ones_like(token <= position)
        return seen & (token > position - self.window) if self.window else seen


class OnlineSoftmax:
    """Online softmax over blocks; rows are ``[batch, heads, rows]``.

    Two accumulators, because packed values may live in a rotated domain while the open page does not; both are rescaled
    together.
    """

    def __init__(self, query: torch.Tensor, value_dim: int) -> None:
        rows = query.shape[:-1]
        self.maximum = query.new_full(rows, float("-inf"))
        self.total = query.new_zeros(rows)
        self.packed = query.new_zeros(*rows, value_dim)
        self.exact = query.new_zeros(*rows, value_dim)

    def weigh(self, scores: torch.Tensor) -> torch.Tensor:
        """Take scores ``[batch, heads, rows, tokens]``, return the weights of these tokens, rescale what is there."""
        maximum = torch.maximum(self.maximum, scores.amax(-1))
        # A row that has seen no token yet keeps maximum -inf; measure from 0 there, so that no inf - inf arises.
        origin = maximum.masked_fill(maximum == float("-inf"), 0.0)
        weights = (scores - origin.unsqueeze(-1)).exp_()
        decay = (self.maximum - origin).exp_()
        self.total = self.total * decay + weights.sum(-1)
        self.packed *= decay.unsqueeze(-1)
        self.exact *= decay.unsqueeze(-1)
        self.maximum = maximum
        return weights

    def add_sinks(self, sinks: torch.Tensor) -> None:
        """Add one logit per row that takes probability and carries no value; ``[heads, rows]``."""
        maximum = torch.maximum(self.maximum, sinks)
        decay = (self.maximum - maximum).exp()
        self.total = self.total * decay + (sinks - maximum).exp()
        self.packed *= decay.unsqueeze(-1)
        self.exact *= decay.unsqueeze(-1)
        self.maximum = maximum
