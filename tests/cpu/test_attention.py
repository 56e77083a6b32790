"""The CPU kernels' attention against plain float64 softmax attention over what the codecs decode to."""

import copy
from typing import Any

import pytest
import torch
from problems import PAGE, Case, Problem, check, make_problem
from stores import CPU_CODECS, CPU_POLICIES, fill, make_store, vectors

from kvquant_hf.policies.table import POLICIES
from kvquant_hf.triton_kernels.codecs import CODECS, octet
from kvquant_hf.triton_kernels.cpu import append, attention, native
from kvquant_hf.triton_kernels.cpu.attention import paged_attention_cpu, split_count
from kvquant_hf.triton_kernels.cpu.native import library
from kvquant_hf.triton_kernels.reference import paged_attention_reference

policies = pytest.mark.parametrize("policy", CPU_POLICIES)


def checked(problem: Problem, **options: Any) -> torch.Tensor:
    return check(problem, attention=paged_attention_cpu, **options)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads for the kernels, and work for both even where there is little."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(attention, "_ELEMENTS_PER_THREAD", 1)


CASES = [
    Case(0, queries=2, batch=2),
    Case(1, group=4),
    Case(PAGE - 1, 80, 80, group=4),
    Case(PAGE, 96, 96, group=7, queries=3),
    Case(PAGE + 1, 128, 128, group=4, batch=3),
    Case(PAGE + 1, 64, 64, heads=1, queries=PAGE + 1),
    Case(200, 64, 128, group=4, queries=16, batch=3),
    Case(200, 256, 64, group=1, queries=2),
    Case(200, 192, 128, group=16),
    Case(200, 80, 96, heads=3, queries=3, batch=3, page_size=16),
    Case(100, 8, 24, group=2, page_size=8),
    Case(1000, 128, 96, heads=1, group=7, queries=70, page_size=24),
    Case(1000, 64, 64, heads=3, group=3),
]


def test_what_the_kernels_take() -> None:
    assert set(CPU_POLICIES) == set(POLICIES) and set(CPU_CODECS) == set(CODECS)


@policies
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes(policy: str, case: Case) -> None:
    checked(make_problem(policy, case))


@pytest.mark.parametrize("codec", CPU_CODECS)
def test_every_codec_stores_keys_and_values(codec: str) -> None:
    """Policies give each codec one side; both sides take any."""
    checked(make_problem(f"{codec}/{codec}", Case(200, 64, 96, group=3, queries=2)))


def test_planes_that_all_pages_share() -> None:
    """A calibrated range is stored once; a page finds the row of its head, wherever the page lies."""
    keys, values = (vectors(2, 3, 300, 64, seed=seed) for seed in (0, 1))
    view = fill(make_store("int8-static", keys, values), keys, values).view()
    assert view.keys.planes[1].stride(0) == 0 and view.keys.planes[1].shape[:2] == (view.keys.planes[0].shape[0], 3)
    arguments = torch.randn(2, 6, 2, 64), view.keys, view.values, view.page_table, view.lengths
    expected = paged_attention_reference(*arguments, scale=0.125)
    torch.testing.assert_close(paged_attention_cpu(*arguments, scale=0.125), expected)


@policies
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_dtypes(policy: str, dtype: torch.dtype) -> None:
    problem = make_problem(policy, Case(200, group=4, queries=3, batch=2), dtype)
    checked(problem)
    checked(problem._replace(query=problem.query.float()))  # as under autocast


def open_pages(problem: Problem) -> Problem:
    """The same with whole open pages, as a store has them: what is not used in them is NaN."""
    sides = [side._replace(tail=side.tail._base) for side in (problem.keys, problem.values)]
    assert all(side.tail.isnan().any() for side in sides)
    return problem._replace(keys=sides[0], values=sides[1])


def test_unused_pages_and_slots_are_never_read() -> None:
    problem = make_problem("int4", Case(200, group=2, queries=3, batch=2))
    expected = checked(problem)
    whole = open_pages(problem)
    assert torch.equal(paged_attention_cpu(*whole[:5], scale=64**-0.5), expected)
    longer = torch.cat([whole.page_table, torch.full((2, 3), 1 << 30, dtype=torch.int32)], 1)
    reserved = whole._replace(page_table=longer)
    torch.testing.assert_close(paged_attention_cpu(*reserved[:5], scale=64**-0.5), expected)


def causal_mask(case: Case, first: tuple[int, ...]) -> torch.Tensor:
    """Bool ``[batch, 1, queries, tokens]``: causal, without the ``first`` tokens of each sequence."""
    causal = torch.ones(case.queries, case.tokens).tril(case.tokens - case.queries).bool()
    return causal & (torch.arange(case.tokens) >= torch.tensor(first).unsqueeze(-1))[:, None, None, :]


MASKED = Case(200, group=4, queries=5, batch=3)


@pytest.mark.parametrize("policy", ["exact", "int8", "int4", "turboquant"])
def test_masks(policy: str) -> None:
    """Bool and additive, of every dtype, shared by batch, heads or queries; rows that see nothing are zero."""
    problem = make_problem(policy, MASKED)
    padded = causal_mask(MASKED, (37, 128, 200))
    output = checked(problem, mask=padded, causal=False)
    assert not output[2].any()
    generator = torch.Generator().manual_seed(3)
    for shape in ((1, 1, 1, 200), (3, 8, 5, 200), (1, 8, 1, 200), (3, 1, 5, 200)):
        checked(problem, mask=torch.rand(shape, generator=generator) < 0.3, causal=False)
    bias = torch.randn(3, 1, 5, 200, generator=generator)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for low in (float("-inf"), torch.finfo(dtype).min):
            mask = bias.to(dtype).masked_fill(~padded[:, :, :, :], low)[:2].contiguous()
            smaller = make_problem(policy, MASKED._replace(batch=2))
            checked(smaller, mask=mask, causal=False, other_scores=float(bias.abs().max()))
    strided = (torch.rand(3, 1, 200, 5, generator=generator) < 0.3).transpose(2, 3)
    checked(problem, mask=strided, causal=False)


