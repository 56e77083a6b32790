"""paged_attention_reference against plain float64 softmax attention over what the codecs decode to."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import PAGE, Case, check, make_problem, softmax_attention
from torch.utils._python_dispatch import TorchDispatchMode

from kvquant_hf.policies.table import POLICIES
from kvquant_hf.triton_kernels import reference
from kvquant_hf.triton_kernels.reference import gather_dense, paged_attention_reference

policies = pytest.mark.parametrize("policy", list(POLICIES))


CASES = [
    Case(1),
    Case(PAGE - 1, 80, 80, group=4),
    Case(PAGE, 96, 96, group=7, queries=3),
    Case(PAGE + 1, 128, 128, group=4, batch=3),
    Case(PAGE + 1, 64, 64, heads=1, queries=PAGE + 1),
    Case(200, 64, 128, group=4, queries=16, batch=3),
    Case(200, 128, 64, group=7, queries=70),
    Case(200, 80, 96, heads=3, queries=3, batch=3, page_size=16),
    Case(1000, 64, 64, group=4, batch=3),
    Case(1000, 96, 80, heads=1, group=7, queries=16),
    Case(1000, 128, 128, queries=70, batch=3, page_size=32),
]


@policies
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes(policy: str, case: Case) -> None:
    check(make_problem(policy, case))


@policies
def test_budget_notices_small_mistakes(policy: str) -> None:
    """Scales off by a thousandth, and one pair of neighbouring tokens swapped, are outside of every budget."""
    problem = make_problem(policy, Case(200, queries=3))
    swapped = list(range(200))
    swapped[70], swapped[71] = 71, 70
    for name, change in {
        "key scale": {"dense_keys": problem.dense_keys * 1.001},
        "value scale": {"dense_values": problem.dense_values * 1.001},
        "value order": {"dense_values": problem.dense_values[:, :, swapped]},
    }.items():
        with pytest.raises(AssertionError, match="of the budget"):
            check(problem._replace(**change))
            pytest.fail(f"{name} went unnoticed")


@policies
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=["fp16", "bf16", "fp64"])
def test_dtypes(policy: str, dtype: torch.dtype) -> None:
    check(make_problem(policy, Case(200, group=4, queries=3, batch=2), dtype))


@policies
def test_float64_queries_are_computed_in_float64(policy: str) -> None:
    """Without pages, so that nothing is float32: the open page alone, at float64 precision."""
    problem = make_problem(policy, Case(PAGE, group=2, queries=5), torch.float64)
    output = paged_attention_reference(*problem[:5], scale=0.125)
    # A thousand roundings of 1e-16 relative to scores and values of size 10.
    assert (output - softmax_attention(problem, 0.125)[1]).abs().max() < 1e-12


def test_no_tokens_at_all_gives_zeros() -> None:
    problem = make_problem("int4", Case(0, queries=2, batch=2))
    output = paged_attention_reference(*problem[:5], scale=1.0)
    assert output.shape == (2, 2, 2, 64) and not output.any()


# -- masks -------------------------------------------------------------------------------------------------------------

MASKED = Case(200, group=4, queries=5, batch=3)


def padding(case: Case, first: tuple[int, ...], queries: int | None = None) -> torch.Tensor:
    """Bool ``[batch, 1, queries, tokens]``: bottom-right causal, without the ``first`` tokens of each sequence."""
    queries = case.queries if queries is None else queries
    causal = torch.ones(queries, case.tokens).tril(case.tokens - queries).bool()
    seen = torch.arange(case.tokens) >= torch.tensor(first).unsqueeze(-1)
    return causal & seen[:, None, None, :]


@policies
def test_padding_mask(policy: str) -> None:
    """Left padding that ends inside a page, at a page, and not at all."""
    check(make_problem(policy, MASKED), mask=padding(MASKED, (37, 128, 0)), causal=False)


@policies
def test_mask_per_head_and_shared_by_the_batch(policy: str) -> None:
    problem = make_problem(policy, MASKED)
    generator = torch.Generator().manual_seed(3)
    for batch, heads, queries in itertools.product((1, 3), (1, 8), (1, 5)):
        mask = torch.rand(batch, heads, queries, MASKED.tokens, generator=generator) < 0.3
        check(problem, mask=mask, causal=False)


def test_mask_per_head_reaches_its_own_head() -> None:
    """Query head h sees token 60 + h only, so its output is the value of that token in its own key/value head."""
    problem = make_problem("exact", MASKED)
    mask = torch.zeros(1, 8, 1, MASKED.tokens, dtype=torch.bool)
    for head in range(8):
        mask[0, head, 0, 60 + head] = True
    output = paged_attention_reference(*problem[:5], scale=1.0, mask=mask, causal=False)
    for head in range(8):
        expected = problem.dense_values[:, head // 4, 60 + head].float().unsqueeze(1).expand(-1, 5, -1)
        # The weight is e^0 / e^0 = 1 and every other weight exactly 0.
        assert torch.equal(output[:, head], expected)


@policies
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_additive_masks(policy: str, dtype: torch.dtype) -> None:
    """Finite biases, -inf and the lowest number of the dtype (what transformers' eager masks are made of)."""
    problem = make_problem(policy, MASKED, dtype)
    bias = torch.randn(3, 1, 5, MASKED.tokens, generator=torch.Generator().manual_seed(4)).to(dtype)
    check(problem, mask=bias, causal=False, other_scores=float(bias.abs().max()))
    for low in (float("-inf"), torch.finfo(dtype).min):
        mask = bias.masked_fill(~padding(MASKED, (37, 128, 0)), low)
        check(problem, mask=mask, causal=False, other_scores=float(bias.abs().max()))


@policies
def test_rows_that_see_nothing_are_zero(policy: str) -> None:
    """Padded queries, as the first ones of a left-padded prompt: zero and not NaN, and their neighbours unharmed."""
    case = Case(200, group=2, queries=70, batch=3)
    mask = padding(case, (150, 200, 0))
    problem = make_problem(policy, case)
    for given in (mask, torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))):
        output = check(problem, mask=given, causal=False)
        assert not output[0, :, :20].any() and not output[1].any()
        assert output[0, :, 20:].norm(dim=-1).min() > 0 and output[2].norm(dim=-1).min() > 0


