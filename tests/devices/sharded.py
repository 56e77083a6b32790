"""Run by ``torchrun``: everything that ``test_tensor_parallel.py`` asks, in one process of a model that is spread."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from batching.runs import GREEDY, config_of, prompts_of
from models import prompt
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.batching.hooks import unsupported
from kvquant_hf.errors import KVQuantError
from kvquant_hf.transformers_api.names import with_cache

POLICIES = ("exact", "int4")
CHANNEL = "int4-channel/int4"  # a static cache sees no queries to round keys by
WHOLE, GATHERED, ODD = "llama", "olmo2", "three-heads"  # folders with models
LENGTHS = (1, 30, 64, 200)
NEW = 40
BYTES = 2_000_000


def ids() -> torch.Tensor:
    """Two prompts of 150 tokens: two pages each are sealed."""
    return prompt(2, 150)


def generate(model: PreTrainedModel, **options: Any) -> list[list[int]]:
    """New tokens of both prompts."""
    given = ids()
    output = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False, **options
    )
    return output[:, given.shape[1] :].tolist()


def by_object(model: PreTrainedModel, policy: str) -> dict[str, Any]:
    """Tokens with a cache of a policy, and what its report says."""
    cache = QuantizedPagedCache(model.config, policy)
    tokens = generate(model, **with_cache(cache))
    return {"tokens": tokens, "report": cache.report().as_dict()}


def static(model: PreTrainedModel, policy: str) -> list[list[int]]:
    """Tokens with everything reserved up front."""
    options = {"policy": policy, "static": True}
    return generate(model, cache_implementation="kvquant", cache_config=options, disable_compile=True)


def batches(model: PreTrainedModel, policy: str, **room: int) -> dict[str, Any]:
    """Tokens of four requests at once, and the report of the run; ``room``: instead of ``BYTES`` of memory."""
    config = config_of(policy, **(room or {"max_bytes": BYTES}))
    prompts = prompts_of(LENGTHS)
    results = model.generate_batch(
        prompts, GREEDY, continuous_batching_config=config, persistent_manager=True, progress_bar=False
    )
    manager = model._cached_continuous_batching_manager
    report = manager.report().as_dict()
    model.destroy_cached_continuous_batching_manager()
    return {"tokens": [results[f"req_{i}"].generated_tokens for i in range(len(prompts))], "report": report}


def refusal(call: Any) -> str:
    """The error of ours that a call raises."""
    try:
        call()
    except KVQuantError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main(folder: Path) -> None:
    def spread(name: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            folder / name, distributed_config=DistributedConfig(tp_plan="auto"), dtype=torch.float32
        ).eval()

    model, gathered, odd = map(spread, (WHOLE, GATHERED, ODD))
    found: dict[str, Any] = {
        "generate": {policy: by_object(model, policy) for policy in POLICIES},
        "static": {policy: static(model, policy) for policy in ("exact", CHANNEL)},
        "gathered": by_object(gathered, "int4"),
        "odd": refusal(lambda: by_object(odd, "int4")),
    }
    if not unsupported():
        found["batches"] = {policy: batches(model, policy) for policy in POLICIES}
        found["gathered batches"] = batches(gathered, "int4")
        found["odd batches"] = refusal(lambda: batches(odd, "int4"))
        found["too long"] = refusal(lambda: batches(model, "int4", max_bytes=80_000, max_requests=1))
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
