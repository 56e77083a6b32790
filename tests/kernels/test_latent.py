"""The Triton kernel for latents (MLA) against float64, in the interpreter or on a GPU; what nobody may read is NaN.

The budget is that of ``test_decode.py``: twice the error of eager attention in the model's dtype on the same latents
and rotary keys, multiplied out, and a band for the rounding of the query and of the weights.
"""

from collections.abc import Callable

import pytest
import torch
from latents import make_latents, textbook
from problems import Case, Problem, make_problem, softmax_attention, with_first

from kvquant_hf.errors import ImplementationError
from kvquant_hf.triton_kernels import choice
from kvquant_hf.triton_kernels.choice import choose
from kvquant_hf.triton_kernels.codecs import CODECS
from kvquant_hf.triton_kernels.latent import choose_for_latents, latent_attention
from kvquant_hf.triton_kernels.latent_triton import latent_attention_triton
from kvquant_hf.triton_kernels.launch import override_launch
from kvquant_hf.triton_kernels.triton_attention import paged_attention_triton

PAIRS = (
    "exact",
    "int8",
    "int4",
    "kv3",
    "kv2.4",
    "int4-channel/int4-hadamard",
    "lloyd3-sign/lloyd2-plain",
    "nvfp4",
    "int8-static",
)


def on(device: torch.device, problem: Problem) -> Problem:
    """The same with whole open pages, in which what is not used is NaN."""
    sides = []
    for side in problem[1:3]:
        placed = [x if x is None else x.to(device) for x in (side.tail._base, side.first, side.first_at)]
        codec = side.codec.given(*(x.to(device) for x in side.codec.parameters))
        planes = [plane.to(device) for plane in side.planes]
        for plane, row in zip(planes[len(planes) - len(codec.parameters) :], codec.parameters, strict=True):
            plane.copy_(row.expand_as(plane))  # per layer: the same memory for every page
        sides.append(side._replace(codec=codec, planes=planes, tail=placed[0], first=placed[1], first_at=placed[2]))
    query, table, lengths = (x.to(device) for x in (problem.query, problem.page_table, problem.lengths))
    return problem._replace(query=query, keys=sides[0], values=sides[1], page_table=table, lengths=lengths)


def check(
    problem: Problem,
    device: torch.device,
    splits: int = 3,
    attend: Callable[..., torch.Tensor] = latent_attention_triton,
    **options: object,
) -> torch.Tensor:
    scale, dtype = problem.query.shape[-1] ** -0.5, problem.keys.tail.dtype
    expected = textbook(problem, scale, **options)[1]
    rounded = [x.to(dtype) for x in (problem.dense_keys, problem.dense_values)]
    eager = torch.cat(rounded, -1).transpose(-1, -2)
    scores = problem.query.to(dtype) @ eager * scale
    # What rounding in the model's dtype does to scores and to what is summed under the weights that they have.
    exact_scores = problem.query.double() @ torch.cat((problem.dense_keys, problem.dense_values), -1).transpose(-1, -2)
    moved = (scores.double() - exact_scores * scale).abs().max()
    size = problem.dense_keys.abs().max()
    if problem.keys.codec.rotated:
        size = 2 * problem.dense_keys.norm(dim=-1).max()
    eps = torch.finfo(dtype).eps
    budget = 2 * size * (moved + eps) + eps * (exact_scores.abs().max() * scale + 1) * size
    placed = on(device, problem)
    moved_options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    with override_launch(splits=splits):
        out = attend(*placed[:5], scale=scale, **moved_options).cpu()
    assert out.shape == expected.shape and out.dtype == problem.query.dtype
    error = (out.double() - expected).abs().max()
    assert error <= budget, f"error {error:.2e}, budget {budget:.2e}"
    return out


@pytest.mark.parametrize("pair", PAIRS)
def test_every_kind_of_codec(pair: str, device: torch.device) -> None:
    check(make_latents(pair, Case(130, 64, 32, group=3, queries=2), torch.float16), device, splits=2)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 64, 16, group=3),
        Case(64, 64, 16, group=20),
        Case(300, 96, 48, group=2, batch=2),
        Case(130, 512, 64, group=16),
    ],
    ids=str,
)
def test_shapes(case: Case, device: torch.device) -> None:
    check(make_latents("int8", case), device)


