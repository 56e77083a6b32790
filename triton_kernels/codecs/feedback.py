"""Rounding with feedback, in the metric of the queries.

What attention sees of a key's error e is its product with queries: E[(q.e)^2] = e^T H e with H = E[q q^T], the second
moments of the queries of one key/value head.  With H = (U + I) diag(d) (U + I)^T, U strictly upper triangular,

    e^T H e = sum_j d_j (e_j + sum_{i<j} U_ij e_i)^2

so channels are rounded one after the other, and each takes for its own what those before it have left undone:

    code_j = round(k_j + sum_{i<j} U_ij (k_i - k_hat_i))

Format, bytes and decoding stay what they are.  This is the rounding of GPTQ (arXiv:2210.17323) and LDLQ (QuIP,
arXiv:2307.13304), who round weights in the metric of activations; here keys are rounded in that of queries.
"""

import torch

# Added to the diagonal, of itself: queries seen so far are a sample.  Of its mean it would be what outliers decide.
DAMPING = 0.05


def importance(ranges: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor:
    """What an error of a step costs in each channel, up to a factor; float32 ``[..., D]``.

    Args:
        ranges: float32 ``[..., D]``, maximum minus minimum.
        metric: float32, second moments of the queries that broadcast to ``[..., D, D]``; None: all channels alike.
    """
    size = ranges * ranges
    if metric is None:
        return size
    cost = metric.diagonal(dim1=-2, dim2=-1) * size
    return torch.where(cost.isfinite(), cost, 0.0)  # after an overflow any order will do, but the same everywhere


def ranked(metric: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``metric`` ``[..., D, D]`` with rows and columns in ``order`` (int64 ``[..., D]``)."""
    rows = metric.gather(-2, order.unsqueeze(-1).expand_as(metric))
    return rows.gather(-1, order.unsqueeze(-2).expand_as(metric))


def feedback_factor(metric: torch.Tensor) -> torch.Tensor:
    """U of ``metric`` ``[..., D, D]``, damped; float32, zero on and below the diagonal; all zero where it has none."""
    h = metric.double()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    h = h + torch.diag_embed(torch.where(diagonal > 0, DAMPING * diagonal, 1.0))
    # The factor from the end is that from the beginning of the matrix turned round.
    lower, failed = torch.linalg.cholesky_ex(h.flip(-1, -2))
    upper = lower.flip(-1, -2)
    factor = (upper / upper.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)).triu(1).float()
    return torch.where((failed != 0)[..., None, None], torch.zeros_like(factor), factor)
