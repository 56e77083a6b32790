"""The CPU kernels' attention over latents (MLA) against float64."""

import copy

import pytest
import torch
from latents import check_latents, make_latents
from problems import Case, with_first
from stores import CPU_CODECS

from kvquant_hf.policies.table import POLICIES
from kvquant_hf.triton_kernels.cpu import attention
from kvquant_hf.triton_kernels.cpu.attention import latent_attention_cpu

CASES = [
    Case(0, 64, 16, queries=2, batch=2),
    Case(1, 32, 8, group=4),
    Case(65, 512, 64, group=16),
    Case(300, 512, 64, group=70, batch=2),
    Case(200, 128, 96, group=3, queries=5, batch=3, page_size=16),
    Case(100, 24, 48, group=2, page_size=8),
    Case(1000, 256, 32, group=5, page_size=24),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("policy", ["exact", "int8"])
def test_shapes(policy: str, case: Case) -> None:
    check_latents(make_latents(policy, case), latent_attention_cpu)


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("rank", [128, 512])
def test_every_policy(policy: str, rank: int) -> None:
    check_latents(make_latents(policy, Case(200, rank, 64, group=9, queries=2)), latent_attention_cpu)


@pytest.mark.parametrize("codec", CPU_CODECS)
def test_every_codec_stores_latents_and_rotary_keys(codec: str) -> None:
    """What is a key is a value too: codecs of either side."""
    check_latents(make_latents(f"{codec}/{codec}", Case(130, 64, 64, group=5)), latent_attention_cpu)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_dtypes(dtype: torch.dtype) -> None:
    problem = make_latents("int4", Case(200, 64, 16, group=4, queries=3, batch=2), dtype)
    check_latents(problem, latent_attention_cpu)
    check_latents(problem._replace(query=problem.query.float()), latent_attention_cpu)  # as under autocast


def test_masks_windows_softcap_sinks_and_first_tokens() -> None:
    problem = make_latents("int4", Case(150, 64, 16, group=4, queries=5, batch=3))
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand(3, 4, 5, 150, generator=generator) < 0.4
    seen[1, 2, 3] = False
    assert not check_latents(problem, latent_attention_cpu, mask=seen, causal=False)[1, 2, 3].any()
    check_latents(problem, latent_attention_cpu, window=40)
    check_latents(problem, latent_attention_cpu, 3.0, softcap=3.0)
    check_latents(problem, latent_attention_cpu, 3.0, sinks=torch.randn(4, generator=generator))
    check_latents(with_first(problem, 3, (0, 62, -1)), latent_attention_cpu)


def test_threads_and_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(attention, "_ELEMENTS_PER_THREAD", 1)
    problem = make_latents("kv3", Case(1500, 64, 16, group=4, queries=2, batch=2))
    output = check_latents(problem, latent_attention_cpu)
    # What nobody may read: unused places of open pages, which are NaN here, and pages that are reserved.
    sides = [copy.copy(side)._replace(tail=side.tail._base) for side in problem[1:3]]
    table = torch.cat([problem.page_table, torch.full((2, 3), 1 << 30, dtype=torch.int32)], 1)
    reserved = problem._replace(keys=sides[0], values=sides[1], page_table=table)
    assert all(side.tail.isnan().any() for side in sides)
    scale = problem.query.shape[-1] ** -0.5
    torch.testing.assert_close(latent_attention_cpu(*reserved[:5], scale=scale), output)
    strided = problem.query.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(latent_attention_cpu(strided, *problem[1:5], scale=scale), output)
