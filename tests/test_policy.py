"""What users write as a policy, and what a token costs under each."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import range_of

from kvquant_hf import KVPolicy, LayerwisePolicy
from kvquant_hf.errors import PolicyFileError, UnknownPolicyError, WrongModelError
from kvquant_hf.pages.parameters import in_pages
from kvquant_hf.policies.cost import page_cost
from kvquant_hf.policies.file import write_layers
from kvquant_hf.policies.table import POLICIES, QUANT_POLICY, parse_policy, policy_from_dict
from kvquant_hf.triton_kernels.codecs import CODECS


@pytest.mark.parametrize(
    ("written", "keys", "values", "name"),
    [
        ("exact", "exact", "exact", "exact"),
        ("int8", "int8-channel", "int8-affine", "int8"),
        ("int4", "int4-ranked", "int4-hadamard", "int4"),
        ("turboquant", "int4-ranked", "octet2", "turboquant"),
        (8, "int8-token", "int8-token", "int8-token"),
        (4, "int4-token", "int4-token", "int4-token"),
        (42, "lloyd3-sign", "lloyd2-plain", "turboquant-qjl"),
        (0, "exact", "exact", "exact"),
        ("8", "int8-token", "int8-token", "int8-token"),
        ("42", "lloyd3-sign", "lloyd2-plain", "turboquant-qjl"),
        ("int8/int4", "int8-channel", "int4-hadamard", "int8-channel/int4-hadamard"),
        ("int4/int4", "int4-ranked", "int4-hadamard", "int4"),
        ("exact/turboquant", "exact", "octet2", "exact/octet2"),
        ("int4/turboquant", "int4-ranked", "octet2", "turboquant"),
        ("int4-ranked/octet2", "int4-ranked", "octet2", "turboquant"),
        ("int4-channel/lloyd2", "int4-channel", "lloyd2", "int4-channel/lloyd2"),
        ("kv3", "int3-ranked", "octet3", "kv3"),
        ("kv2.9", "int3-ranked", "octet2", "kv2.9"),
        ("kv2.4", "int2-ranked", "octet2", "kv2.4"),
        ("int8/lloyd2", "int8-channel", "lloyd2", "int8-channel/lloyd2"),
        ("lloyd4-centred/lloyd2", "lloyd4-centred", "lloyd2", "lloyd4-centred/lloyd2"),
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
    assert len({KVPolicy("exact", "lloyd2"), KVPolicy("exact", "lloyd2", "what it is for")}) == 1
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
        ("fp8", 128),
        ("nvfp4", 64 + 8),  # an e4m3 scale for each of four blocks
        ("int8-static", 128),  # codes alone: what was calibrated is kept once per layer
        # codes of keys and values, two fp16 per channel and page of 64, two fp16 per token
        ("int8", 64 + 64 + 4 * 64 / 64 + 4),
        # an fp16 offset, a step and an order of a byte each per channel
        ("int4", 32 + 32 + (2 + 1 + 1) * 64 / 64 + 4),
        # 4 bit and 2 bit codes, the same per channel, one fp16 per token
        ("turboquant", 32 + 16 + (2 + 1 + 1) * 64 / 64 + 2),
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


# -- by layer ----------------------------------------------------------------------------------------------------------

MIXED = ("int8", "int4/turboquant", KVPolicy("lloyd3-channel", "lloyd3"))


def test_a_policy_for_each_layer() -> None:
    mixed = LayerwisePolicy(MIXED, model=("llama", 3))
    assert mixed.name == "mixed" and parse_policy(mixed) is mixed
    assert [policy.name for policy in mixed.layers] == ["int8", "turboquant", "lloyd3-channel/lloyd3"]
    assert mixed == LayerwisePolicy(list(MIXED)) == policy_from_dict(mixed.as_dict())
    assert mixed != LayerwisePolicy(["int8", "int8", "int8"]) and mixed != LayerwisePolicy([*MIXED, "int8"])
    assert mixed != parse_policy("int8") == policy_from_dict(parse_policy("int8").as_dict())
    assert len({mixed, LayerwisePolicy(MIXED)}) == 1


@pytest.mark.parametrize("layers", [[], "int8", ["int8", "int3"], [LayerwisePolicy(["int8"])]], ids=repr)
def test_no_policy_for_each_layer(layers: Any) -> None:
    with pytest.raises(UnknownPolicyError, match=r"^[^\n]*; [^\n]*\.$"):
        LayerwisePolicy(layers)


def test_cost_of_a_mix_is_the_mean_of_its_layers() -> None:
    costs = [page_cost(policy, 64, heads=2).bytes_per_token for policy in MIXED]
    assert page_cost(LayerwisePolicy(MIXED), 64, heads=2).bytes_per_token == pytest.approx(sum(costs) / 3, rel=1e-12)


def saved(path: Path, **changes: Any) -> Path:
    """A policy file, with some of its fields changed."""
    write_layers(path, LayerwisePolicy(MIXED).as_dict()["layers"], ("llama", 3), {"bits_per_element": 4.2})
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_file_gives_the_same_policy(tmp_path: Path) -> None:
    path = saved(tmp_path / "tuned.json")
    for given in (path, str(path)):
        policy = parse_policy(given)
        assert policy == LayerwisePolicy(MIXED)
        policy.check_model(("llama", 3))
        with pytest.raises(WrongModelError, match=r"\['llama', 3\] .* \['llama', 4\]; make one with `kvquant tune`"):
            policy.check_model(("llama", 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "another"}, "holds no policies by layer"),
        ({"version": 2}, "format version 2, this version of kvquant_hf reads 1"),
        ({"layers": []}, "holds no policies by layer"),
        ({"layers": [{"keys": "exact"}]}, "holds no policies by layer"),
        ({"layers": "exact"}, "holds no policies by layer"),
        ({"model": None}, "holds no policies by layer"),
        ({"layers": [{"keys": "exact", "values": "int3"}]}, "unknown codec 'int3'"),
    ],
    ids=str,
)
def test_files_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownPolicyError, match=message):
        parse_policy(saved(tmp_path / "tuned.json", **changes))


@pytest.mark.parametrize("content", [None, b"", b"[]", b"3", b"\xff\xfe", b"{"], ids=repr)
def test_files_that_are_no_policy(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PolicyFileError, match=r"x\.json.*kvquant tune --out FILE") as caught:
        parse_policy(str(path))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
