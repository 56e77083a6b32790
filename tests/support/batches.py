"""Four requests at once, in blocks of quantized pages: what is run for the column on continuous batching."""

import copy
from typing import Any

import torch
from batching.runs import config_of, prompts_of, results_of
from support.architectures import IMAGE_TOKEN
from support.features import NEW, PAGE, Runner, Turn
from ties import ROUNDING, Margins

from kvquant_hf.errors import UnsupportedModelError

LENGTHS = (1, 21, 40, 64)  # a token, windows and a rotary embedding crossed, pages sealed and a page just full
SEEDS = {"Gemma2": 3, "OLMo2": 3}  # prompts without a close runner-up
SUMMARY = f"`generate_batch` with four prompts of {', '.join(map(str, LENGTHS[:-1]))} and {LENGTHS[-1]} tokens"


def requests(run: Runner) -> list[dict[str, torch.Tensor]]:
    """The prompts, as ``generate`` takes them."""
    prompts = prompts_of(LENGTHS, SEEDS.get(run.architecture.name, 1))
    ids = [torch.tensor([[3 + token % (IMAGE_TOKEN - 16) for token in prompt]]) for prompt in prompts]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]


def one_by_one(run: Runner) -> list[Turn]:
    """Each by ``generate``, with the cache of ``run``."""
    return [run.generate(inputs) for inputs in requests(run)]


def at_once(run: Runner) -> tuple[list[Turn], Any]:
    """All of them in blocks of the policy of ``run``, with the mean log-probability of their new tokens as scores; and
    the report of the run.

    Raises:
        KVQuantError: the model is refused, be it when it is called.
        RuntimeError: a request failed otherwise.
    """
    asked = requests(run)
    settings = copy.deepcopy(run.model.generation_config)
    settings.max_new_tokens, settings.do_sample = NEW, False
    config = config_of(run.policy, page_size=PAGE, num_blocks=200, return_logprobs=True)
    results, report = results_of(run.model, [inputs["input_ids"][0].tolist() for inputs in asked], config, settings)
    turns = []
    for inputs, result in zip(asked, results, strict=True):
        if result.error is not None:
            raise (UnsupportedModelError if "use generate()" in result.error else RuntimeError)(result.error)
        tokens = torch.cat([inputs["input_ids"], torch.tensor([result.generated_tokens])], 1)
        turns.append(Turn(tokens, None, torch.tensor(result.logprobs).mean().unsqueeze(0), inputs))
    return turns, report


def is_a_tie(turn: Turn) -> bool:
    """Whether rounding might have chosen another token somewhere."""
    margins = Margins()
    margins.see(turn.logits)
    return margins.closest <= 2 * ROUNDING
