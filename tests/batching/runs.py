"""The same prompts one by one and batched, greedily, with a look at how close a runner-up ever came."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from models import VOCAB
from stores import seeing_no_queries
from ties import Margins
from transformers import GenerationConfig, PreTrainedModel

import kvquant_hf

NEW = 24
# Below, at and above a page, and a few pages.
LENGTHS = (1, 2, 30, 63, 64, 65, 100, 128, 129, 200, 333, 600)
GREEDY = GenerationConfig(max_new_tokens=NEW, do_sample=False)


def returning(count: int) -> GenerationConfig:
    """Greedy, ``count`` sequences of each prompt, which ``GenerationConfig`` would not take at once."""
    config = copy.copy(GREEDY)
    config.num_return_sequences = count
    return config


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random prompts without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def one_by_one(model: PreTrainedModel, prompts: Sequence[list[int]], policy: str | None = None) -> list[list[int]]:
    """The new tokens of each prompt by ``generate``, alone, with pages alone; None: with ``DynamicCache``.

    Keys are rounded to the nearest codes, as in a batch, whose pages requests share.
    """
    margins, found = Margins(), []
    pages = {"policy": policy, "sinks": 0}
    kvquant = {} if policy is None else {"cache_implementation": "kvquant", "cache_config": pages}
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with seeing_no_queries():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=GREEDY, **kvquant, **margins.options
            )
        found.append(output[0, len(prompt) :].tolist())
    margins.check()
    return found


def config_of(policy: Any, **changes: Any) -> Any:
    """A config with room for everything, unless ``changes`` say otherwise."""
    room = {} if "max_bytes" in changes else {"num_blocks": 96}
    return kvquant_hf.QuantizedBatchingConfig(policy=policy, **{"max_batch_tokens": 2048, **room, **changes})


def next_result(manager: Any) -> Any:
    """The next result, or None if there was none for a second.  What a run that ends says last may come just after."""
    result = manager.get_result(timeout=1)
    if result is None and not manager.is_running():
        result = manager.get_result(timeout=1)
        assert result is not None, "the run ended early"
    return result


def results_of(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    config: Any,
    generation_config: GenerationConfig = GREEDY,
    in_turn: bool = False,
) -> tuple[list[Any], Any]:
    """What became of each prompt, and the report when all had ended.

    Args:
        model: the model.
        prompts: the prompts.
        config: a config of ours.
        generation_config: greedy by default.
        in_turn: whether each prompt waits for the one before it.
    """
    found: dict[str, Any] = {}
    with model.continuous_batching_context_manager(generation_config, continuous_batching_config=config) as manager:
        each = generation_config.num_return_sequences or 1
        groups = [[prompt] for prompt in prompts] if in_turn else [list(prompts)]
        for group in groups:
            names = manager.add_requests(group, max_new_tokens=generation_config.max_new_tokens)
            wanted = [f"{name}__child#{i}" for name in names for i in range(each - 1)] + names
            before = len(found)
            while len(found) < before + len(wanted):
                result = next_result(manager)
                if result is not None and (result.is_finished() or result.error is not None):
                    found[result.request_id] = result
    order = sorted(found, key=lambda name: (int(name.removeprefix("req_").partition("__")[0]), name))
    return [found[name] for name in order], manager.report()


def batched(*arguments: Any, **options: Any) -> tuple[list[list[int]], Any]:
    """The new tokens of each prompt, and the report; arguments as of ``results_of``."""
    results, report = results_of(*arguments, **options)
    errors = [result.error for result in results if result.error is not None]
    assert not errors, errors
    assert (report.live_requests, report.used_blocks) == (0, 0), "a page is leaked"
    return [result.generated_tokens for result in results], report
