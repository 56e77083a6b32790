"""The first tokens as they came, beside the pages in which they lie: against float64, in plain torch and in C++."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Case, Problem, check, make_problem, with_first

from kvquant_hf.triton_kernels.cpu.attention import paged_attention_cpu
from kvquant_hf.triton_kernels.reference import gather_dense, paged_attention_reference

Attention = Callable[..., torch.Tensor]
implementations = pytest.mark.parametrize(
    "attention", [paged_attention_reference, paged_attention_cpu], ids=["reference", "cpu"]
)
# Sequences, where the first of them begins, and how many are read so; the last page that is sealed ends before the last
# token.  A page's end cuts them, and a place in the open page counts too, as static caches have them.
CASES = [
    (Case(65), 1, (0,)),
    (Case(40, 64, 96, group=4, batch=3, page_size=8), 2, (0, 13, -1)),
    (Case(40, 80, 64, group=7, queries=5, batch=3, page_size=8), 3, (6, -2, 15)),
    (Case(200, 128, 128, heads=1, group=2, queries=70, batch=2), 1, (37, 190)),
    (Case(200, 64, 64, queries=3, batch=2, page_size=16), 15, (0, 33)),
]


@implementations
@pytest.mark.parametrize("policy", ["exact", "int4", "turboquant", "turboquant-qjl"])
@pytest.mark.parametrize(("case", "count", "at"), CASES, ids=str)
def test_against_float64(policy: str, case: Case, count: int, at: tuple[int, ...], attention: Attention) -> None:
    problem = with_first(make_problem(policy, case), count, at)
    check_loosely(problem, attention=attention)
    for side, dense in ((problem.keys, problem.dense_keys), (problem.values, problem.dense_values)):
        assert torch.equal(gather_dense(side, problem.page_table).double(), dense)


def check_loosely(problem: Problem, other_scores: float = 0.0, **options: Any) -> torch.Tensor:
    """Within the budget, in which the first tokens' scores count: they are three times as long as the others."""
    assert problem.keys.first is not None
    q = problem.query.double().norm(dim=-1).max() * problem.query.shape[-1] ** -0.5
    longest = problem.keys.first.double().nan_to_num().norm(dim=-1).max()
    return check(problem, other_scores=other_scores + float(q * longest), **options)


@implementations
def test_masks_windows_softcap_and_causal_rule_by_their_own_position(attention: Attention) -> None:
    case = Case(150, group=4, queries=70, batch=3)
    problem = with_first(make_problem("int4", case), 2, (0, 37, -1))
    options = {"attention": attention}
    seen = torch.rand(3, 1, 70, 150, generator=torch.Generator().manual_seed(3)) > 0.5
    check_loosely(problem, mask=seen, **options)
    per_head = torch.randn(1, 8, 1, 150, generator=torch.Generator().manual_seed(4))
    check_loosely(problem, mask=per_head, causal=False, other_scores=4.0, **options)
    check_loosely(problem, softcap=5.0, other_scores=5.0, **options)
    windows = [check_loosely(problem, window=window, **options) for window in (10, 90, 130)]
    others = with_first(make_problem("int4", case), 2, (-1, -1, -1))
    outside = check_loosely(others, window=10, **options)
    assert torch.equal(windows[0], outside), "the last 10 tokens before each query, and the first is none of them"
    assert not torch.equal(windows[2], check_loosely(others, window=130, **options))
    hidden = (torch.arange(150) >= 2).expand(1, 1, 70, 150)
    assert torch.equal(  # a mask hides the first sequence's alone
        check_loosely(problem, mask=hidden, **options)[0], check_loosely(others, mask=hidden, **options)[0]
    )


@implementations
def test_ragged_sequences_with_strided_open_pages(attention: Attention) -> None:
    """Of sequences with other numbers of tokens each has its own, as a call by itself gives them."""
    problem = with_first(make_problem("int4", Case(300, group=3, queries=2, batch=3)), 1, (0, 5, 130))
    lengths = torch.tensor([[4, 44], [1, 17], [3, 44]], dtype=torch.int32)
    together = attention(problem.query, problem.keys, problem.values, problem.page_table, lengths, scale=0.1)
    for b in range(3):
        one = slice(b, b + 1)
        sides = [side.of(one) for side in problem[1:3]]
        alone = attention(problem.query[one], *sides, problem.page_table[one], lengths[one], scale=0.1)
        torch.testing.assert_close(together[one], alone)
