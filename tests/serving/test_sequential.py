"""Answers in turn: for models that cannot be batched, and for others that a request names."""

from pathlib import Path

import openai
import pytest
import transformers
from command import save_tiny_model
from models import build, tiny_falcon
from packaging.version import Version
from serving.servers import NAME, alone, character_tokenizer, serving, tiny_model, wait_until
from transformers import LlamaConfig, LlamaForCausalLM

from kvquant_hf.errors import ServingError, UnsupportedModelError
from kvquant_hf.serving.options import ServeOptions

MESSAGES = [{"role": "user", "content": "one at a time"}]


def test_as_generate_alone() -> None:
    with serving(policy="int4", continuous_batching=False) as served:
        expected = alone(tiny_model(), served.tokenizer, MESSAGES[0]["content"], 90, "int4", sinks=None)
        ask = served.client.chat.completions.create
        answer = ask(model=NAME, messages=MESSAGES, max_tokens=90)
        assert answer.choices[0].message.content == expected
        streamed = ask(model=NAME, messages=MESSAGES, max_tokens=90, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == expected
        stop = expected[10:13]
        for stream in (False, True):
            stopped = ask(model=NAME, messages=MESSAGES, max_tokens=90, stop=stop, stream=stream)
            text = (
                "".join(chunk.choices[0].delta.content or "" for chunk in stopped)
                if stream
                else stopped.choices[0].message.content
            )
            assert text == expected[: expected.index(stop)]
        wait_until(lambda: not served.app.ledger.live)
        report = served.app.report()
        assert (report["continuous_batching"], report["requests"]["finished"]) == (False, 4)
        assert report["cache"]["policy"] == "int4" and report["cache"]["fallback_calls"] == 0
        assert report["bytes_held"] == report["cache"]["bytes"] > 0
        with pytest.raises(openai.BadRequestError, match="the limit of this server is 512 tokens"):
            ask(model=NAME, messages=MESSAGES, max_tokens=600)


@pytest.mark.parametrize("batching", [False, True])
def test_a_budget_chooses_the_policy(batching: bool) -> None:
    with serving(policy="auto:5.5", continuous_batching=batching) as served:
        answer = served.client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=2)
        assert answer.usage.completion_tokens == 2
        assert served.app.report()["policy"] == "int4"


def test_a_model_that_cannot_be_batched_says_so() -> None:
    """Falcon before it runs, GPT-NeoX in the step that is tried first: nobody is served by a run that has ended."""
    models = [tiny_falcon()]
    if Version(transformers.__version__).release >= (5, 24):  # before, it can be batched
        small = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        models.append(build("GPTNeoX", small | {"intermediate_size": 64}))
    for model in models:
        with (
            pytest.raises(UnsupportedModelError, match=r"use generate\(\)"),
            serving(model, policy="int4", kv_budget=1_000_000),
        ):
            pass


def test_other_models_only_where_they_are_allowed(tmp_path: Path) -> None:
    """The folder of another model: loaded when a request names it, and answered in turn, quantized too."""
    folder = str(save_tiny_model(tmp_path / "other"))
    options = {"model": folder, "prompt": "hello", "max_tokens": 4}
    with serving(policy="int4", kv_budget=1_000_000) as closed, pytest.raises(openai.NotFoundError):
        closed.client.completions.create(**options)
    with serving(policy="int4", kv_budget=1_000_000, allow_any_model=True) as served:
        assert served.client.completions.create(**options).usage.completion_tokens <= 4
        assert [model.id for model in served.client.models.list()] == [NAME, folder]
        with pytest.raises(openai.NotFoundError, match="cannot be loaded"):
            served.client.completions.create(**options | {"model": str(tmp_path / "nowhere")})
        own = served.client.completions.create(model=NAME, prompt="hello", max_tokens=4)
        assert own.usage.completion_tokens == 4


@pytest.mark.parametrize("stream", [True, False])
def test_another_model_without_such_a_cache_is_refused(tmp_path: Path, stream: bool) -> None:
    """One whose head_dim a policy cannot store, where that of the server's can: said, and no one waits for ever."""
    folder = tmp_path / "odd"
    save_tiny_model(folder)
    odd = LlamaForCausalLM(LlamaConfig.from_pretrained(folder, head_dim=6))
    odd.save_pretrained(folder)
    with serving(policy="turboquant", kv_budget=1_000_000, allow_any_model=True) as served:
        with pytest.raises(openai.APIError) as refused:
            list(served.client.completions.create(model=str(folder), prompt="hello", max_tokens=4, stream=stream))
        assert "head_dim" in f"{refused.value} {refused.value.body}"
        assert served.client.completions.create(model=NAME, prompt="hello", max_tokens=2).usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_budget": 1.5}, "a share between 0 and 1"),
        ({"kv_budget": -3}, "must be positive"),
        ({"max_concurrent": 0}, "max_concurrent must be at least 1"),
        ({"kv_budget": 10**6, "continuous_batching": False}, "kv_budget bound what is batched"),
        ({"queue": -1}, "queue must be at least 0"),
        ({"api_key": " "}, "the API key is empty"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, float], said: str) -> None:
    with pytest.raises(ServingError, match=said):
        ServeOptions(**options)


def test_the_tokenizer_of_these_tests_gives_back_what_it_got() -> None:
    tokenizer = character_tokenizer()
    assert tokenizer.decode(tokenizer("a page ~!").input_ids) == "a page ~!"
