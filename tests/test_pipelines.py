"""``kvquant_hf.pipeline`` beside transformers' own pipeline and ``generate``."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command import byte_tokenizer
from models import build
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, TextStreamer

import kvquant_hf
from kvquant_hf.batching import hooks
from kvquant_hf.errors import BatchingError, KVQuantBatchingWarning, UnknownPolicyError, UnsupportedModelError

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{{ 'assistant: ' }}"
TEXTS = ["Hi, please introduce yourself", "Shanghai is " * 8, "x"]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]
GREEDY = {"do_sample": False, "max_new_tokens": 12}
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

batched = pytest.mark.skipif(bool(hooks.unsupported()), reason="this transformers has no such batching")


def save(folder: Path, name: str = "Llama", **changes: Any) -> Path:
    """A tiny random model that ends some answers early, and a tokenizer of bytes with a chat template."""
    tokenizer = byte_tokenizer(pad_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    model = build(name, TINY | {"vocab_size": len(tokenizer), "initializer_range": 0.2, "eos_token_id": None} | changes)
    model.generation_config = GenerationConfig(eos_token_id=[10, 20, 30, 40], pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return transformers.pipeline("text-generation", model=str(folder))


@pytest.fixture(scope="module")
def exact(folder: Path) -> Any:
    return kvquant_hf.pipeline(str(folder), policy="exact")


def quietly(pipe: Any, *args: Any, **kwargs: Any) -> Any:
    """A call whose warnings are of no interest: an old transformers answers every list one by one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KVQuantBatchingWarning)
        return pipe(*args, **kwargs)


@pytest.mark.parametrize(
    "prompts",
    [TEXTS[0], TEXTS, TEXTS[:1], CHATS[0], CHATS],
    ids=["text", "texts", "list-of-one", "chat", "chats"],
)
@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        GREEDY | {"return_full_text": False},
        GREEDY | {"return_tensors": True},
        GREEDY | {"num_return_sequences": 3, "do_sample": True, "top_k": 1},
        GREEDY | {"batch_size": 2},
        {"generation_config": GenerationConfig(max_new_tokens=5, do_sample=False)},
    ],
    ids=["full", "new-text", "tensors", "three-each", "two-at-a-time", "generation-config"],
)
def test_exact_equals_transformers_pipeline(prompts: Any, options: dict[str, Any], plain: Any, exact: Any) -> None:
    assert quietly(exact, prompts, **options) == plain(
        prompts, **{k: v for k, v in options.items() if k != "batch_size"}
    )
    report = exact.report()
    several = isinstance(prompts, list) and prompts is not CHATS[0]
    assert report.continuous_batching == (several and not hooks.unsupported())
    assert report.cache.policy == "exact"


def test_it_is_transformers_pipeline(exact: Any) -> None:
    assert isinstance(exact, transformers.TextGenerationPipeline)
    assert exact.task == "text-generation"