def test_short_pages(device: torch.device) -> None:
    check(make_latents("int4", Case(90, 64, 32, group=4, page_size=16), torch.float16), device)


def test_features(device: torch.device) -> None:
    problem = make_latents("int8", Case(70, 64, 16, group=2, queries=3, batch=2, page_size=32), torch.float16)
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand(2, 2, 3, 70, generator=generator) < 0.4
    seen[1, 1, 1] = False
    assert not check(problem, device, splits=2, mask=seen, causal=False)[1, 1, 1].any()
    check(problem, device, splits=2, mask=torch.randn(2, 1, 3, 70, generator=generator), window=30)
    check(problem, device, splits=1, softcap=3.0, sinks=torch.randn(2, generator=generator))
    one = with_first(problem._replace(query=problem.query[:, :, 2:]), 40, (0, 20))
    check(one, device, splits=1, mask=torch.rand(2, 1, 1, 70, generator=generator) < 0.8)
    check(with_first(problem, 3, (31, -1)), device, splits=1)


def test_many_rows_are_merged(device: torch.device) -> None:
    check(
        make_latents("lloyd3-sign/int8-affine", Case(130, 64, 16, group=32, queries=3), torch.float16), device, splits=2
    )


def test_strides(device: torch.device) -> None:
    problem = make_latents("int8", Case(130, 64, 16, group=4, queries=2))
    swapped = problem.query.transpose(2, 3).contiguous().transpose(2, 3)
    mask = (torch.rand(1, 1, 2, 130, generator=torch.Generator().manual_seed(0)) < 0.7).transpose(2, 3).contiguous()
    check(problem._replace(query=swapped), device, mask=mask.transpose(2, 3), causal=False)


def test_what_runs(device: torch.device) -> None:
    """An explicit choice is done, on pages that other kernels refuse, and refused where it cannot be done."""
    problem = on(device, make_latents("int4", Case(70, 512, 64, group=2), torch.float16))
    weight = torch.randn(2, 48, 512, device=device).half() * 0.05
    query = problem.query[..., : 16 + 64]
    with pytest.raises(ImplementationError, match="too large"):
        choose("triton", torch.float16, *problem[1:3])
    assert choose_for_latents("triton", query, *problem[1:3], 48).name == "triton"
    pages = problem[1:5]
    out = latent_attention(query, weight, *pages, scale=0.1, impl="triton")
    trimmed = [side._replace(tail=side.tail[:, :, : 70 - 64]) for side in pages[:2]]
    expected = latent_attention(query.float(), weight.float(), *trimmed, *pages[2:], scale=0.1, impl="reference")
    assert (out - expected).abs().max() <= 2**-9 * expected.abs().max()
    odd = make_latents("int4", Case(70, 24, 16, group=2), torch.float16)
    with pytest.raises(ImplementationError, match="reads 16 elements at a time"):
        choose_for_latents("triton", odd.query, *odd[1:3], 48)


def test_ranked_keys_of_more_channels_than_a_byte_counts(device: torch.device) -> None:
    """Of heads as wide as latents: queries are read in the order of two blocks of channels."""
    problem = make_problem("int4", Case(60, 512, 64, heads=1, group=2, page_size=32), torch.float16)
    weights, expected = softmax_attention(problem, 0.02)
    with override_launch(splits=1):
        out = paged_attention_triton(*on(device, problem)[:5], scale=0.02).cpu()
    # Query and steps in fp16, products in float32: a few units in the last place of scores that are 100 at most.
    assert (out.double() - expected).abs().max() <= 100 * 2**-10 * expected.abs().max() and weights.shape[-1] == 60


def test_no_room_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "architecture", lambda device: "sm_75")
    monkeypatch.setattr(choice, "why_not", lambda device: None)
    arguments = (torch.device("cpu"), torch.float32, 64, (512, 64), (CODECS["int8-channel"], CODECS["int8-affine"]))
    assert "use a model in float16" in (choice._obstacle(*arguments, True) or "")
    assert choice._obstacle(arguments[0], torch.float16, *arguments[2:], True) is None


def test_too_many_rows_for_one_launch() -> None:
    problem = make_latents("int8", Case(70, 512, 64, group=1), torch.float16)
    query = torch.empty(1, 64, 1 << 16, 576, dtype=torch.float16, device="meta")
    with pytest.raises(ValueError, match="in chunks"):
        latent_attention_triton(query, *problem[1:5], scale=0.1)