@pytest.mark.parametrize("policy", ["int8", "turboquant"])
@pytest.mark.parametrize("window", [1, 5, 64, 130, 1000])
def test_windows(policy: str, window: int) -> None:
    checked(make_problem(policy, Case(200, group=2, queries=70, batch=2)), window=window)
    checked(make_problem(policy, Case(200, group=2)), window=window)


@pytest.mark.parametrize("policy", ["int8", "int4"])
def test_causal_softcap_and_sinks(policy: str) -> None:
    problem = make_problem(policy, Case(150, group=4, queries=70))
    assert not torch.equal(checked(problem, causal=False), checked(problem))
    for softcap in (0.5, 20.0):
        checked(problem, softcap=softcap, other_scores=softcap)
    for height in (-5.0, 0.0, 30.0):
        sinks = torch.linspace(height - 1, height + 1, 8)
        checked(problem, sinks=sinks, other_scores=abs(height) + 1)
        nothing = torch.zeros(1, 1, 70, 150, dtype=torch.bool)
        assert not checked(problem, sinks=sinks, mask=nothing, causal=False).any()


def test_ragged_lengths() -> None:
    """Sequences of different lengths in one call are those of calls of their own."""
    problem = open_pages(make_problem("int4", Case(300, group=3, queries=2, batch=3)))
    lengths = torch.tensor([[4, 44], [0, 17], [2, 64]], dtype=torch.int32)
    mask = torch.rand(3, 1, 2, 320, generator=torch.Generator().manual_seed(3)) > 0.3
    tail = {name: getattr(problem, name)._replace(tail=torch.randn(3, 2, PAGE, 64)) for name in ("keys", "values")}
    problem = problem._replace(lengths=lengths, **tail)
    for options in ({}, {"mask": mask, "causal": False}):
        together = paged_attention_cpu(*problem[:5], scale=0.1, **options)
        for b in range(3):
            one = slice(b, b + 1)
            sides = [side._replace(tail=side.tail[one]) for side in problem[1:3]]
            given = {"mask": mask[one], "causal": False} if options else {}
            alone = paged_attention_cpu(
                problem.query[one], *sides, problem.page_table[one], lengths[one], scale=0.1, **given
            )
            torch.testing.assert_close(together[one], alone)


def test_strided_queries() -> None:
    problem = make_problem("int8", Case(200, group=3, queries=4, batch=2))
    expected = checked(problem)
    for order in ((0, 2, 1, 3), (0, 1, 3, 2)):
        strided = problem.query.permute(order).contiguous().permute(order)
        assert torch.equal(checked(problem._replace(query=strided)), expected)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("fork", ["OpenMP", "std::thread"])
def test_threads_and_splits(fork: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fork == "std::thread":
        monkeypatch.setattr(library(), "fork", 0)
    else:
        assert library().fork, "torch's OpenMP was not found"
    assert split_count(1, 15, 2) == 3 and split_count(8, 15, 2) == 1 and split_count(1, 1000, 2) == 8
    problem = make_problem("turboquant", Case(1000, heads=1, group=3))
    checked(problem)
    checked(problem, mask=torch.arange(1000).reshape(1, 1, 1, -1) < 3, causal=False)
    checked(make_problem("int8", Case(1000, group=2, queries=70, batch=2)), window=100)


def test_a_copy_of_pages_is_read_where_it_lies() -> None:
    """What was packed for the kernels has addresses, and stays behind when the pages are copied."""
    problem = make_problem("int4", Case(200, group=4))
    checked(problem)
    copied = copy.deepcopy((problem.keys, problem.values))
    for pages in (problem.keys, problem.values):
        assert native.held_side(pages) is native.held_side(pages)
        for tensor in (*pages.planes, pages.tail):
            tensor.zero_()
    for original, pages in zip((problem.keys, problem.values), copied, strict=True):
        assert native.held_side(pages) != native.held_side(original)
    checked(problem._replace(keys=copied[0], values=copied[1]))


FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-w")


@pytest.mark.parametrize("width", [4, 8])
def test_narrower_vectors(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The versions for processors without AVX-512 and without AVX2."""
    if width == 8 and not torch.cpu._is_avx2_supported():
        pytest.skip("this processor has no AVX2")
    flags = (*FLAGS, "-mavx2", "-mfma", "-mf16c") if width == 8 else (*FLAGS, "-DKV_PORTABLE")
    narrow = native.Library(flags)
    for module in (attention, append):
        monkeypatch.setattr(module, "library", lambda: narrow)
    x = torch.randn(41, 96)
    for levels in octet.LEVELS.values():
        assert torch.equal(append._search(x, levels), octet.search(x, levels))
    for policy in (*CPU_POLICIES, "octet3/octet2"):
        checked(make_problem(policy, Case(200, 80, 96, group=3, queries=2)))
        checked(make_problem(policy, Case(100, 8, 24, group=2, page_size=8)))
        checked(make_problem(policy, Case(100, 128, 128, group=1), torch.float16))
        checked(make_problem(policy, Case(100, group=5), torch.bfloat16), softcap=5.0, other_scores=5.0)


def test_work_memory_does_not_grow_with_the_context() -> None:
    """Threads share one partial result per split, and splits are bounded by the threads."""
    assert {split_count(items=3, pages=pages, threads=2) for pages in (100, 1000, 100_000)} == {3}
