"""What users write as a policy, and what a token costs under each."""

import dataclasses

import pytest
import torch
from calibrated import range_of

from kvquant_hf import KVPolicy
from kvquant_hf.errors import UnknownPolicyError
from kvquant_hf.memory import page_cost
from kvquant_hf.parameters import in_pages
from kvquant_hf.policy import POLICIES, QUANT_POLICY, parse_policy
from kvquant_hf.triton_kernels.codecs import CODECS


@pytest.mark.parametrize(
    ("written", "keys", "values", "name"),
    [
        ("exact", "exact", "exact", "exact"),
        ("int8", "int8-channel", "int8-affine", "int8"),
        ("int4", "int4-channel", "int4-hadamard", "int4"),
        ("turboquant", "lloyd4-centred", "lloyd2", "turboquant"),
        (8, "int8-token", "int8-token", "int8-token"),
        (4, "int4-token", "int4-token", "int4-token"),
        (42, "lloyd3-sign", "lloyd2-plain", "turboquant-qjl"),
        (0, "exact", "exact", "exact"),
        ("8", "int8-token", "int8-token", "int8-token"),
        ("42", "lloyd3-sign", "lloyd2-plain", "turboquant-qjl"),
        ("int8/int4", "int8-channel", "int4-hadamard", "int8-channel/int4-hadamard"),
        ("int4/int4", "int4-channel", "int4-hadamard", "int4"),
        ("exact/turboquant", "exact", "lloyd2", "exact/lloyd2"),
        ("int4-channel/lloyd2", "int4-channel", "lloyd2", "int4-channel/lloyd2"),
        ("int8/lloyd2", "int8-channel", "lloyd2", "int8-channel/lloyd2"),
        ("lloyd4-centred/lloyd2", "lloyd4-centred", "lloyd2", "turboquant"),
        (KVPolicy("exact", "lloyd2"), "exact", "lloyd2", "exact/lloyd2"),
        ("int8-static/int4", "int8-static", "int4-hadamard", "int8-static/int4-hadamard"),
    ],
    ids=lambda x: repr(x) if isinstance(x, (int, str)) else "KVPolicy",
)
def test_parse(written: str | int | KVPolicy, keys: str, values: str, name: str) -> None:
    policy = parse_policy(written)
    assert (policy.keys, policy.values, policy.name) == (keys, values, name)
    assert parse_policy(policy.name).name == name
    assert parse_policy(policy) is policy


@pytest.mark.parametrize(
    "written",
    [
        "int3",
        "",
        "/",
        "int8/",
        "/int8",
        "int8/int4/int2",
        "INT8",
        "int8 ",
        "16",
        16,
        -8,
        True,
        False,
        8.0,
        None,
        ["int8"],
    ],
    ids=repr,
)
def test_unknown_policies_are_refused_with_the_list(written: object) -> None:
    with pytest.raises(UnknownPolicyError) as caught:
        parse_policy(written)  # type: ignore[arg-type]
    message = str(caught.value)
    assert all(name in message for name in POLICIES), message
    assert "\n" not in message and message.endswith(".")


def test_codec_that_does_not_exist() -> None:
    with pytest.raises(UnknownPolicyError, match=r"unknown codec 'int3'.*int8-channel.*lloyd2"):
        KVPolicy("int8-channel", "int3")
    with pytest.raises(UnknownPolicyError, match=r"unknown values 'int3'.*turboquant.*int4-hadamard"):
        parse_policy("int8/int3")


def test_policies_compare_by_value() -> None:
    assert KVPolicy("exact", "lloyd2") == KVPolicy("exact", "lloyd2")
    assert KVPolicy("exact", "lloyd2") != KVPolicy("lloyd2", "exact")
    assert len({KVPolicy("exact", "lloyd2"), KVPolicy("exact", "lloyd2")}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        POLICIES["int8"].keys = "exact"  # type: ignore[misc]


def test_tables_cannot_be_changed_and_agree() -> None:
    for table in (POLICIES, QUANT_POLICY):
        with pytest.raises(TypeError):
            table["new"] = None  # type: ignore[index]
    assert set(QUANT_POLICY.values()) <= set(POLICIES)
    assert [POLICIES[name].name for name in POLICIES] == list(POLICIES)
    assert all(policy.summary for policy in POLICIES.values())


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("policy", "per_dim", "extra"), [("int8-token", 2, 8), ("int4-token", 1, 8), ("turboquant-qjl", 0.75, 6)]
)
@pytest.mark.parametrize("page_size", [16, 64])
def test_lmdeploy_bytes(policy: str, head_dim: int, per_dim: float, extra: int, page_size: int) -> None:
    """LMDeploy's own numbers per token and head: codes, and two or three fp16 numbers for keys and for values."""
    for dtype in (torch.float16, torch.bfloat16):
        cost = page_cost(policy, head_dim, page_size=page_size, dtype=dtype)
        assert cost.bytes_per_token == per_dim * head_dim + extra
        assert cost.dense_bytes_per_token == 4 * head_dim and cost.elements_per_token == 2 * head_dim
        assert cost.ratio == pytest.approx(4 * head_dim / (per_dim * head_dim + extra), rel=1e-12)
        assert cost.bits_per_element == pytest.approx(4 * (per_dim + extra / head_dim), rel=1e-12)


@pytest.mark.parametrize(
    ("policy", "bytes_per_token"),
    [
        ("exact", 256),
        ("int8-static", 128),  # codes alone: what was calibrated is kept once per layer
        # codes of keys and values, two fp16 per channel and page of 64, two fp16 per token
        ("int8", 64 + 64 + 4 * 64 / 64 + 4),
        ("int4", 32 + 32 + 4 * 64 / 64 + 4),
        # 4 bit and 2 bit codes, a centre in fp16 per channel and page, two norms in fp16 per token
        ("turboquant", 32 + 16 + 2 * 64 / 64 + 4),
    ],
)
def test_our_bytes_at_head_dim_64(policy: str, bytes_per_token: float) -> None:
    assert page_cost(policy, 64).bytes_per_token == bytes_per_token


@pytest.mark.parametrize("policy", list(POLICIES))
def test_cost_is_the_sum_of_the_planes(policy: str) -> None:
    cost = page_cost(policy, 128, value_head_dim=64, heads=3, page_size=32, dtype=torch.float32)
    x = {"keys": torch.randn(3, 32, 128), "values": torch.randn(3, 32, 64)}
    planes = []
    for side, page in x.items():
        codec = range_of(CODECS[getattr(POLICIES[policy], side)], page)
        planes += codec.encode(page)[: len(in_pages(codec, page.shape[-1]))]
    assert cost.bytes_per_token * 32 == sum(plane.numel() * plane.element_size() for plane in planes)
    assert cost.elements_per_token == 3 * (128 + 64) and cost.dense_bytes_per_token == 4 * cost.elements_per_token
