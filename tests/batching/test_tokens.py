"""Batched requests get the tokens that each would get alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batching.runs import GREEDY, LENGTHS, batched, config_of, one_by_one, prompts_of, returning
from models import tiny_gemma2, tiny_llama, tiny_windowed
from transformers import PreTrainedModel

PROMPTS = prompts_of(LENGTHS, seed=1)
SHORT = prompts_of((3, 70, 130, 200))
BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "gemma2": tiny_gemma2,  # softcap; windows in turn with full attention
    "gpt-oss": lambda: tiny_windowed("gpt-oss"),  # sinks
    "mistral": lambda: tiny_windowed("mistral"),  # windows in every layer
}


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def alone(llama: PreTrainedModel) -> list[list[int]]:
    return one_by_one(llama, PROMPTS)


def test_exact_as_one_by_one(llama: PreTrainedModel, alone: list[list[int]]) -> None:
    found, report = batched(llama, PROMPTS, config_of("exact"))
    assert found == alone
    assert report.prefill_calls == 3 * sum(n > 1 for n in LENGTHS)
    assert report.paged_calls > 0


@pytest.mark.parametrize("architecture", ["gemma2", "gpt-oss", "mistral"])
@pytest.mark.parametrize("step", [2048, 100], ids=["whole", "chunks"])
def test_exact_of_other_models(architecture: str, step: int) -> None:
    model = BUILDERS[architecture]()
    found, _ = batched(model, PROMPTS, config_of("exact", max_batch_tokens=step, page_size=16, num_blocks=256))
    assert found == one_by_one(model, PROMPTS)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_batch_tokens": 100},
        {"scheduler_type": "prefill_first", "max_batch_tokens": 100},
        {"page_size": 16, "num_blocks": 384},
        {"prefill": "quantized"},
        {"max_requests": 3},
        {"impl": "reference"},
    ],
    ids=["chunks", "prefill-first", "small-pages", "quantized-prefill", "three-slots", "reference"],
)
def test_exact_in_any_way(llama: PreTrainedModel, alone: list[list[int]], changes: dict[str, Any]) -> None:
    assert batched(llama, PROMPTS, config_of("exact", **changes))[0] == alone


def test_requests_make_room(llama: PreTrainedModel, alone: list[list[int]]) -> None:
    """Too few blocks for all: transformers drops requests and computes them again."""
    found, report = batched(llama, PROMPTS, config_of("exact", max_requests=12, num_blocks=25, safety_margin=0.0))
    assert found == alone
    assert report.blocks == 25 - 12
    assert report.prefill_calls > 3 * sum(n > 1 for n in LENGTHS), "nobody had to make room"


@pytest.mark.parametrize("policy", ["int8", "int4", "turboquant", "int8/int4"])
def test_quantized_as_one_by_one(llama: PreTrainedModel, policy: str) -> None:
    assert batched(llama, PROMPTS, config_of(policy))[0] == one_by_one(llama, PROMPTS, policy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here, and these tensors are the CPU's")
@pytest.mark.parametrize("policy", ["exact", "int4"])
def test_triton_as_plain_torch(policy: str) -> None:
    """The GPU's kernels, in Triton's interpreter: ragged rows, an empty table, slots that lie apart, a chunk."""
    model, prompts = tiny_llama(num_hidden_layers=1), prompts_of((3, 20, 37), seed=4)
    short = copy.copy(GREEDY)
    short.max_new_tokens = 6
    found = {}
    for impl in ("triton", "reference"):
        config = config_of(policy, impl=impl, page_size=16, num_blocks=40, max_batch_tokens=32)
        found[impl], report = batched(model, prompts, config, short)
        assert report.implementation == impl
    assert found["triton"] == found["reference"]


@pytest.mark.parametrize("sharing", [True, False], ids=["shared", "copied"])
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_return_sequences(architecture: str, sharing: bool) -> None:
    """Forks of a prompt share its sealed pages, and each writes an open page of its own."""
    model = BUILDERS[architecture]()
    lengths = (1, 2, 64, 65, 66, 129, 200)  # a fork before the first page is sealed, and at its end
    prompts = prompts_of(lengths, seed=1)
    several = returning(3)
    found, _ = batched(model, prompts, config_of("exact", allow_block_sharing=sharing), several)
    assert found == [tokens for tokens in one_by_one(model, prompts) for _ in range(3)]


def test_a_shared_prefix(llama: PreTrainedModel) -> None:
    """Sealed pages of an earlier prompt are read instead of computed; what is left may be one token."""
    start = prompts_of((200,))[0]
    prompts = [start, [*start[:128], 5], [*start[:128], 5, 6, 7], start[:129], start[:64], start]
    found, report = batched(llama, prompts, config_of("exact"), in_turn=True)
    assert found == one_by_one(llama, prompts)
    assert report.shared_tokens == 128 + 128 + 128 + 0 + 192


def test_forks_of_nothing_new(llama: PreTrainedModel) -> None:
    """All that a prompt has left is the token that its forks begin with, and nobody else is in the step."""
    start = prompts_of((200,))[0]
    prompts = [start, start[:129], start[:1]]
    found, report = batched(llama, prompts, config_of("exact"), returning(2), in_turn=True)
    assert found == [tokens for tokens in one_by_one(llama, prompts) for _ in range(2)]
    assert report.shared_tokens == 128


def test_a_shared_prefix_is_answered_alike(llama: PreTrainedModel) -> None:
    """The first reader of a prompt sees exact keys, later ones packed pages; prefill="quantized" makes them alike."""
    prompt = prompts_of((500,))[0]
    found, report = batched(llama, [prompt] * 3, config_of("turboquant", prefill="quantized"), in_turn=True)
    assert found[0] == found[1] == found[2]
    assert report.shared_tokens == 2 * 448
    assert report.prefill_calls == 0
