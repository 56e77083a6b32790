"""Each request's own settings: held against ``generate`` alone with the same processors, whatever runs beside it."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from batching.runs import GREEDY, NEW, batched, config_of, next_result, one_by_one, prompts_of
from models import VOCAB, tiny_llama
from transformers import GenerationConfig, PreTrainedModel

from kvquant_hf.batching.sampling import draw
from kvquant_hf.errors import BatchingError

PROMPTS = prompts_of((5, 40, 70, 130), seed=3)
PENALTY = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
BIAS = {"sequence_bias": {(7,): 40.0}, "bad_words_ids": [[9]]}
WARM = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def other() -> PreTrainedModel:
    """The same model again: the one that a manager has is not free for ``generate``."""
    return tiny_llama()


@pytest.fixture
def manager(model: PreTrainedModel) -> Iterator[Any]:
    with model.continuous_batching_context_manager(GREEDY, continuous_batching_config=config_of("exact")) as found:
        yield found


def answers(manager: Any, names: list[str]) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    while len(found) < len(names):
        result = next_result(manager)
        if result is not None and result.is_finished():
            assert result.error is None, result.error
            found[result.request_id] = result.generated_tokens
    return [found[name] for name in names]


def alone(model: PreTrainedModel, prompt: list[int], **settings: Any) -> list[int]:
    ids = torch.tensor([prompt])
    config = GenerationConfig(max_new_tokens=NEW, **settings)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output[0, len(prompt) :].tolist()


def test_neighbours_have_their_own_settings(other: PreTrainedModel, manager: Any) -> None:
    several: list[dict[str, Any]] = [{}, PENALTY, BIAS, {"min_new_tokens": 10, "suppress_tokens": [4, 5]}]
    names = [manager.add_request(prompt, **each) for prompt, each in zip(PROMPTS, several, strict=True)]
    found = answers(manager, names)
    assert found == [alone(other, prompt, **each) for prompt, each in zip(PROMPTS, several, strict=True)]
    assert found[1] != alone(other, PROMPTS[1]), "the penalty changes nothing, and the test shows nothing"
    assert 7 in found[2] and 9 not in found[2]


def test_a_config_of_its_own_leaves_open_what_it_does_not_say(other: PreTrainedModel, manager: Any) -> None:
    name = manager.add_request(PROMPTS[0], generation_config=GenerationConfig(max_new_tokens=7, **PENALTY))
    assert answers(manager, [name]) == [alone(other, PROMPTS[0], **PENALTY)[:7]]


def test_a_seed_gives_the_same_answer_alone_and_among_others(manager: Any) -> None:
    def ask(prompt: list[int], seed: int | None) -> str:
        return manager.add_request(prompt, seed=seed, **WARM)

    first = answers(manager, [ask(PROMPTS[1], 5)])[0]
    names = [ask(PROMPTS[0], 5), ask(PROMPTS[1], 6), ask(PROMPTS[1], 5), manager.add_request(PROMPTS[1])]
    among = answers(manager, names)
    assert among[2] == first
    assert len({tuple(x) for x in among}) == 4, "other seeds and other prompts are other answers"


def test_torchs_generator_is_the_seed_of_requests_without_one(manager: Any) -> None:
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(answers(manager, [manager.add_request(PROMPTS[1], **WARM)])[0])
    assert drawn[0] == drawn[1] != drawn[2]


def test_dropped_requests_draw_the_same_numbers(model: PreTrainedModel) -> None:
    """Too few blocks: requests are dropped, computed again, and go on where they were."""
    warm = GenerationConfig(max_new_tokens=70, **WARM)
    runs = []
    for blocks in ({"num_blocks": 96}, {"num_blocks": 12, "max_requests": 4}):
        config = config_of("exact", seed=4, page_size=16, **blocks)
        runs.append(batched(model, PROMPTS[:3] * 2, config, warm)[0])
    assert runs[0] == runs[1]


def test_forks_differ(model: PreTrainedModel) -> None:
    warm = GenerationConfig(max_new_tokens=NEW, num_return_sequences=3, **WARM)
    found, _ = batched(model, PROMPTS[1:2], config_of("exact", seed=1), warm)
    assert len({tuple(x) for x in found}) == 3


def test_top_k_of_one_is_greedy(model: PreTrainedModel) -> None:
    config = copy.copy(GREEDY)
    config.do_sample, config.top_k = True, 1
    assert batched(model, PROMPTS, config_of("exact"), config)[0] == one_by_one(model, PROMPTS)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_beams": 3}, "no beams"),
        ({"guidance_scale": 2.0}, "classifier-free guidance"),
        ({"stop_strings": ["x"]}, "no stop strings"),
        ({"heat": 3}, "no setting 'heat'"),
        ({"do_sample": True, "temperature": -1.0}, "settings are refused: .*temperature"),
        ({"do_sample": True, "top_k": -3}, "settings are refused: .*top_k"),
        ({"sequence_bias": {(VOCAB + 5,): 1.0}}, "settings are refused"),
        ({"suppress_tokens": [10**6], "sequence_bias": {(10**6,): 1.0}}, "settings are refused"),
    ],
)
def test_what_a_request_cannot_have_is_refused(manager: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BatchingError, match=said):
        manager.add_request(PROMPTS[0], **settings)
    assert answers(manager, [manager.add_request(PROMPTS[0])])


def test_settings_that_fail_in_a_step_end_their_request_alone(other: PreTrainedModel, manager: Any) -> None:
    """A penalty that grows beyond all bounds after a few tokens."""
    broken = manager.add_request(
        PROMPTS[0], exponential_decay_length_penalty=(2, 1e300), eos_token_id=5, suppress_tokens=[5]
    )
    names = {broken, manager.add_request(PROMPTS[1])}
    found = {}
    while names - found.keys():
        result = next_result(manager)
        if result is not None and result.is_finished():
            found[result.request_id] = result
    assert "out of range" in found[broken].error
    (fine,) = names - {broken}
    assert found[fine].generated_tokens == alone(other, PROMPTS[1])
    assert answers(manager, [manager.add_request(PROMPTS[2])]) == [alone(other, PROMPTS[2])], "and the run goes on"
    assert manager.report().live_requests == 0


def test_scores_beyond_all_bounds_are_survived() -> None:
    rows = torch.tensor([[1.0, 3.0, 2.0], [float("-inf")] * 3, [0.0, float("inf"), 1.0]])
    assert draw(rows / 1e-45, [0.5, 0.5, 0.5])[0] in (0, 1, 2)
    assert draw(rows, [1 - 2**-53] * 3).tolist()[1:] == [0, 1]


def test_a_manager_refuses_what_its_requests_cannot_have(model: PreTrainedModel) -> None:
    with pytest.raises(BatchingError, match="no beams"):
        model.generate_batch(
            PROMPTS, GenerationConfig(num_beams=2, max_new_tokens=2), continuous_batching_config=config_of("exact")
        )


def test_draws_follow_the_distribution_and_spare_the_impossible() -> None:
    """Every hundredth number of [0, 1) falls to a token in proportion to its probability."""
    chances = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0])
    numbers = [(i + 0.5) / 100 for i in range(100)] + [1 - 2**-53]
    found = draw(chances.log().expand(len(numbers), -1), numbers)
    assert found.bincount(minlength=6).tolist() == [0, 50, 0, 25, 26, 0]
