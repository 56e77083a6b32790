"""Keys rounded in the metric of queries: the factor, what it is for, and the same bytes wherever it runs."""

import pytest
import torch

from kvquant_hf.triton_kernels.append_reference import encode_pages
from kvquant_hf.triton_kernels.codecs import CODECS
from kvquant_hf.triton_kernels.codecs.feedback import DAMPING, feedback_factor, ranked
from kvquant_hf.triton_kernels.cpu import append

RANKED = ["int4-ranked", "int3-ranked", "int2-ranked"]


def queries(heads: int, dim: int) -> torch.Tensor:
    """Queries ``[heads, 400, dim]`` of which a few directions have nearly all the length."""
    generator = torch.Generator().manual_seed(dim)
    size = torch.exp(-torch.arange(dim) / (dim / 8))
    mixed = torch.randn(heads, dim, dim, generator=generator)
    return torch.randn(heads, 400, dim, generator=generator) * size @ mixed


def keys(dim: int) -> torch.Tensor:
    """Pages ``[1, 2, 2, 64, dim]`` with channels of all sizes, and a few far from zero."""
    generator = torch.Generator().manual_seed(dim + 1)
    x = torch.randn(1, 2, 2, 64, dim, generator=generator) * torch.rand(dim, generator=generator) * 3
    return x + 8 * torch.randn(dim, generator=generator)


def moments(q: torch.Tensor) -> torch.Tensor:
    return q.transpose(1, 2) @ q


def encoded(name: str, x: torch.Tensor, metric: torch.Tensor | None, encode=encode_pages) -> list[torch.Tensor]:
    planes = [torch.zeros(2, 2, *p.shape(64), dtype=p.dtype) for p in CODECS[name].planes(x.shape[-1])]
    metric = None if metric is None else metric[None, None].contiguous()  # of one sequence, for both of its pages
    encode(CODECS[name], planes, x, torch.tensor([[1, 0]]), metric)
    return planes


def test_the_factor_takes_the_metric_apart() -> None:
    h = moments(queries(3, 16)).double()
    damped = h + DAMPING * h * torch.eye(16)
    factor = feedback_factor(h).double()
    assert torch.equal(factor, factor.triu(1))
    unit = factor + torch.eye(16)
    # What is left between the unit factors is diagonal, and positive.
    middle = torch.linalg.solve(unit, torch.linalg.solve(unit, damped).transpose(1, 2))
    diagonal = middle.diagonal(dim1=1, dim2=2)
    assert (diagonal > 0).all()
    torch.testing.assert_close(unit @ torch.diag_embed(diagonal) @ unit.transpose(1, 2), damped, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("broken", [0.0, float("nan"), -1.0])
def test_a_metric_that_is_none_leaves_the_nearest_codes(broken: float) -> None:
    """No queries yet, or numbers that overflowed: the factor is zero and nothing is passed on."""
    assert not feedback_factor(torch.full((2, 8, 8), broken)).any()


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("name", RANKED)
def test_scores_are_nearer(name: str, dim: int) -> None:
    """The same bytes, and errors of scores that are smaller by a quarter at least: by order and by feedback."""
    q, x = queries(2, dim), keys(dim)
    errors = []
    for metric in (None, moments(q)):
        planes = [plane[[1, 0]][None] for plane in encoded(name, x, metric)]
        wrong = CODECS[name].decode(planes) - x
        errors.append((q[None, None] @ wrong.transpose(-1, -2)).pow(2).mean().sqrt())
    assert errors[1] < 0.75 * errors[0]


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("name", RANKED)
def test_kernels_store_the_bytes_of_torch(name: str, dim: int) -> None:
    """But for codes that lie on the half to the last bit of a sum, of which these have none."""
    x = keys(dim)
    for metric in (None, moments(queries(2, dim)), torch.full((2, dim, dim), float("nan"))):
        expected, found = encoded(name, x, metric), encoded(name, x, metric, append._encode)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_power_of_two_on_a_channel_changes_no_code() -> None:
    """Outliers cancel: a channel of keys made larger comes with queries made smaller."""
    q, x = queries(2, 64), keys(64)
    size = torch.ones(64)
    size[[3, 40]] = 32.0
    plain, scaled = encoded("int4-ranked", x, moments(q)), encoded("int4-ranked", x * size, moments(q / size))
    assert torch.equal(plain[0], scaled[0]) and torch.equal(plain[1], scaled[1]) and torch.equal(plain[4], scaled[4])


def test_the_order_of_a_metric() -> None:
    h = torch.arange(9.0).view(1, 3, 3)
    assert torch.equal(ranked(h, torch.tensor([[2, 0, 1]]))[0], torch.tensor([[8.0, 6, 7], [2, 0, 1], [5, 3, 4]]))
