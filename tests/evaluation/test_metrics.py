"""Distributions compared: against scipy, at the noise floor, with impossible tokens, in slabs of any size."""

import math

import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from kvquant_hf.errors import EvaluationError
from kvquant_hf.evaluation import metrics
from kvquant_hf.evaluation.metrics import Scores, compare, join, summarize

VOCAB = 50


def logits(seed: int, scale: float = 3.0, shape: tuple[int, ...] = (2, 7, VOCAB)) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def targets(shape: tuple[int, int] = (2, 7)) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(9))


def test_scores_are_those_of_scipy() -> None:
    x, y, t = logits(0), logits(1), targets()
    scores = compare(x, y, t)
    p, q = (softmax(z.double().numpy(), axis=-1) for z in (x, y))
    assert torch.allclose(scores.kld, torch.from_numpy(entropy(p, q, axis=-1)), rtol=1e-12)
    for loss, r in ((scores.exact_loss, p), (scores.loss, q)):
        chosen = torch.from_numpy(r).gather(-1, t.unsqueeze(-1)).squeeze(-1)
        assert torch.allclose(loss, -chosen.log(), rtol=1e-12)
    assert torch.equal(scores.agrees, x.argmax(-1) == y.argmax(-1)) and 0 < scores.agrees.sum() < 14


def test_a_shift_of_all_logits_is_no_difference() -> None:
    x = logits(0).double()
    assert float(compare(x, x + 1000, targets()).kld.abs().max()) < 1e-12


def test_small_differences_are_not_drowned() -> None:
    """For y = x + d, KL is half the variance of d under p, up to terms of third order."""
    x, d = logits(0).double(), 1e-6 * logits(1).double()
    p = x.softmax(-1)
    half_variance = 0.5 * ((p * d.square()).sum(-1) - (p * d).sum(-1).square())
    assert torch.allclose(compare(x, x + d, targets()).kld, half_variance, rtol=1e-3)


def test_impossible_tokens_cost_nothing_unless_they_were_possible() -> None:
    x, y = logits(0), logits(1)
    t = torch.zeros_like(targets())
    x[..., 5] = y[..., 5] = -torch.inf
    assert compare(x, y, t).kld.isfinite().all()
    y[..., 6] = -torch.inf
    assert compare(x, y, t).kld.eq(torch.inf).all()


def test_nan_is_refused() -> None:
    y = logits(1)
    y[0, 3, 4] = torch.nan
    with pytest.raises(EvaluationError, match="NaN"):
        compare(logits(0), y, targets())


@pytest.mark.parametrize("slab", [1, VOCAB, 3 * VOCAB, 100 * VOCAB])
def test_slabs_change_nothing(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare(logits(0), logits(1), targets())
    monkeypatch.setattr(metrics, "_SLAB", slab)
    for a, b in zip(whole, compare(logits(0), logits(1), targets()), strict=True):
        assert torch.equal(a, b)


def test_summary() -> None:
    kld = torch.arange(2000, dtype=torch.float64).view(2, 1000)
    agrees = kld < 500
    loss = torch.full_like(kld, math.log(7))
    accuracy = summarize(Scores(kld, agrees, loss + 1, loss), page_size=64)
    assert accuracy.positions == 2000
    assert (accuracy.kld_mean, accuracy.kld_median, accuracy.kld_max) == (999.5, 999.5, 1999)
    assert accuracy.kld_q999 == pytest.approx(0.999 * 1999)
    assert accuracy.kld_mean_sealed == pytest.approx((64 + 999) / 2 + 500)  # the mean of 64..999 and 1064..1999
    assert accuracy.top1_agreement == 0.25
    assert accuracy.perplexity == pytest.approx(7) and accuracy.exact_perplexity == pytest.approx(7 * math.e)
    assert summarize(Scores(kld, agrees, loss, loss), page_size=1000).as_dict()["kld_mean_sealed"] is None


def test_join() -> None:
    a, b = compare(logits(0), logits(1), targets()), compare(logits(2), logits(3), targets())
    assert join([a, b], dim=0).kld.shape == (4, 7)
    assert torch.equal(join([a, b], dim=1).loss, torch.cat([a.loss, b.loss], dim=1))
