"""A model that transformers has spread over two processes, with a cache and with blocks in each of them.

What is compared with is the same model in one process.  One launch does everything; tests read what it wrote.
"""

import json
from typing import Any

import pytest
from batching.runs import batched, config_of, one_by_one, prompts_of
from devices.launch import PROCESSES, torchrun
from devices.sharded import BYTES, CHANNEL, GATHERED, LENGTHS, NEW, ODD, POLICIES, WHOLE, batches, by_object, generate
from models import build, tiny_llama
from transformers import PreTrainedModel

from kvquant_hf.batching.hooks import unsupported
from kvquant_hf.errors import UnsupportedModelError
from kvquant_hf.transformers_api.heads import shards_of_heads

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
in_batches = pytest.mark.skipif(bool(unsupported()), reason="this transformers has no continuous batching for it")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole() -> PreTrainedModel:
    """Llama, 2 key/value heads of 32."""
    return tiny_llama()


@pytest.fixture(scope="module")
def gathered() -> PreTrainedModel:
    """OLMo2 normalizes keys over all heads, so its plan puts them together in each process; 2 heads of 16."""
    options = {"vocab_size": 97, "num_hidden_layers": 2, "initializer_range": 0.2, "eos_token_id": None}
    return build("Olmo2", SMALL | options)


@pytest.fixture(scope="module")
def ranks(
    whole: PreTrainedModel, gathered: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("sharded")
    odd = tiny_llama(hidden_size=192, num_attention_heads=6, num_key_value_heads=3)
    for name, model in {WHOLE: whole, GATHERED: gathered, ODD: odd}.items():
        model.save_pretrained(folder / name)
    torchrun("sharded.py", folder)
    return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def alone(whole: PreTrainedModel) -> dict[str, Any]:
    """Tokens and report of one process, by policy; None: of ``DynamicCache``."""
    return {None: {"tokens": generate(whole)}} | {policy: by_object(whole, policy) for policy in (*POLICIES, CHANNEL)}


def test_generate_is_that_of_one_process(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    assert all(len(row) == NEW for row in alone[None]["tokens"])
    for rank in ranks:
        assert rank["generate"]["exact"]["tokens"] == alone[None]["tokens"]
        assert rank["generate"]["int4"]["tokens"] == alone["int4"]["tokens"]


def test_static_is_that_of_one_process(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank in ranks:
        assert rank["static"] == {"exact": alone[None]["tokens"], CHANNEL: alone[CHANNEL]["tokens"]}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_report_is_of_its_own_process(ranks: list[dict[str, Any]], alone: dict[str, Any], policy: str) -> None:
    """Half of the heads, half of the bytes, all of the tokens."""
    one = alone[policy]["report"]
    for rank in ranks:
        report = rank["generate"][policy]["report"]
        assert report["packed_bytes"] * PROCESSES == one["packed_bytes"]
        assert report["dense_bytes"] * PROCESSES == one["dense_bytes"]
        # Where the first tokens are that are kept exact, an int32 for each sequence and layer, every process knows.
        positions = 4 * report["paged_layers"] * report["batch_size"] * bool(report["sinks"])
        assert (report["open_page_bytes"] - positions) * PROCESSES == one["open_page_bytes"] - positions
        assert report["tokens"] == one["tokens"] and report["fallback_calls"] == 0 < report["paged_calls"]


def test_heads_that_are_put_together_are_held_by_each(ranks: list[dict[str, Any]], gathered: PreTrainedModel) -> None:
    one = by_object(gathered, "int4")
    for rank in ranks:
        assert rank["gathered"]["tokens"] == one["tokens"]
        assert rank["gathered"]["report"]["packed_bytes"] == one["report"]["packed_bytes"]


def test_half_a_head_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for way in ("odd", "odd batches")[: 1 if unsupported() else 2]:
            assert rank[way].startswith("UnsupportedModelError: 3 key/value heads cannot be shared evenly by 2")


@in_batches
def test_batches_are_those_of_one_process(ranks: list[dict[str, Any]], whole: PreTrainedModel) -> None:
    prompts = prompts_of(LENGTHS)
    for policy, reference in (("exact", None), ("int4", "int4")):
        expected = one_by_one(whole, prompts, reference)
        assert all(rank["batches"][policy]["tokens"] == expected for rank in ranks)


@in_batches
@pytest.mark.parametrize("policy", POLICIES)
def test_a_process_has_more_blocks_in_the_same_memory(
    ranks: list[dict[str, Any]], whole: PreTrainedModel, policy: str
) -> None:
    """``max_bytes`` is of each process, and a block has its share of the heads: half as large, twice as many."""
    one = batches(whole, policy)["report"]
    for rank in ranks:
        report = rank["batches"][policy]["report"]
        assert report["requests"] == one["requests"] and report["bytes"] <= BYTES
        for size in ("bytes_per_block", "dense_bytes_per_block", "open_page_bytes"):
            assert report[size] * PROCESSES == one[size], size
        held = [x["open_page_bytes"] + (x["blocks"] + 2) * x["bytes_per_block"] for x in (report, one)]
        assert held == [report["bytes"], one["bytes"]] and min(held) > BYTES - one["bytes_per_block"]
        assert report["blocks"] > PROCESSES * one["blocks"]  # open pages are half as large, too
        assert report["paged_calls"] > 0 == report["used_blocks"]
    assert ranks[0]["batches"][policy]["report"] == ranks[1]["batches"][policy]["report"]


@in_batches
def test_blocks_of_heads_that_are_put_together(ranks: list[dict[str, Any]], gathered: PreTrainedModel) -> None:
    prompts = prompts_of(LENGTHS)
    found, one = batched(gathered, prompts, config_of("int4", max_bytes=BYTES))
    for rank in ranks:
        assert rank["gathered batches"]["tokens"] == found
        assert rank["gathered batches"]["report"]["bytes_per_block"] == one.bytes_per_block


@in_batches
def test_every_process_hears_that_a_prompt_is_too_long(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["too long"].startswith("BatchingError: a prompt of 200 tokens") for rank in ranks)


COLUMNS = {"model.layers.*.self_attn.k_proj": "colwise", "model.layers.*.mlp.up_proj": "colwise"}


@pytest.mark.parametrize(
    ("plan", "heads", "processes", "shards"),
    [
        (COLUMNS, 8, 4, 4),
        (COLUMNS, 3, 1, 1),
        ({"model.layers.*.self_attn.k_proj": "colwise_gather_output"}, 3, 2, 1),
        ({"model.layers.*.mlp.up_proj": "colwise"}, 3, 2, 1),
        ({"gpt_neox.layers.*.attention.query_key_value": "colwise"}, 8, 2, 2),
        (None, 3, 2, 1),
    ],
)
def test_shards_of_heads(plan: dict[str, str] | None, heads: int, processes: int, shards: int) -> None:
    assert shards_of_heads(plan, heads, processes) == shards


@pytest.mark.parametrize(("heads", "processes"), [(1, 2), (8, 3), (2, 4)])
def test_heads_that_cannot_be_shared(heads: int, processes: int) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{heads} key/value heads cannot be shared evenly by {processes}"):
        shards_of_heads(COLUMNS, heads, processes)