@policies
def test_causal_rule_is_bottom_right(policy: str) -> None:
    problem = make_problem(policy, Case(150, queries=70))
    check(problem, causal=True)
    explicit = paged_attention_reference(*problem[:5], scale=0.1, causal=False, mask=padding(Case(150), (0,), 70))
    assert torch.equal(paged_attention_reference(*problem[:5], scale=0.1, causal=True), explicit)
    everything = check(problem, causal=False)
    assert not torch.allclose(everything, paged_attention_reference(*problem[:5], scale=64**-0.5, causal=True))


def test_one_query_sees_everything_with_and_without_the_causal_rule() -> None:
    problem = make_problem("int4", Case(150))
    outputs = [paged_attention_reference(*problem[:5], scale=0.1, causal=causal) for causal in (True, False)]
    assert torch.equal(*outputs)


# -- softcap and sinks -------------------------------------------------------------------------------------------------


@policies
@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_softcap(policy: str, softcap: float) -> None:
    problem = make_problem(policy, MASKED)
    capped = check(problem, softcap=softcap, other_scores=softcap)
    masked = check(problem, softcap=softcap, mask=padding(MASKED, (37, 128, 0)), causal=False, other_scores=softcap)
    assert not torch.equal(capped, masked)


@policies
@pytest.mark.parametrize("height", [-5.0, 0.0, 30.0])
def test_sinks(policy: str, height: float) -> None:
    problem = make_problem(policy, MASKED)
    sinks = torch.linspace(height - 1, height + 1, 8)
    check(problem, sinks=sinks, other_scores=abs(height) + 1)
    output = check(problem, sinks=sinks, mask=padding(MASKED, (37, 200, 0)), causal=False, other_scores=abs(height) + 1)
    assert not output[1].any()  # only the sink is left, and it carries no value


# -- memory ------------------------------------------------------------------------------------------------------------


@policies
@pytest.mark.parametrize("block", [1, 100_000, 1 << 40])
def test_result_does_not_depend_on_blocks(policy: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One page and one query at a time, a few, and all at once."""
    case = Case(400, 64, 32, group=2, queries=70, batch=2)
    problem = make_problem(policy, case)
    monkeypatch.setattr(reference, "BLOCK_BYTES", block)
    check(problem)
    check(problem, mask=padding(case, (37, 300)), causal=False)
    for side, dense in ((problem.keys, problem.dense_keys), (problem.values, problem.dense_values)):
        assert torch.equal(gather_dense(side, problem.page_table).double(), dense)


@policies
def test_unused_pages_and_slots_are_never_read(policy: str) -> None:
    """``make_problem`` fills them with NaN and 0xAB; with other garbage the result has the same bits."""
    case = Case(200, group=2, queries=3, batch=2)
    problem = make_problem(policy, case)
    output = check(problem)
    unused = torch.ones(problem.keys.planes[0].shape[0], dtype=torch.bool)
    unused[problem.page_table.long()] = False
    assert unused.sum() == 3
    for side in (problem.keys, problem.values):
        side.tail._base[:, :, side.tail.shape[2] :] = 1e30
        for plane in side.planes:
            plane[unused] = 7
    assert torch.equal(paged_attention_reference(*problem[:5], scale=64**-0.5), output)


class Allocations(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes anew."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        fresh = all(returned.alias_info is None for returned in func._schema.returns)
        if fresh and isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel() * result.element_size())
        return result


def largest_allocation(call: Callable[[], object]) -> int:
    with Allocations() as seen:
        call()
    return seen.largest


@policies
@pytest.mark.parametrize("queries", [1, 40])
def test_work_memory_does_not_grow_with_the_context(policy: str, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK_BYTES", 1 << 18)
    sizes = []
    for tokens in (2000, 8000):
        case = Case(tokens, 64, 64, heads=2, group=2, queries=queries)
        problem = make_problem(policy, case)
        mask = padding(case, (37,))
        calls = (
            lambda p=problem: paged_attention_reference(*p[:5], scale=0.1),
            lambda p=problem, m=mask: paged_attention_reference(*p[:5], scale=0.1, mask=m, causal=False),
        )
        sizes.append([largest_allocation(call) for call in calls])
    assert sizes[0] == sizes[1]
    # Levels, scores or scaled queries of one block; a dense side of the larger context would have 4 MB.
    assert max(sizes[1]) <= 2 * reference.BLOCK_BYTES < 2 * 8000 * 64 * 4
    whole = largest_allocation(lambda: gather_dense(problem.keys, problem.page_table))
    assert whole == 2 * 8000 * 64 * 4, "the measurement does not see a dense side"