def one_by_one(folder: Path, policy: str, texts: list[str], new: int) -> list[str]:
    """The new text of each prompt by ``generate`` with a quantized cache."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    answers = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        output = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            cache_implementation="kvquant",
            cache_config={"policy": policy},
            do_sample=False,
            max_new_tokens=new,
        )
        answers.append(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
    return answers


def test_int4_equals_generate(folder: Path) -> None:
    """Prompts of two pages, so that packed pages are read."""
    texts = [letter * 140 for letter in "abc"]
    pipe = kvquant_hf.pipeline(str(folder), policy="int4", max_new_tokens=30, do_sample=False)
    wanted = one_by_one(folder, "int4", texts, 30)
    assert [answer[0]["generated_text"] for answer in quietly(pipe, texts, return_full_text=False)] == wanted
    assert pipe.report().cache.paged_calls > 0
    assert [pipe(text, return_full_text=False)[0]["generated_text"] for text in texts] == wanted


@pytest.mark.parametrize(("integer", "name"), [(8, "int8-token"), (4, "int4-token")])
def test_integers_of_lmdeploy(integer: int, name: str, folder: Path) -> None:
    pipe = kvquant_hf.pipeline(str(folder), policy=integer, **GREEDY)
    assert len(quietly(pipe, ["Hi, pls intro yourself", "Shanghai is"])) == 2
    assert pipe.report().cache.policy == name


@batched
def test_sampling_arguments_reach_the_batch(folder: Path, plain: Any, exact: Any) -> None:
    options = {"max_new_tokens": 12, "do_sample": True}
    greedy = exact(TEXTS, **GREEDY)
    assert exact(TEXTS, **options, top_k=1) == greedy
    assert exact(TEXTS, **options, temperature=1e-4) == greedy
    assert exact(TEXTS, **options, top_p=1e-4, top_k=0) == greedy
    assert exact(TEXTS, **options, temperature=100.0, top_k=0) != greedy
    penalty = GREEDY | {"repetition_penalty": 1.8}
    assert exact(TEXTS, **penalty) == plain(TEXTS, **penalty) != greedy
    assert exact.report().continuous_batching
    chosen = kvquant_hf.pipeline(str(folder), policy="exact", top_k=1, **options)  # as defaults of the pipeline
    assert chosen(TEXTS) == greedy
    assert chosen.report().continuous_batching


@batched
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stop_sequence": "a"}, "stop strings"),
        ({"num_beams": 2}, "beams"),
        ({"max_new_tokens": None, "max_length": 120}, "max_length"),
    ],
    ids=["stop-strings", "beams", "length"],
)
def test_what_batching_does_not_know_is_done_one_by_one(
    options: dict[str, Any], reason: str, folder: Path, plain: Any
) -> None:
    pipe = kvquant_hf.pipeline(str(folder), policy="exact")
    with pytest.warns(KVQuantBatchingWarning, match=f"one by one .* continuous batching has no {reason}"):
        answers = pipe(TEXTS, **GREEDY | options)
    assert answers == plain(TEXTS, **GREEDY | options)
    assert not pipe.report().continuous_batching
    assert reason in pipe.report().reason
    with warnings.catch_warnings():
        warnings.simplefilter("error", KVQuantBatchingWarning)
        pipe(TEXTS, **GREEDY | options)  # said once
    strict = kvquant_hf.pipeline(str(folder), policy="exact", continuous_batching=True)
    with pytest.raises(BatchingError, match=rf"{reason}.*; leave continuous_batching=True out"):
        strict(TEXTS, **GREEDY | options)


def test_a_streamer_sees_all_prompts(folder: Path, exact: Any, capsys: pytest.CaptureFixture[str]) -> None:
    streamer = TextStreamer(exact.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answers = quietly(exact, TEXTS, streamer=streamer, **GREEDY, return_full_text=False)
    assert capsys.readouterr().out == "".join(answer[0]["generated_text"] + "\n" for answer in answers)
    assert not exact.report().continuous_batching


def test_a_generator_is_read_lazily(exact: Any, plain: Any) -> None:
    answers = list(quietly(exact, (text for text in TEXTS), **GREEDY))
    assert answers == plain(TEXTS, **GREEDY)
    assert "prompt by prompt" in exact.report().reason


def test_never(folder: Path, plain: Any) -> None:
    pipe = kvquant_hf.pipeline(str(folder), policy="exact", continuous_batching=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KVQuantBatchingWarning)  # it was asked for
        assert pipe(TEXTS, **GREEDY) == plain(TEXTS, **GREEDY)
    assert pipe.report().reason == "continuous_batching=False"


@pytest.mark.skipif("needs transformers" not in hooks.unsupported(), reason="this transformers is not too old")
def test_an_old_transformers_answers_one_by_one(folder: Path, plain: Any) -> None:
    pipe = kvquant_hf.pipeline(str(folder), policy="exact")
    with pytest.warns(KVQuantBatchingWarning, match=r"needs transformers 5\.23"):
        assert pipe(TEXTS, **GREEDY) == plain(TEXTS, **GREEDY)


@batched
def test_a_model_that_cannot_be_batched(tmp_path: Path) -> None:
    save(tmp_path, "Falcon", num_attention_heads=2)
    pipe = kvquant_hf.pipeline(str(tmp_path), policy="exact")
    with pytest.warns(KVQuantBatchingWarning, match="FalconForCausalLM computes attention itself"):
        answers = pipe(TEXTS, **GREEDY)
    assert answers == transformers.pipeline("text-generation", model=str(tmp_path))(TEXTS, **GREEDY)


@batched
def test_a_budget(folder: Path, plain: Any) -> None:
    """Room for about one prompt at a time: the others wait."""
    pipe = kvquant_hf.pipeline(str(folder), policy="exact", max_bytes=500_000)
    assert pipe(TEXTS * 3, **GREEDY) == plain(TEXTS * 3, **GREEDY)
    assert pipe.report().cache.bytes <= 500_000


@batched
def test_more_memory_than_there_is(folder: Path, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that together might need more take what there is, and wait for it; one that never fits is refused."""
    from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler

    monkeypatch.setattr(PagedAttentionMemoryHandler, "get_available_memory", lambda self: 80_000_000)
    pipe = kvquant_hf.pipeline(str(folder), policy="exact")
    ending = {"do_sample": False, "eos_token_id": list(range(257))}  # with any token
    assert pipe(TEXTS, max_new_tokens=30_000, **ending) == plain(TEXTS, max_new_tokens=1, **ending)
    assert pipe.report().cache.blocks < len(TEXTS) * 30_000 // 64
    with pytest.raises(BatchingError, match=r"need \d+ blocks, there are"):
        pipe(TEXTS, max_new_tokens=1_000_000, **ending)


