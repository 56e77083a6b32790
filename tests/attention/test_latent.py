"""Attention over latents (MLA) in plain torch, absorbed and expanded, against float64."""

from functools import partial
from typing import Any

import pytest
import torch
from latents import check_latents, make_latents
from problems import Case, with_first
from torch.utils._python_dispatch import TorchDispatchMode

from kvquant_hf.errors import ImplementationError
from kvquant_hf.triton_kernels import reference
from kvquant_hf.triton_kernels.latent import choose_for_latents, expands_from, latent_attention
from kvquant_hf.triton_kernels.latent_reference import ExpandedLatents
from kvquant_hf.triton_kernels.reference import attend_by

NOPE, VALUE = 24, 40


@pytest.mark.parametrize("policy", ["exact", "int8", "int4", "kv2.4", "turboquant-qjl", "nvfp4", "int8-static"])
def test_absorbed_queries(policy: str) -> None:
    check_latents(make_latents(policy, Case(200, 128, 64, group=5, queries=3, batch=2)))


@pytest.mark.parametrize(
    "case", [Case(0, 64, 16, queries=2), Case(1, 64, 16, group=3), Case(65, 64, 32, group=16)], ids=str
)
def test_few_tokens(case: Case) -> None:
    check_latents(make_latents("int4", case))


def test_masks_windows_softcap_and_sinks() -> None:
    problem = make_latents("int8", Case(150, 64, 16, group=4, queries=5, batch=3))
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand(3, 4, 5, 150, generator=generator) < 0.4
    seen[1, 2, 3] = False
    assert not check_latents(problem, mask=seen, causal=False)[1, 2, 3].any()
    check_latents(problem, mask=torch.randn(1, 4, 1, 150, generator=generator), other_scores=5.0)
    check_latents(problem, window=40)
    check_latents(problem, softcap=3.0, other_scores=3.0)
    check_latents(problem, sinks=torch.randn(4, generator=generator), other_scores=3.0)


def test_first_tokens_and_ragged_sequences() -> None:
    problem = make_latents("int4", Case(200, 64, 16, group=4, queries=2, batch=3))
    check_latents(with_first(problem, 3, (0, 62, -1)))
    short = torch.tensor([[3, 8], [2, 5], [3, 8]], dtype=torch.int32)
    whole = attend(problem, None, impl="reference")
    output = attend(problem._replace(lengths=short), None, impl="reference")
    assert (
        torch.equal(output[0], whole[0]) and torch.equal(output[2], whole[2]) and not torch.equal(output[1], whole[1])
    )


def weights_of(heads: int, rank: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(heads, NOPE + VALUE, rank, generator=torch.Generator().manual_seed(9)) * rank**-0.5).to(dtype)


def attend(problem: Any, weight: torch.Tensor | None, **options: Any) -> torch.Tensor:
    heads, rank, rope = problem.query.shape[1], problem.keys.head_dim, problem.values.head_dim
    query = problem.query[..., : NOPE + rope]
    weight = weights_of(heads, rank, problem.query.dtype) if weight is None else weight
    return latent_attention(query, weight, *problem[1:5], scale=0.2, **options)


def expanded(problem: Any, **options: Any) -> torch.Tensor:
    weight = weights_of(problem.query.shape[1], problem.keys.head_dim, problem.query.dtype)
    query = problem.query[..., : NOPE + problem.values.head_dim]
    return attend_by(partial(ExpandedLatents, weight), query, problem[1:3], *problem[3:5], scale=0.2, **options)


@pytest.mark.parametrize("policy", ["exact", "int4", "turboquant-qjl", "nvfp4"])
def test_absorbed_is_expanded(policy: str) -> None:
    """The same pages by both formulae, in float64, and by neither: keys and values of what the codecs decode to."""
    case = Case(200, 128, 16, group=3, queries=5, batch=2)
    problem = with_first(make_latents(policy, case, torch.float64), 2, (0, 63))
    query, weight = problem.query[..., : NOPE + 16], weights_of(3, 128, torch.float64)
    both = problem.dense_keys @ weight.transpose(1, 2)
    keys = torch.cat((both[..., :NOPE], problem.dense_values.expand(-1, 3, -1, -1)), -1)
    scores = (query @ keys.transpose(-1, -2) * 0.2).masked_fill(~torch.ones(5, 200).tril(195).bool(), float("-inf"))
    expected = scores.softmax(-1) @ both[..., NOPE:]
    # What is decoded is float32 in one order of sums and folded in another: a thousand roundings of 6e-8.
    for output in (attend(problem, None, impl="reference"), expanded(problem)):
        assert (output - expected).norm() <= 1e-5 * expected.norm()
    # A latent of n elements times a weight of float64: both ways are the same number but for roundings of 1e-16.
    if policy == "exact":
        assert (attend(problem, None, impl="reference") - expanded(problem)).norm() <= 1e-13 * expected.norm()


