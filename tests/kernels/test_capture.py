"""A decode step with a static cache can be recorded as a CUDA graph: shown where no GPU is.

A graph replays what was given to the device, with the addresses and numbers of the step that was recorded.  So a step
of a model may not ask the device for anything, must do the same operations on the same shapes whatever has been stored,
and must find the cache where it was.  All operators, all functions of torch that Python calls, and all launches of
kernels are watched; kernels run in Triton's interpreter, which is free to read.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from calibrated import with_range
from models import tiny_llama
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.pages import static_store
from kvquant_hf.policies.table import POLICIES
from kvquant_hf.transformers_api.names import with_cache
from kvquant_hf.triton_kernels import launching
from kvquant_hf.triton_kernels.codecs import CODECS

PAGE, MAX_LENGTH = 16, 80
# What waits for the device, and what has a shape that depends on numbers there.
READS = {"cpu", "item", "numpy", "tolist", "__array__", "__bool__", "__float__", "__index__", "__int__"}
OPERATORS = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "index_put_",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}


def described(value: Any) -> Any:
    """A tensor's shape, dtype and strides; a number as it is, except that NaN is equal to itself."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.stride()
    return repr(value) if isinstance(value, float) else value


class Watch:
    """What is given to the device inside of ``with recorded()``, as ``log``."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.launched = 0
        self._reading = False  # whether a kernel is at work

    def add(self, name: str, *about: Any) -> None:
        if not self._reading:
            self.log.append((name, tree_map(described, about)))

    def launch(self, kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        """In place of ``launching.launch``."""
        self.add(kernel.__name__, grid, args, {name: x for name, x in constants.items() if isinstance(x, int | str)})
        self.launched += 1
        self._reading = True
        kernel[grid](*args, **constants)
        self._reading = False

    def check(self, name: str, forbidden: set[str]) -> None:
        if not self._reading:
            assert name not in forbidden, f"{name} waits for the device, or makes shapes of what is there"


class Operators(TorchDispatchMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.watch.check(name, OPERATORS)
        result = func(*args, **(kwargs or {}))
        self.watch.add(name, args, kwargs, result)
        return result


class Functions(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.watch.check(getattr(func, "__name__", ""), READS)
        return func(*args, **(kwargs or {}))


def tensors_of(cache: QuantizedPagedCache) -> Iterator[torch.Tensor]:
    """All that a graph would find by its address."""
    for layer in cache.paged_layers:
        keys, values, table, lengths = layer.store.view()
        yield from (*keys.planes, keys.tail, *values.planes, values.tail, table, lengths, layer.store._before)


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """As while a CUDA graph is recorded."""
    monkeypatch.setattr(static_store, "_capturing", lambda tensor: True)


def recorded(step: Callable[[], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> tuple[Watch, torch.Tensor]:
    """What ``step`` gives to the device, and what it returns."""
    watch = Watch()
    with monkeypatch.context() as patch, Operators(watch), Functions(watch):
        patch.setattr(launching, "launch", watch.launch)
        result = step()
    return watch, result


@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_step_is_the_same_to_the_device(
    policy: str, capturing: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that make 15 to 18 tokens, the third of which seals a page; warmed up as docs/compile.md says."""
    model = tiny_llama(num_hidden_layers=2).to(device)
    options = {"page_size": PAGE, "static": True, "max_length": MAX_LENGTH, "impl": "triton"}
    cache = QuantizedPagedCache(model.config, "int8" if policy == "int8-static" else policy, **options)
    for layer in cache.paged_layers:
        codecs = CODECS[POLICIES[policy].keys], CODECS[POLICIES[policy].values]
        layer.codecs = tuple(with_range(codec, 2, 32) for codec in codecs)
    token = torch.ones(1, 1, dtype=torch.long, device=device)
    position = torch.zeros(1, 1, dtype=torch.long, device=device)  # a graph's input, written between replays

    def step() -> torch.Tensor:
        return model(token, position_ids=position, use_cache=True, **with_cache(cache)).logits

    prompt = torch.arange(1, 15, device=device).unsqueeze(0)
    with torch.no_grad():
        model(prompt[:, :2], use_cache=True, **with_cache(cache))
        step()
        cache.reset()
        model(prompt, use_cache=True, **with_cache(cache))
        addresses = [x.data_ptr() for x in tensors_of(cache)]
        logs, lengths = [], []
        for tokens in range(14, 18):
            position.fill_(tokens)
            watch, logits = recorded(step, monkeypatch)
            assert watch.launched >= 2 * 3 and logits.isfinite().all()
            logs.append(watch.log)
            lengths.append(cache.layers[1].store.lengths.tolist())
    assert lengths == [[[0, 15]], [[0, 16]], [[1, 1]], [[1, 2]]]
    assert logs[0] == logs[1] == logs[2] == logs[3]
    assert [x.data_ptr() for x in tensors_of(cache)] == addresses


def test_a_cache_that_grows_is_noticed(capturing: None, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same test with a cache that counts in Python: its steps differ, and its page table moves."""
    model = tiny_llama(num_hidden_layers=1).to(device)
    cache = QuantizedPagedCache(model.config, "int4", page_size=PAGE, impl="triton")
    token = torch.ones(1, 1, dtype=torch.long, device=device)
    cache._log.out_of_range = True  # or scales would be looked at, which happens on a CPU alone
    step = functools.partial(model, token, use_cache=True, **with_cache(cache))
    with torch.no_grad():
        model(torch.arange(1, 16, device=device).unsqueeze(0), use_cache=True, **with_cache(cache))
        logs = [recorded(step, monkeypatch)[0].log for _ in range(2)]
    assert logs[0] != logs[1]


@pytest.mark.parametrize("read", [torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, bool, int, torch.nonzero])
def test_reads_are_noticed(read: Callable[[torch.Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1, dtype=torch.int32)
    with pytest.raises(AssertionError, match="waits for the device"):
        recorded(lambda: read(x), monkeypatch)
