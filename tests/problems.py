"""Attention problems over pages with their float64 answer, for every implementation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from budgets import attention_budget
from calibrated import with_range
from stores import vectors

from kvquant_hf.policies.table import parse_policy
from kvquant_hf.triton_kernels.codecs import CODECS
from kvquant_hf.triton_kernels.ops import PagedSide
from kvquant_hf.triton_kernels.reference import paged_attention_reference

PAGE = 64


class Problem(NamedTuple):
    """Arguments of an attention call, and the same keys and values multiplied out in float64."""

    query: torch.Tensor
    keys: PagedSide
    values: PagedSide
    page_table: torch.Tensor
    lengths: torch.Tensor
    dense_keys: torch.Tensor
    dense_values: torch.Tensor


class Case(NamedTuple):
    """Sizes of a problem."""

    tokens: int
    key_dim: int = 64
    value_dim: int = 64
    heads: int = 2
    group: int = 1
    queries: int = 1
    batch: int = 1
    page_size: int = PAGE

    def __str__(self) -> str:
        dims = f"K{self.key_dim}V{self.value_dim}-H{self.heads}-G{self.group}"
        return f"T{self.tokens}-{dims}-Q{self.queries}-B{self.batch}-P{self.page_size}"


def paged(codec_name: str, x: torch.Tensor, page_size: int, table: torch.Tensor, physical: int) -> PagedSide:
    """``x`` in pages at the places of ``table``; all other pages and the rest of the open page are NaN or 0xAB."""
    batch, heads, tokens, dim = x.shape
    codec = with_range(CODECS[codec_name], heads, dim)
    sealed = table.shape[1] * page_size
    planes = []
    for plane in codec.planes(dim):
        stored = torch.empty(physical, heads, *plane.shape(page_size), dtype=plane.dtype or x.dtype)
        planes.append(stored.fill_(float("nan") if stored.is_floating_point() else 0xAB))
    encoded = codec.encode(x[:, :, :sealed].unflatten(2, (table.shape[1], page_size)).transpose(1, 2))
    for stored, plane in zip(planes, encoded, strict=True):
        stored[table] = plane
    room = torch.full((batch, heads, page_size, dim), float("nan"), dtype=x.dtype)
    room[:, :, : tokens - sealed] = x[:, :, sealed:]
    return PagedSide(codec, planes, room[:, :, : tokens - sealed], page_size)


def make_problem(policy: str, case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    parsed = parse_policy(policy)
    keys = vectors(case.batch, case.heads, case.tokens, case.key_dim, dtype=dtype, seed=seed)
    values = vectors(case.batch, case.heads, case.tokens, case.value_dim, dtype=dtype, seed=seed + 1)
    pages = max(0, case.tokens - 1) // case.page_size
    physical = case.batch * pages + 3
    order = torch.randperm(physical, generator=torch.Generator().manual_seed(seed))
    table = order[: case.batch * pages].reshape(case.batch, pages).int()
    sides = [
        paged(name, x, case.page_size, table, physical) for name, x in ((parsed.keys, keys), (parsed.values, values))
    ]
    shape = (case.batch, case.heads * case.group, case.queries, case.key_dim)
    query = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 2)).to(dtype)
    decoded = [decode(side, table) for side in sides]
    lengths = torch.tensor([[pages, case.tokens - pages * case.page_size]] * case.batch, dtype=torch.int32)
    return Problem(query, sides[0], sides[1], table, lengths, decoded[0], decoded[1])


def decode(side: PagedSide, table: torch.Tensor) -> torch.Tensor:
    """The whole side through ``codec.decode``, page by page, in float64."""
    rows = []
    for sequence in table.long():
        pages = [side.codec.decode([plane[page] for plane in side.planes]).double() for page in sequence]
        rows.append(torch.cat(pages, 1) if pages else side.tail[0, :, :0].double())
    return torch.cat([torch.stack(rows), side.tail.double()], 2)


def softmax_attention(
    problem: Problem,
    scale: float,
    causal: bool = True,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    window: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The textbook, in float64: weights and output."""
    query = problem.query.double()
    group = query.shape[1] // problem.dense_keys.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (problem.dense_keys, problem.dense_values))
    scores = query @ keys.transpose(-1, -2) * scale
    queries, tokens = scores.shape[-2:]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        scores = scores.masked_fill(~torch.ones(queries, tokens).tril(tokens - queries).bool(), float("-inf"))
    if window:
        scores = scores.masked_fill(torch.ones(queries, tokens).tril(tokens - queries - window).bool(), float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.double()
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., :tokens]  # a row that sees nothing is zero by agreement
    return weights, weights @ values


def check(
    problem: Problem,
    scale: float | None = None,
    other_scores: float = 0.0,
    attention: Callable[..., torch.Tensor] = paged_attention_reference,
    **options: Any,
) -> torch.Tensor:
    """Compare with the textbook, row by row, within the budget; returns the output."""
    scale = problem.query.shape[-1] ** -0.5 if scale is None else scale
    weights, expected = softmax_attention(problem, scale, **options)
    output = attention(*problem[:5], scale=scale, **options)
    assert output.shape == expected.shape and output.dtype == problem.query.dtype
    budget = attention_budget(*problem[:4], weights, expected, scale=scale, other_scores=other_scores)
    error = (output.double() - expected).norm(dim=-1)
    assert (error <= budget).all(), (
        f"error {error.max():.1e} is {(error / budget).nan_to_num().max():.2f} of the budget"
    )
    return output


def with_first(problem: Problem, count: int, at: tuple[int, ...]) -> Problem:
    """``count`` tokens of each sequence from ``at`` on read as they came (negative: none): other vectors than those in
    the pages.  The rest of their memory is NaN."""
    page, dense, sides = problem.keys.page_size, [], []
    positions = torch.tensor(at, dtype=torch.int32)
    for i, (side, whole) in enumerate(((problem.keys, problem.dense_keys), (problem.values, problem.dense_values))):
        batch, heads, _, dim = whole.shape
        rows = torch.full((batch, heads, count, dim), float("nan"), dtype=side.tail.dtype)
        whole = whole.clone()
        for b, begin in enumerate(at):
            some = min(count, page - begin % page) if begin >= 0 else 0
            rows[b, :, :some] = 3 * vectors(1, heads, some, dim, dtype=side.tail.dtype, seed=40 + 2 * b + i)[0]
            whole[b, :, begin : begin + some] = rows[b, :, :some].double() if some else whole[b, :, begin:begin]
        sides.append(side._replace(first=rows, first_at=positions))
        dense.append(whole)
    return problem._replace(keys=sides[0], values=sides[1], dense_keys=dense[0], dense_values=dense[1])
