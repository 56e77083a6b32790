"""Second moments of queries: the metric in which keys are rounded (``codecs/feedback.py``), and how it is kept."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

PRIOR_TOKENS = 256  # for how many tokens a prior counts
_SAMPLE = 64  # tokens with whose queries correlations count half
_SUMMED = 256  # tokens whose queries are multiplied out at a time


@functools.lru_cache(maxsize=16)
def _below(dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of what is below the diagonal of a matrix."""
    rows, columns = torch.tril_indices(dim, dim, -1, device=device)
    return rows, columns


class Moments(NamedTuple):
    """A symmetric matrix in a quarter of its bytes; what fp16 rounds of it is far below what is added as damping."""

    diagonal: torch.Tensor  # float32 [heads, head_dim]
    correlations: torch.Tensor  # fp16 [heads, head_dim (head_dim - 1) / 2]: below the diagonal, over the roots of both

    @classmethod
    def of(cls, matrix: torch.Tensor) -> Moments:
        """Of float32 ``[heads, head_dim, head_dim]``."""
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        size = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
        rows, columns = _below(matrix.shape[1], matrix.device)
        scaled = matrix * size.unsqueeze(1) * size.unsqueeze(2)
        return cls(diagonal.clone(), scaled[:, rows, columns].half())

    def matrix(self) -> torch.Tensor:
        """The matrix again."""
        size, (heads, dim) = self.diagonal.sqrt(), self.diagonal.shape
        rows, columns = _below(dim, size.device)
        lower = size.new_zeros(heads, dim * dim).index_copy_(1, rows * dim + columns, self.correlations.float())
        lower = lower.view(heads, dim, dim)
        full = (lower + lower.transpose(1, 2)) * size.unsqueeze(1) * size.unsqueeze(2)
        return full + torch.diag_embed(self.diagonal)

    def to(self, device: torch.device) -> Moments:
        """The same on ``device``."""
        return Moments(self.diagonal.to(device), self.correlations.to(device))

    def times(self, count: int) -> Moments:
        """The matrix ``count`` times."""
        return Moments(self.diagonal * count, self.correlations)

    def __deepcopy__(self, memo: dict[int, object]) -> Moments:
        return self  # nobody writes into it


def takes(query: torch.Tensor, heads: int, head_dim: int) -> bool:
    """Whether ``query`` ``[batch, query_heads, tokens, head_dim]`` can be of keys of so many ``heads``."""
    return query.dim() == 4 and query.shape[1] % heads == 0 and query.shape[3] == head_dim


def products(query: torch.Tensor, heads: int) -> torch.Tensor:
    """The sum of q q^T over tokens and over the queries of each key/value head, float32 ``[batch, heads, head_dim,
    head_dim]``, of ``query`` ``[batch, query_heads, tokens, head_dim]``."""
    total = None
    for part in query.split(_SUMMED, 2):
        rows = part.unflatten(1, (heads, -1)).flatten(2, 3).float()  # [batch, heads, queries, head_dim]
        summed = rows.transpose(2, 3) @ rows
        total = summed if total is None else total + summed
    assert total is not None
    return total


def damped(metric: torch.Tensor, count: int) -> torch.Tensor:
    """``metric`` ``[..., head_dim, head_dim]`` of the queries of ``count`` tokens, changed in place: of few tokens it
    says little but on its diagonal, and as little is made of the rest."""
    diagonal = metric.diagonal(dim1=-2, dim2=-1)
    diagonal *= 1 + _SAMPLE / max(1, count)
    return metric


def metric_of(prior: Moments) -> torch.Tensor:
    """The metric of one who has a ``prior`` and has seen nothing; float32 ``[heads, head_dim, head_dim]``."""
    return damped(prior.times(PRIOR_TOKENS).matrix(), PRIOR_TOKENS)
