"""Run by ``torchrun``: ``kvquant lm-eval`` with the arguments given, knowing none of lm-eval's own thousands of tasks.

Before it ends, each process says on a line of its own how many requests its model was asked.
"""

import os
import sys
from functools import partial
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from kvquant_hf.cli import main
from kvquant_hf.evaluation.lm_eval_model import KVQuantLM

asked = {"loglikelihood": 0, "generate_until": 0}


def counting(name: str) -> Any:
    """The method of that name, counted."""
    original = getattr(KVQuantLM, name)

    def method(self: KVQuantLM, requests: list[Any], *args: Any, **options: Any) -> Any:
        asked[name] += len(requests)
        return original(self, requests, *args, **options)

    return method


if __name__ == "__main__":
    lm_eval.tasks.TaskManager = partial(TaskManager, include_defaults=False)
    for name in asked:
        setattr(KVQuantLM, name, counting(name))
    try:
        main(["lm-eval", *sys.argv[1:]])
    finally:
        print(f"rank {os.environ['RANK']}: {asked}", flush=True)
