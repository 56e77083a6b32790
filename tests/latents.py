"""Attention over latents (MLA) with its float64 answer, for every implementation.

``make_problem`` gives latents as keys and rotary keys as values, one head each; queries here are of both.
"""

from collections.abc import Callable
from typing import Any

import torch
from budgets import SAFETY, magnitudes
from problems import Case, Problem, make_problem, softmax_attention

from kvquant_hf.triton_kernels.latent import latent_attention_reference
from kvquant_hf.triton_kernels.ops import PagedSide


def make_latents(policy: str, case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    """``case``: ``key_dim`` is the rank, ``value_dim`` the rotary elements, ``group`` the query heads."""
    problem = make_problem(policy, case._replace(heads=1), dtype, seed)
    shape = (case.batch, case.group, case.queries, case.key_dim + case.value_dim)
    return problem._replace(query=torch.randn(shape, generator=torch.Generator().manual_seed(seed + 2)).to(dtype))


def textbook(problem: Problem, scale: float, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and output, float64: keys are latents and rotary keys, values the latents."""
    keys = torch.cat((problem.dense_keys, problem.dense_values), -1)
    return softmax_attention(problem._replace(dense_keys=keys, dense_values=problem.dense_keys), scale, **options)


def latent_budget(
    query: torch.Tensor,
    sides: tuple[PagedSide, PagedSide],
    page_table: torch.Tensor,
    weights: torch.Tensor,
    reference: torch.Tensor,
    scale: float,
    other_scores: float = 0.0,
) -> torch.Tensor:
    """Bound on ``|output - reference|_2`` of each row, by the model of ``budgets.attention_budget``; the sum of a score
    goes through both sides."""
    unit = torch.finfo(torch.float32).eps / 2
    held = [magnitudes(side, page_table) for side in sides]
    parts = (query.double() * scale).split([x.shape[3] for x in held], -1)
    squares, rotated = torch.zeros(()).double(), torch.zeros(()).double()
    for side, q, k in zip(sides, parts, held, strict=True):
        products = q.square() @ k.square().transpose(-1, -2)  # the open page is not rotated
        if side.codec.rotated:
            products = torch.maximum(products, side.codec.to_domain(q).square() @ k.square().transpose(-1, -2))
            rotated = rotated + q.norm(dim=-1, keepdim=True) * k.norm(dim=-1).unsqueeze(-2)
        squares = squares + products
    elements = sum(x.shape[3] for x in held)
    score_error = (2 * elements) ** 0.5 * (squares.sqrt() + rotated) + other_scores + 2
    length = held[0].norm(dim=-1).unsqueeze(-2)
    scoring = (weights * score_error * (length + reference.norm(dim=-1, keepdim=True))).sum(-1)
    weighing = (2 * weights.shape[-1] ** 0.5 + held[0].shape[3] ** 0.5) * (weights * length).sum(-1)
    rounding = torch.zeros_like(weighing)
    if query.dtype != torch.float64:
        info = torch.finfo(query.dtype)
        rounding = info.eps * (reference.norm(dim=-1) + info.smallest_normal * held[0].shape[3] ** 0.5)
    return SAFETY * unit * (scoring + weighing) + rounding


def check_latents(
    problem: Problem,
    attention: Callable[..., torch.Tensor] = latent_attention_reference,
    other_scores: float = 0.0,
    noise: float = 0.0,
    **options: Any,
) -> torch.Tensor:
    """Compare with the textbook, row by row, within the budget; returns the output.

    Args:
        noise: what the rounding of operands to 16 bits may add, as a share of each row.
    """
    scale = problem.query.shape[-1] ** -0.5
    weights, expected = textbook(problem, scale, **options)
    output = attention(*problem[:5], scale=scale, **options)
    assert output.shape == expected.shape and output.dtype == problem.query.dtype
    budget = latent_budget(problem.query, problem[1:3], problem.page_table, weights, expected, scale, other_scores)
    error = (output.double() - expected).norm(dim=-1)
    budget = budget + noise * expected.norm(dim=-1)
    assert (error <= budget).all(), (
        f"error {error.max():.1e} is {(error / budget).nan_to_num().max():.2f} of the budget"
    )
    return output
