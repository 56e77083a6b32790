"""A list of prompts, answered by one run that ends with them."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from transformers import GenerationConfig

from ..errors import BatchingError
from .config import QuantizedBatchingConfig
from .manager import QuantizedBatchingManager
from .report import BatchingReport

_AT_A_TIME = 1024  # requests that transformers computes in one step


def answer(
    model: Any,
    prompts: Sequence[list[int]],
    generation_config: GenerationConfig,
    options: Mapping[str, Any],
    at_a_time: int | None = None,
) -> tuple[list[list[list[int]]], BatchingReport]:
    """The new tokens of each prompt.

    Args:
        model: the model.
        prompts: token ids, none of them empty.
        generation_config: complete, with ``max_new_tokens``.
        options: for ``QuantizedBatchingConfig``; without ``max_bytes`` the pages have what these prompts need, or as
            much of it as there is.
        at_a_time: prompts that are computed at a time; None: as many as can be.

    Returns:
        For each prompt ``num_return_sequences`` lists of token ids, and the report when all had ended.

    Raises:
        BatchingError: a prompt does not fit, or failed.
        UnsupportedModelError: the model cannot be batched.
        OutOfPages: ``max_bytes`` have no room for a request.
    """
    each = generation_config.num_return_sequences or 1
    found: dict[str, list[int]] = {}
    with ExitStack() as stack:
        lengths = [len(prompt) + generation_config.max_new_tokens for prompt in prompts]
        manager = _start(stack, model, lengths, generation_config, options, at_a_time)
        new = generation_config.max_new_tokens
        names: list[Any] = [manager.add_request(prompt, max_new_tokens=new) for prompt in prompts]
        while len(found) < len(names) * each:
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise BatchingError("the run ended before all prompts were answered; the log says why.")
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise BatchingError(f"a prompt could not be answered: {result.error}; the log says more.")
                found[result.request_id] = result.generated_tokens
    children = [[f"{name}__child#{i}" for i in range(each - 1)] for name in names]
    answers = [[found[name] for name in (*forks, own)] for forks, own in zip(children, names, strict=True)]
    return answers, manager.report()


def _start(
    stack: ExitStack,
    model: Any,
    lengths: list[int],
    generation_config: GenerationConfig,
    options: Mapping[str, Any],
    at_a_time: int | None,
) -> QuantizedBatchingManager:
    """A manager that ``stack`` will stop, with memory for requests of so many tokens."""
    each = generation_config.num_return_sequences or 1
    bound = {} if at_a_time is None else {"max_requests": at_a_time * each}

    def start(room: dict[str, int]) -> QuantizedBatchingManager:
        config = QuantizedBatchingConfig(**{**options, **room})
        run = model.continuous_batching_context_manager(generation_config, continuous_batching_config=config)
        manager: QuantizedBatchingManager = stack.enter_context(run)
        return manager

    if options.get("max_bytes") is not None:
        return start(bound)
    longest = sorted(lengths, reverse=True)[: at_a_time or _AT_A_TIME]
    pages = each * sum(-(-length // options["page_size"]) for length in longest)
    try:
        # An eighth beside what they need: transformers lets no prompt in that would begin the last tenth.
        return start({"max_requests": len(longest) * each, "num_blocks": pages + pages // 8 + 2})
    except MemoryError:
        return start(bound)  # the share of the free memory that transformers takes by itself