# -- models ------------------------------------------------------------------------------------------------------------


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def test_a_loaded_model_finds_its_tokenizer(folder: Path, plain: Any) -> None:
    pipe = kvquant_hf.pipeline(loaded(folder), policy="exact")
    assert pipe(TEXTS[0], **GREEDY) == plain(TEXTS[0], **GREEDY)
    stranger = build("Llama", TINY | {"vocab_size": 257})
    with pytest.raises(UnsupportedModelError, match="give it as tokenizer="):
        kvquant_hf.pipeline(stranger)


def test_dtype_and_device_are_passed_on(folder: Path) -> None:
    pipe = kvquant_hf.pipeline(str(folder), dtype=torch.bfloat16, device="cpu", policy="int8")
    pipe("x" * 70, **GREEDY)
    assert (pipe.model.dtype, pipe.device.type) == (torch.bfloat16, "cpu")
    assert "bfloat16" in str(pipe.report())


def test_a_model_whose_own_config_names_a_cache(folder: Path, plain: Any) -> None:
    """The form to save in a generation_config.json: the pipeline's policy counts."""
    model = loaded(folder)
    model.generation_config.cache_implementation = "quantized"
    model.generation_config.cache_config = {"backend": "kvquant", "policy": "int4"}
    pipe = kvquant_hf.pipeline(model, policy="exact")
    for prompts in (TEXTS[0], TEXTS):
        assert quietly(pipe, prompts, **GREEDY) == plain(prompts, **GREEDY)
        assert pipe.report().cache.policy == "exact"


@pytest.mark.model
@pytest.mark.slow
def test_a_gguf_file() -> None:
    from transformers import GgufConfig

    from kvquant_hf.cli.models import builtin_file
    from kvquant_hf.cli.terminal import CommandError

    try:
        file = builtin_file()
    except CommandError as error:
        pytest.skip(str(error))
    dequantized = {"quantization_config": GgufConfig(dequantize=True)}
    pipe = kvquant_hf.pipeline(str(file), policy="int4", dtype="float32", model_kwargs=dequantized)
    (answer,) = pipe(
        [{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=12, do_sample=False
    )
    assert "Paris" in answer["generated_text"][-1]["content"]


# -- misuse ------------------------------------------------------------------------------------------------------------


def test_what_is_refused(folder: Path, exact: Any) -> None:
    with pytest.raises(UnknownPolicyError, match="int5"):
        kvquant_hf.pipeline(str(folder), policy="int5")
    with pytest.raises(UnknownPolicyError, match="leave out cache_implementation"):
        kvquant_hf.pipeline(str(folder), cache_implementation="static")
    with pytest.raises(UnknownPolicyError, match="leave out past_key_values"):
        exact("x", past_key_values=object())
    fresh = kvquant_hf.pipeline(str(folder))
    with pytest.raises(BatchingError, match="call it first"):
        fresh.report()
