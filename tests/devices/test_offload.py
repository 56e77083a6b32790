"""A model of which accelerate keeps layers on the disk, and maps that blocks cannot follow."""

from pathlib import Path

import pytest
from batching.runs import LENGTHS, batched, config_of, one_by_one, prompts_of
from devices.sharded import by_object, generate
from models import tiny_llama
from transformers import LlamaForCausalLM, PreTrainedModel

from kvquant_hf.batching.hooks import unsupported
from kvquant_hf.errors import UnsupportedModelError

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head")
in_batches = pytest.mark.skipif(bool(unsupported()), reason="this transformers has no continuous batching for it")


@pytest.fixture(scope="module")
def whole() -> PreTrainedModel:
    return tiny_llama()


def on_disk(model: PreTrainedModel, folder: Path, *parts: str) -> PreTrainedModel:
    """The same model with ``parts`` on the disk, the rest in memory."""
    model.save_pretrained(folder / "model")
    places = {part: "disk" if part in parts else "cpu" for part in (*PARTS, "model.rotary_emb")}
    spread = LlamaForCausalLM.from_pretrained(folder / "model", device_map=places, offload_folder=folder / "weights")
    assert sum(parameter.device.type == "meta" for parameter in spread.parameters()) > 0
    return spread.eval()


@pytest.fixture(scope="module")
def spread(whole: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """Two of its three layers on the disk."""
    return on_disk(whole, tmp_path_factory.mktemp("offloaded"), "model.layers.1", "model.layers.2")


def test_exact_is_dynamic_cache(whole: PreTrainedModel, spread: PreTrainedModel) -> None:
    assert by_object(spread, "exact")["tokens"] == generate(whole)


def test_int4_reads_pages(whole: PreTrainedModel, spread: PreTrainedModel) -> None:
    found, expected = by_object(spread, "int4"), by_object(whole, "int4")
    assert found == expected  # the whole report, too
    assert found["report"]["fallback_calls"] == 0 < found["report"]["paged_calls"]


@in_batches
@pytest.mark.parametrize(("policy", "reference"), [("exact", None), ("int4", "int4")])
def test_batches(whole: PreTrainedModel, spread: PreTrainedModel, policy: str, reference: str | None) -> None:
    prompts = prompts_of(LENGTHS[:8], seed=1)
    found, report = batched(spread, prompts, config_of(policy))
    assert found == one_by_one(whole, prompts, reference)
    assert report.paged_calls > 0


@in_batches
def test_an_offloaded_embedding(whole: PreTrainedModel, tmp_path: Path) -> None:
    """It is the first of the weights, whose device transformers takes for the requests; ``generate`` takes theirs."""
    spread = on_disk(whole, tmp_path, *PARTS)
    assert by_object(spread, "exact")["tokens"] == generate(whole)
    assert by_object(spread, "int4")["tokens"] == by_object(whole, "int4")["tokens"]
    before = spread.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=r"first weights of this model are offloaded.*keep the embedding"):
        batched(spread, prompts_of((5,)), config_of("int4"))
    assert spread.config._attn_implementation == before


@in_batches
def test_layers_on_several_devices_are_refused() -> None:
    """A map over two GPUs, which is all that is looked at."""
    model = tiny_llama()
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": "cpu"}
    with pytest.raises(UnsupportedModelError, match=r"layers of this model are on 2; use generate\(\), or tensor"):
        batched(model, prompts_of((5,)), config_of("int4"))
    model.hf_device_map = {"model": 0, "lm_head": "disk"}
    batched(model, prompts_of((5,)), config_of("int4"))
