"""Every test: one thread, fixed seeds, memory that shows when read unwritten, and a package that stays enabled."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its threads
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import random
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton decides when it is imported, which our package does

from transformers.generation import configuration_utils
from transformers.modeling_utils import AttentionInterface

import kvquant_hf
from kvquant_hf.pages import pool as pool_module

torch.set_num_threads(1)

POISON_BYTE = 0xAB


def pytest_collection_finish() -> None:
    """Have collections look at what tests make, not at a million objects of torch, transformers and pytest."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _poisoned(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``original``, whose result is filled with NaN (0xAB for integers) when kvquant_hf asked for it."""

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        if torch.compiler.is_compiling():  # which cannot look at who asks
            return original(*args, **kwargs)
        tensor = original(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").startswith("kvquant_hf"):
            tensor.fill_(float("nan") if tensor.is_floating_point() else POISON_BYTE)
        return tensor

    return empty


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that kvquant_hf allocates without writing it is full of NaN, so that reading it shows in any result."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(pool_module, "_MAPPED_BYTES", 1 << 62)  # mappings come as zeros


@pytest.fixture(autouse=True)
def _stays_enabled() -> Iterator[None]:
    """A test that disables the package or patches transformers has to clean up."""
    yield
    enabled = "kvquant" in configuration_utils.ALL_CACHE_IMPLEMENTATIONS and "kvquant" in AttentionInterface()
    kvquant_hf.enable()
    assert enabled, "the test left kvquant_hf disabled"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases",
        type=int,
        default=0,
        help="of each test at most so many of its cases, spread; tests/support: of each model",
    )


@pytest.hookimpl(trylast=True)  # what -m and -k leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Notebooks first: each takes a minute in a process of its own, and at the end one worker would wait for them."""
    items.sort(key=lambda item: "notebooks" not in item.nodeid)
    if most := config.getoption("--cases"):
        tests: dict[str, list[pytest.Item]] = {}
        for item in items:
            name, _, case = item.nodeid.partition("[")
            if "support" in name:  # a case is a model or <model>-<way of generating>
                name = f"{name}[{case.rpartition('-')[0] or case}"
            tests.setdefault(name, []).append(item)
        kept = set()
        for turn, cases in enumerate(tests.values()):  # another way of the next model
            kept |= {cases[(turn + i * len(cases) // most) % len(cases)] for i in range(most)}
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
