"""The ways to quantized pages, what is refused, and that transformers is put back as it was."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from batching.runs import GREEDY, NEW, config_of, one_by_one, prompts_of
from models import tiny_falcon, tiny_llama, tiny_windowed
from support.architectures import ARCHITECTURES
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig, ContinuousMixin
from transformers.generation.continuous_batching import continuous_api
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import kvquant_hf
from kvquant_hf.batching import hooks
from kvquant_hf.batching.cache import QuantizedBatchingCache
from kvquant_hf.batching.calls import ATTENTION
from kvquant_hf.batching.manager import QuantizedBatchingManager
from kvquant_hf.errors import BatchingError, UnknownPolicyError, UnsupportedModelError

PROMPTS = prompts_of((5, 100))
PLAIN = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=512)
INT4 = {"policy": "int4"}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[QuantizedBatchingCache]:
    """The caches of ours that are made."""
    caches: list[QuantizedBatchingCache] = []
    original = QuantizedBatchingCache.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        caches.append(self)

    monkeypatch.setattr(QuantizedBatchingCache, "__init__", init)
    return caches


def named(**options: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=NEW, do_sample=False, **options)


@pytest.mark.parametrize(
    "arguments",
    [
        {"generation_config": named(cache_implementation="kvquant", cache_config=INT4)},
        {"generation_config": named(cache_implementation="kvquant")},  # int4 unless it is said
        {"generation_config": named(cache_implementation="quantized", cache_config={"backend": "kvquant", **INT4})},
        {"generation_config": GREEDY, "cache_implementation": "kvquant", "cache_config": INT4},
    ],
    ids=["generation-config", "name-alone", "backend", "arguments"],
)
def test_by_name(arguments: dict[str, Any], made: list[QuantizedBatchingCache]) -> None:
    model = tiny_llama()
    before = model.config._attn_implementation
    results = model.generate_batch(PROMPTS, continuous_batching_config=PLAIN, **arguments)
    assert [result.generated_tokens for result in results.values()] == one_by_one(model, PROMPTS, "int4")
    (cache,) = made
    assert (cache.policy.name, cache.pages.tokens_per_page, cache.max_batch_tokens) == ("int4", 64, 512)
    assert cache.log.paged.total() > 0
    assert model.config._attn_implementation == before
    assert model.generation_config.eos_token_id is None


def test_by_the_models_own_config(made: list[QuantizedBatchingCache]) -> None:
    model = tiny_llama()
    model.generation_config.cache_implementation = "kvquant"
    model.generation_config.cache_config = {"policy": "int8", "page_size": 32, "max_bytes": 3_000_000}
    assert len(model.generate_batch(PROMPTS, max_new_tokens=2)) == 2
    assert len(model.generate_batch(PROMPTS, GREEDY)) == 2  # which leaves it open, as generate() understands it
    cache, _ = made
    assert (cache.policy.name, cache.pages.tokens_per_page) == ("int8", 32)


def test_a_prompt_that_never_fits_is_an_error() -> None:
    """transformers would write it into the log and return the results of the others."""
    config = config_of("int8", num_blocks=4, max_requests=1)
    with pytest.raises(BatchingError, match="a prompt of 700 tokens and up to 24 new ones need 11 blocks"):
        tiny_llama().generate_batch(prompts_of((5, 700)), GREEDY, continuous_batching_config=config)


def opt() -> Any:
    """A model that asks the cache for its one length."""
    return ARCHITECTURES["OPT"].build()


@pytest.mark.parametrize("late", [False, True])
def test_a_model_that_ends_the_run_is_an_error(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However late the requests come: transformers would drop those that come after with a word in the log."""
    if late:
        add = QuantizedBatchingManager.add_request

        def add_later(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self._added:
                self._generation_thread.join(30)
                assert not self._generation_thread.is_alive()
            return add(self, *args, **kwargs)

        monkeypatch.setattr(QuantizedBatchingManager, "add_request", add_later)
    with pytest.raises(UnsupportedModelError, match=r"use generate\(\) for this model"):
        opt().generate_batch(PROMPTS, GREEDY, continuous_batching_config=config_of("int8"))


def test_a_request_that_comes_as_the_run_ends_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is let in, and the thread has looked into the queue for the last time; the next is refused."""
    model = opt()
    with model.continuous_batching_context_manager(GREEDY, continuous_batching_config=config_of("int8")) as manager:
        manager.add_request(PROMPTS[0])
        assert "use generate()" in manager.get_result(timeout=30).error
        manager._generation_thread.join(30)
        with monkeypatch.context() as patch:
            patch.setattr(manager.background_thread_status, "can_accept_new_requests", lambda: None)
            name = manager.add_request(PROMPTS[1])
        late = manager.get_result(timeout=1)
        assert late.request_id == name and "use generate()" in late.error
        with pytest.raises(UnsupportedModelError, match=r"use generate\(\) for this model"):
            manager.add_request(PROMPTS[0])
        manager.start()
        assert manager.add_request(PROMPTS[0]) is not None


def test_an_error_that_is_not_ours_ends_the_run_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a broken weight")

    model = tiny_llama()
    monkeypatch.setattr(model, "forward", failing)
    with model.continuous_batching_context_manager(GREEDY, continuous_batching_config=config_of("int8")) as manager:
        manager.add_request(PROMPTS[0])
        assert "a broken weight" in manager.get_result(timeout=30).error
        manager._generation_thread.join(30)
        with pytest.raises(BatchingError, match=r"\(a broken weight\); stop the manager and start it again") as raised:
            manager.add_request(PROMPTS[0])
        assert isinstance(raised.value.__cause__, RuntimeError)
    with pytest.raises(BatchingError, match="a broken weight"):
        model.generate_batch(PROMPTS, GREEDY, continuous_batching_config=config_of("int8"))


def test_by_a_config_of_ours(made: list[QuantizedBatchingCache]) -> None:
    model = tiny_llama()
    results = model.generate_batch(PROMPTS, GREEDY, continuous_batching_config=config_of("int8"))
    assert [result.generated_tokens for result in results.values()] == one_by_one(model, PROMPTS, "int8")
    assert len(made) == 1


@pytest.mark.parametrize("by_name", [False, True])
def test_a_budget_chooses_the_policy(by_name: bool, made: list[QuantizedBatchingCache]) -> None:
    """What is chosen is named, and answers as if it had been named."""
    model = tiny_llama()
    if by_name:
        config = named(cache_implementation="kvquant", cache_config={"policy": "auto", "bits": 5.5})
        results = model.generate_batch(PROMPTS, config, continuous_batching_config=PLAIN)
    else:
        results = model.generate_batch(PROMPTS, GREEDY, continuous_batching_config=config_of("auto:5.5"))
    assert [result.generated_tokens for result in results.values()] == one_by_one(model, PROMPTS, "int4")
    (cache,) = made
    assert cache.policy.name == "int4"


def test_budgets_that_cannot_be() -> None:
    with pytest.raises(UnknownPolicyError, match=r"auto:3\.5"):
        config_of("auto")
    with pytest.raises(UnknownPolicyError, match="leave bits out"):
        config_of("int4", bits=3.5)
    with pytest.raises(
        UnknownPolicyError, match="unknown cache option 'kv_budget' for continuous batching; use policy"
    ):
        config = named(cache_implementation="kvquant", cache_config={"policy": "auto", "kv_budget": "1GB"})
        tiny_llama().generate_batch(PROMPTS, config, continuous_batching_config=PLAIN)


def test_others_are_left_alone(made: list[QuantizedBatchingCache]) -> None:
    model = tiny_llama()
    assert type(model.init_continuous_batching(GREEDY, PLAIN)) is continuous_api.ContinuousBatchingManager
    results = model.generate_batch(PROMPTS, GREEDY, continuous_batching_config=PLAIN)
    assert [result.generated_tokens for result in results.values()] == one_by_one(model, PROMPTS)
    assert made == []


def test_a_manager_that_is_kept(made: list[QuantizedBatchingCache]) -> None:
    model, config = tiny_llama(), config_of("exact")
    for _ in range(2):
        results = model.generate_batch(PROMPTS, GREEDY, continuous_batching_config=config, persistent_manager=True)
        assert [result.generated_tokens for result in results.values()] == one_by_one(model, PROMPTS)
    assert len(made) == 1
    assert isinstance(model._cached_continuous_batching_manager, QuantizedBatchingManager)
    for other in (config_of("int8"), PLAIN):
        with pytest.raises(BatchingError, match=r"call model\.destroy_cached_continuous_batching_manager"):
            model.init_continuous_batching(GREEDY, other)
    model.destroy_cached_continuous_batching_manager()
    assert type(model.init_continuous_batching(GREEDY, PLAIN)) is continuous_api.ContinuousBatchingManager
    plain_kept = tiny_llama()
    plain_kept.generate_batch(PROMPTS, GREEDY, continuous_batching_config=PLAIN, persistent_manager=True)
    with pytest.raises(BatchingError, match="with no quantized pages, and this call asks for exact"):
        plain_kept.init_continuous_batching(GREEDY, config)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cpu_offload_space": 1.0}, BatchingError, "cpu_offload_space: a request that must make room is computed"),
        ({"cpu_offload_space": None}, BatchingError, "cpu_offload_space"),
        ({"use_cuda_graph": True}, BatchingError, "use_cuda_graph .* costs its launches"),
        ({"use_cuda_graph": (False, True)}, BatchingError, "use_cuda_graph"),
        ({"q_padding_interval_size": 64}, BatchingError, "padding interval"),
        ({"use_async_batching": True}, BatchingError, "use_async_batching: the host prepares"),
        ({"default_compile_level": 1}, BatchingError, "torch.compile: the model runs as it is"),
        ({"max_blocks_per_request": 32}, BatchingError, "max_blocks_per_request: it belongs to FlashAttention"),
        ({"page_size": 30}, UnknownPolicyError, "multiple of 8, got 30"),
        ({"policy": "int5"}, UnknownPolicyError, "unknown policy 'int5'"),
        ({"prefill": "none"}, UnknownPolicyError, "unknown prefill"),
        ({"max_requests": 0}, UnknownPolicyError, "max_requests must be a positive integer"),
        ({"max_bytes": 10**9, "num_blocks": 5}, UnknownPolicyError, "two ways to give one budget"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kvquant_hf.QuantizedBatchingConfig(**options)
    plain = {name: value for name, value in options.items() if hasattr(ContinuousBatchingConfig(), name)}
    ours = {name: value for name, value in options.items() if name not in plain}
    asking = named(cache_implementation="kvquant", cache_config=ours)
    if "page_size" not in options:  # of dense pages
        with pytest.raises(error, match=message):
            tiny_llama().init_continuous_batching(asking, ContinuousBatchingConfig(**plain))


@pytest.mark.parametrize("option", ["max_pages", "static", "offload", "nonsense"])
def test_options_of_one_cache_are_refused(option: str) -> None:
    asking = named(cache_implementation="kvquant", cache_config={option: True})
    with pytest.raises(UnknownPolicyError, match=f"option '{option}' for continuous batching; use policy"):
        tiny_llama().init_continuous_batching(asking)


def test_no_first_tokens_are_kept() -> None:
    """A prefix that is shared would lack them: none can be asked for, and answers are those of pages alone."""
    with pytest.raises(BatchingError, match=r"keeps no first tokens exact.*leave sinks out"):
        tiny_llama().init_continuous_batching(named(cache_implementation="kvquant", cache_config={"sinks": 1}))
    model, prompts = tiny_llama(), prompts_of((90, 130))
    asking = named(cache_implementation="kvquant", cache_config=INT4 | {"sinks": 0})
    results = model.generate_batch(prompts, generation_config=asking, continuous_batching_config=PLAIN)
    assert [result.generated_tokens for result in results.values()] == one_by_one(model, prompts, "int4")


def test_options_in_two_places_are_refused() -> None:
    asking = named(cache_implementation="kvquant", cache_config=INT4)
    with pytest.raises(BatchingError, match="give the options in one of them"):
        tiny_llama().init_continuous_batching(asking, config_of("int8"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_windowed("llama4"), "has chunked_attention; use generate"),
        (tiny_falcon, "computes attention itself"),
    ],
    ids=["chunks", "own-attention"],
)
def test_refused_models(model: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        model().init_continuous_batching(GREEDY, config_of("int4"))


def test_nothing_to_report_yet() -> None:
    with pytest.raises(BatchingError, match="call start"):
        tiny_llama().init_continuous_batching(GREEDY, config_of("int4")).report()


def test_the_attention_function_outside_of_a_run() -> None:
    model = tiny_llama()
    model.init_continuous_batching(GREEDY, config_of("int4"))  # which is not stopped
    with pytest.raises(BatchingError, match="belongs to continuous batching"):
        model(torch.tensor([[1, 2, 3]]))


def test_the_documented_ways(made: list[QuantizedBatchingCache], capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
    ways, settings = (x for x in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "pipeline" not in x)
    ways = ways.replace("2_000_000_000", "20_000_000").replace('{"policy": "int4"}', '{"max_bytes": 20_000_000}')
    assert ways.count("20_000_000") == 2
    model = tiny_llama()
    names = {"kvquant_hf": kvquant_hf, "GenerationConfig": GenerationConfig, "model": model}
    names |= {"prompts": PROMPTS, "prompt": PROMPTS[0]}
    exec(ways, names)
    assert [cache.policy.name for cache in made] == ["int4"] * 3
    assert "attention calls" in capsys.readouterr().out
    with model.continuous_batching_context_manager(continuous_batching_config=config_of("int4")) as manager:
        exec(settings, names | {"manager": manager})
        lengths = set()
        while len(lengths) < 2:
            result = manager.get_result(timeout=30)
            assert result is not None and result.error is None
            lengths.add(len(result.generated_tokens))
    assert 50 in lengths


def test_disable_restores() -> None:
    script = """
        from transformers.generation import ContinuousMixin
        from transformers.generation.continuous_batching import continuous_api as api
        look = lambda: (vars(ContinuousMixin)["init_continuous_batching"], vars(ContinuousMixin)["generate_batch"],
                        api.PagedAttentionCache)
        before = look()
        import kvquant_hf
        kvquant_hf.enable()
        assert all(a is not b for a, b in zip(look(), before))
        kvquant_hf.disable()
        assert all(a is b for a, b in zip(look(), before))
        kvquant_hf.enable()
        assert all(a is not b for a, b in zip(look(), before))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, cwd=sys.prefix)


def test_disabled_is_disabled() -> None:
    kvquant_hf.disable()
    try:
        assert ATTENTION not in AttentionInterface()
        assert ATTENTION not in AttentionMaskInterface()
        assert isinstance(continuous_api.PagedAttentionCache, type)
        for method in (ContinuousMixin.init_continuous_batching, ContinuousMixin.generate_batch):
            assert method.__globals__["__name__"] != hooks.__name__
    finally:
        kvquant_hf.enable()
    assert ATTENTION in AttentionInterface()


def test_no_other_name_is_made_up() -> None:
    with pytest.raises(AttributeError, match="no attribute 'NoSuchThing'"):
        _ = kvquant_hf.NoSuchThing
