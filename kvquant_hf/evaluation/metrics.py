"""Next-token distributions compared position by position.

For the exact model's logits x and the other's y at one position, p = softmax(x), q = softmax(y):

* KL(p || q) = sum_v p_v (log p_v - log q_v), in nats: what coding the exact model's choices with q costs extra.  It is
  the usual measure of what quantization does to a model (Dutta et al., "Accuracy is Not All You Need",
  arXiv:2407.09141): unlike perplexity, in which gains and losses at different positions cancel, it cannot improve by
  chance;
* top-1 agreement: whether the most likely token is the same;
* -log p_t and -log q_t of the token t that follows in the text, whose exponential mean is the perplexity.

Everything is computed in float64.  In float32 the rounding of a log-sum-exp alone is about 1e-6, a hundred thousand
times the noise floor of a float32 model.  Float64 copies are made of a slab of positions at a time.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from ..errors import EvaluationError

_SLAB = 1 << 20  # elements of a float64 copy: 8 MiB, so that it stays in a cache


class Scores(NamedTuple):
    """One number per position.

    Args:
        kld: float64 ``[windows, positions]``, KL(exact || other) in nats.
        agrees: bool, whether the most likely token is the same.
        exact_loss: float64, -log probability of the token that follows, from the exact model.
        loss: float64, the same from the other.
    """

    kld: torch.Tensor
    agrees: torch.Tensor
    exact_loss: torch.Tensor
    loss: torch.Tensor


@dataclass(frozen=True)
class Accuracy:
    """Scores of all positions in a few numbers.

    Args:
        positions: how many there are.
        kld_mean, kld_median, kld_q999, kld_max: of KL(exact || other), in nats; ``q999`` is the 99.9 % quantile.
        kld_mean_sealed: mean over the positions that attend to at least one sealed page; NaN if there is none.
        top1_agreement: share of positions, 0 to 1.
        exact_perplexity, perplexity: of the text, by the exact model and by the other.
    """

    positions: int
    kld_mean: float
    kld_median: float
    kld_q999: float
    kld_max: float
    kld_mean_sealed: float
    top1_agreement: float
    exact_perplexity: float
    perplexity: float

    def as_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON: null where there is no number."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def compare(exact: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> Scores:
    """Scores of two sets of logits.

    Args:
        exact: ``[batch, positions, vocabulary]``, any floating dtype.
        other: the same shape.
        targets: ``[batch, positions]``, the token that follows each position.

    Returns:
        Scores ``[batch, positions]`` on the CPU.

    Raises:
        EvaluationError: NaN among the logits.
    """
    x, y, t = exact.flatten(0, 1), other.flatten(0, 1), targets.flatten().unsqueeze(1)
    rows = max(1, _SLAB // x.shape[1])
    parts = []
    for i in range(0, len(x), rows):
        log_p = x[i : i + rows].double().log_softmax(-1)
        log_q = y[i : i + rows].double().log_softmax(-1)
        token = t[i : i + rows]
        losses = (-log_p.gather(1, token), -log_q.gather(1, token))
        p = log_p.exp()
        # Tokens that are impossible (a logit of -inf) add nothing: 0 log 0 = 0.
        kld = (log_p - log_q).mul_(p).masked_fill_(p == 0, 0).sum(-1, keepdim=True)
        agrees = x[i : i + rows].argmax(-1, keepdim=True) == y[i : i + rows].argmax(-1, keepdim=True)
        parts.append(torch.cat([kld, agrees.double(), *losses], dim=1))
    columns = torch.cat(parts).cpu().unflatten(0, targets.shape).unbind(-1)
    if any(column.isnan().any() for column in columns):
        raise EvaluationError(
            "there is NaN among the logits, so nothing can be compared; use --dtype float32, or another policy."
        )
    return Scores(columns[0], columns[1] != 0, columns[2], columns[3])


def join(parts: list[Scores], dim: int) -> Scores:
    """Scores one after the other: ``dim`` 1 for more positions, 0 for more windows."""
    return Scores(*(torch.cat(column, dim) for column in zip(*parts, strict=True)))


def summarize(scores: Scores, page_size: int) -> Accuracy:
    """Statistics over all positions.

    Args:
        scores: ``[windows, positions]``.
        page_size: positions from this one on attend to a sealed page.
    """
    kld = scores.kld.flatten()
    median, q999 = kld.quantile(torch.tensor([0.5, 0.999], dtype=torch.float64)).tolist()
    sealed = scores.kld[:, page_size:]
    return Accuracy(
        positions=kld.numel(),
        kld_mean=float(kld.mean()),
        kld_median=median,
        kld_q999=q999,
        kld_max=float(kld.max()),
        kld_mean_sealed=float(sealed.mean()) if sealed.numel() else math.nan,
        top1_agreement=float(scores.agrees.double().mean()),
        exact_perplexity=float(scores.exact_loss.mean().exp()),
        perplexity=float(scores.loss.mean().exp()),
    )