def test_expanding_begins_where_it_costs_less() -> None:
    def products(rank: int, expanded: int, queries: int) -> tuple[int, int]:
        """Of a token and head: absorbed, expanded; rotary keys cost the same."""
        return queries * 2 * rank, queries * expanded + rank * expanded

    for rank, expanded in ((512, 256), (256, 128), (128, 64), (32, 32), (64, 96)):
        first = expands_from(rank, expanded)
        below, there = products(rank, expanded, first - 1), products(rank, expanded, first)
        assert below[0] < below[1] and there[0] >= there[1]
    assert expands_from(512, 256) == 171
    assert expands_from(32, 64) == expands_from(16, 64) == 1  # a latent is no smaller than what is made of it
    problem = make_latents("int8", Case(400, 64, 16, group=2, queries=180))
    weight, many = weights_of(2, 64), expands_from(64, NOPE + VALUE)
    assert many <= 180
    for impl, queries, expands in (("auto", many, True), ("auto", many - 1, False), ("reference", many, False)):
        asked = choose_for_latents(impl, problem.query[:, :, :queries], *problem[1:3], weight.shape[1])
        assert asked.expands == expands
    small = problem._replace(query=problem.query[..., : NOPE + 16])
    auto, absorbed = (attend(small, weight, impl=impl) for impl in ("auto", "reference"))
    assert not torch.equal(auto, absorbed)
    exact = attend(small._replace(query=small.query.double()), weight.double(), impl="reference")
    # float32: sums of 64 and 400 terms, each off by a rounding of 6e-8 of the largest.
    assert (auto - exact).abs().max() <= 64 * 6e-8 * exact.abs().max() >= (absorbed - exact).abs().max()


class Largest(TorchDispatchMode):
    """The most bytes of any tensor that an operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("queries", [1, 200], ids=["absorbed", "expanded"])
def test_the_history_is_never_expanded(monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    """Neither keys and values of all heads nor latents multiplied out: work memory is that of a block."""
    monkeypatch.setattr(reference, "BLOCK_BYTES", 1 << 18)
    problem = make_latents("int8", Case(6000, 64, 16, group=4, queries=queries))
    with Largest() as largest:
        attend(problem, None)
    planes = max(plane.nbytes for plane in problem.keys.planes)
    assert largest.bytes <= max(2 * reference.BLOCK_BYTES, planes) < 6000 * 4 * (NOPE + VALUE) * 4


def test_sixteen_bits() -> None:
    problem = make_latents("int4", Case(200, 64, 16, group=4, queries=2), torch.bfloat16)
    check_latents(problem)
    assert attend(problem, None).dtype == torch.bfloat16


def test_an_explicit_choice_is_done_or_refused() -> None:
    problem = make_latents("int4", Case(70, 64, 16, group=2))
    with pytest.raises(ImplementationError, match=r"impl='cpu' cannot run here: .* not float64"):
        attend(problem._replace(query=problem.query.double()), None, impl="cpu")
    with pytest.raises(ImplementationError, match="unknown impl"):
        attend(problem, None, impl="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("queries", [1, 70], ids=["absorbed", "expanded"])
def test_the_operator_is_what_torch_expects(queries: int) -> None:
    """As graphs see it: a fake, nothing written, and the result of the call outside of a graph."""
    problem = make_latents("int8", Case(100, 64, 16, group=2, queries=queries))
    query, weight = problem.query[..., : NOPE + 16], weights_of(2, 64)
    assert queries == 1 or queries >= expands_from(64, NOPE + VALUE)
    k, v = problem[1:3]
    # An open page has room for a whole page, and says by it how many tokens a page has.
    tails = [torch.nn.functional.pad(x, (0, 0, 0, 64 - x.shape[2])) for x in (k.tail, v.tail)]
    sides = (k.codec.name, list(k.planes), tails[0], v.codec.name, list(v.planes), tails[1])
    pages = (*sides, None, None, None)
    arguments = (query, weight, *pages, problem.page_table, problem.lengths, 0.2, True, None, None, None, 0, "auto")
    torch.library.opcheck(torch.ops.kvquant_hf.latent_attention, arguments)
    assert torch.equal(torch.ops.kvquant_hf.latent_attention(*arguments), attend(problem, weight))
