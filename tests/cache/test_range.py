"""Keys and values beyond what scales, or codes without one, hold are said once, and counted."""

import copy
import warnings
from typing import Any

import pytest
import torch
from models import tiny_llama
from stores import ONLINE, vectors

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.errors import KVQuantRangeWarning

PAGE, HEADS, DIM = 16, 2, 32
CONFIG = tiny_llama().config
QUANTIZED = [name for name in ONLINE if name != "exact"]
ENDS = {"fp8": 448.0, "nvfp4": 2688.0}  # of floating point; others keep scales in fp16 or in the model's dtype
BOUNDED = ["int8", "int4", "turboquant", *ENDS]


def new_cache(policy: str, **options: Any) -> QuantizedPagedCache:
    return QuantizedPagedCache(CONFIG, policy, page_size=PAGE, **options)


def caught(action: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in found if issubclass(w.category, KVQuantRangeWarning)]


def update(cache: QuantizedPagedCache, keys: torch.Tensor, values: torch.Tensor) -> None:
    for layer in range(len(cache.layers)):
        cache.update(keys, values, layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", BOUNDED)
@pytest.mark.parametrize("side", ["keys", "values"])
def test_said_once_when_a_page_is_sealed(side: str, policy: str, dtype: torch.dtype) -> None:
    cache = new_cache(policy)
    pair = {name: vectors(2, HEADS, 3 * PAGE, DIM).to(dtype) for name in ("keys", "values")}
    assert caught(lambda: update(cache, **pair)) == []
    pair[side] = pair[side].clone()
    pair[side][1, 0, PAGE : PAGE + 4] = 1e8  # fills pages 1 of the second sequence
    (message,) = caught(lambda: update(cache, **pair))
    assert "65504" in message and "policy='exact'" in message and "cache.report()" in message
    assert caught(lambda: update(cache, **pair)) == []
    assert caught(cache.report) == []
    report = cache.report()
    assert report.saturated_pages == 2 * len(cache.layers) == report.as_dict()["saturated_pages"]
    assert f"{report.saturated_pages} pages with" in dict(report.rows())["out of range"]


@pytest.mark.parametrize("policy", ONLINE)
def test_nothing_is_said_within_the_range(policy: str) -> None:
    cache = new_cache(policy)
    x = vectors(1, HEADS, 3 * PAGE, DIM)
    x = x / x.abs().max()
    large = 0.95 * ENDS.get(policy, 6e4 * DIM**-0.5) * x
    assert caught(lambda: (update(cache, large, x), update(cache, 0 * x, 1e-30 * x), cache.report())) == []
    assert cache.report().saturated_pages == 0 and "out of range" not in dict(cache.report().rows())


@pytest.mark.parametrize("policy", ENDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_where_floating_point_ends(policy: str, sign: int) -> None:
    cache = new_cache(policy)
    x = vectors(1, HEADS, PAGE + 1, DIM)
    x[0, 1, 3, 5] = sign * ENDS[policy] * 1.01
    assert len(caught(lambda: update(cache, x, 0 * x))) == 1
    assert cache.report().saturated_pages == len(cache.layers)


def test_exact_holds_anything() -> None:
    cache = new_cache("exact")
    x = 1e30 * vectors(1, HEADS, 3 * PAGE, DIM)
    assert caught(lambda: (update(cache, x, x), cache.report())) == []
    half = new_cache("exact")
    ends = torch.full((1, HEADS, 3 * PAGE, DIM), 65504.0, dtype=torch.float16)
    assert caught(lambda: (update(half, ends, ends), half.report())) == []


@pytest.mark.parametrize("policy", BOUNDED)
def test_decoding_into_a_page_that_is_sealed_later(policy: str) -> None:
    cache = new_cache(policy)
    x = 1e8 * vectors(1, HEADS, PAGE + 1, DIM)
    assert caught(lambda: [update(cache, y, y) for y in x[:, :, :PAGE].split(1, 2)]) == []  # exact: the open page
    assert cache.report().saturated_pages == 0
    assert len(caught(lambda: update(cache, x[:, :, PAGE:], x[:, :, PAGE:]))) == 1


@pytest.mark.parametrize("policy", BOUNDED)
def test_static_caches_say_it_with_the_report(policy: str) -> None:
    cache = new_cache(policy, static=True, max_length=100)
    x = 1e8 * vectors(2, HEADS, 2 * PAGE + 1, DIM)
    update(cache, x, x)
    assert len(caught(cache.report)) == 1 and caught(cache.report) == []
    assert cache.report().saturated_pages == 2 * 2 * len(cache.layers)
    cache.reset()
    assert cache.report().saturated_pages == 0


def test_shared_pages_are_counted_once_and_dropped_ones_not() -> None:
    cache = new_cache("int8")
    x = 1e8 * vectors(1, HEADS, 2 * PAGE + 1, DIM)
    caught(lambda: update(cache, x, x))
    cache.batch_repeat_interleave(3)
    assert cache.report().saturated_pages == 2 * len(cache.layers)
    fork = copy.deepcopy(cache)
    assert caught(fork.report) == [] and fork.report().saturated_pages == 2 * len(cache.layers)
    cache.crop(-PAGE)
    assert cache.report().saturated_pages == len(cache.layers)
