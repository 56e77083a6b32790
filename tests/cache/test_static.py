"""QuantizedPagedCache(static=True): one graph for every token, and the tokens of a cache that grows.

``generate`` compiles on a GPU only; ``CompileConfig._compile_all_devices`` is transformers' own way of testing that
elsewhere.  Graphs are counted by torch: ``unique_graphs`` goes up with each compilation.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import prompt, ragged_prompts, tiny_llama, tiny_windowed
from ties import Margins
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.transformers_api.names import with_cache

PAGE = 16
STATIC = {"page_size": PAGE, "static": True}
GREEDY = {"max_new_tokens": 30, "do_sample": False}


class Recorder:
    """A backend that runs what it is given as it is, and keeps it."""

    def __init__(self, name: str = "eager") -> None:
        self.name = name
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend(self.name)(graph, inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recorder":
        return self  # ``CompileConfig`` copies its backend

    def calls(self, operator: str) -> list[torch.fx.Node]:
        """Calls of one of the package's operators in the last graph."""
        name = f"kvquant_hf.{operator}"
        return [node for node in self.graphs[-1].graph.nodes if str(node.target).startswith(name)]


@pytest.fixture(autouse=True)
def poison() -> None:
    """In place of that of all tests, which ``torch.compile`` cannot follow; memory is poisoned in test_static_store."""


@pytest.fixture(autouse=True)
def _no_graphs_before() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_llama(num_hidden_layers=2)


def compile_config(backend: Any) -> CompileConfig:
    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    config._compile_all_devices = True
    return config


def decode(model: PreTrainedModel, step: Any, cache: Any, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """The tokens that follow ``ids``: the prompt through the model, then one by one through ``step``."""
    margins = Margins()
    with torch.no_grad():
        logits = [model(ids, **with_cache(cache)).logits[:, -1:]]
        for _ in range(steps):
            logits.append(step(logits[-1].argmax(-1), **with_cache(cache)).logits[:, -1:])
    margins.see(torch.cat(logits, 1))
    margins.check()
    return torch.cat(logits, 1).argmax(-1)


def graphs() -> tuple[int, int]:
    """Graphs compiled so far, and graph breaks."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def test_one_graph_for_512_steps_a_reset_and_another_cache() -> None:
    llama = tiny_llama(num_hidden_layers=1)
    ids = prompt(1, 37)
    expected = decode(llama, llama, DynamicCache(config=llama.config), ids, 512)
    assert len(expected.unique()) > 20, "the model repeats itself"
    cache = QuantizedPagedCache(llama.config, "exact", max_length=37 + 512, **STATIC)
    step = torch.compile(llama.forward, fullgraph=True, backend="eager", dynamic=False)
    assert torch.equal(decode(llama, step, cache, ids, 512), expected)
    assert graphs() == (1, 0)
    assert cache.report().tokens == 37 + 512 and cache.get_seq_length() == 37 + 512
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(decode(llama, step, cache, ids, 20), expected[:, :21])
    other = QuantizedPagedCache(llama.config, "exact", max_length=37 + 512, **STATIC)
    assert torch.equal(decode(llama, step, other, ids, 20), expected[:, :21])
    assert graphs() == (1, 0)


def test_generate_compiles_by_itself(llama: PreTrainedModel) -> None:
    """By name: left padding, a second call, and a shorter one all find the graph; tokens as without any."""
    inputs = ragged_prompts((40, 21, 3))
    policy = "int4-channel/int4-hadamard"  # a static cache sees no queries to round keys by
    grown = QuantizedPagedCache(llama.config, policy, page_size=PAGE)
    expected = llama.generate(**inputs, **with_cache(grown), **GREEDY)
    recorder = Recorder("aot_eager")
    options = {"cache_implementation": "kvquant", "cache_config": STATIC | {"policy": policy}}
    options["compile_config"] = compile_config(recorder)
    for _ in range(2):
        assert torch.equal(llama.generate(**inputs, **options, **GREEDY), expected)
    shorter = llama.generate(**inputs, **options, **(GREEDY | {"max_new_tokens": 9}))
    assert torch.equal(shorter, expected[:, : 40 + 9])
    assert len(recorder.graphs) == 1 and graphs() == (1, 0)
    assert [len(recorder.calls(name)) for name in ("append_pages", "paged_attention", "begin_step")] == [2, 2, 1]


def test_a_forward_that_is_compiled_as_a_whole() -> None:
    """The first prompt too: it makes the memory inside of its graph."""
    llama = tiny_llama(num_hidden_layers=1)
    inputs = ragged_prompts((40, 21, 3))
    expected = llama.generate(**inputs, **GREEDY)
    llama.forward = torch.compile(llama.forward, fullgraph=True, backend="eager")
    for _ in range(2):
        cache = QuantizedPagedCache(llama.config, "exact", max_length=80, **STATIC)
        assert torch.equal(llama.generate(**inputs, **with_cache(cache), **GREEDY), expected)
    assert graphs() == (2, 0)  # the prompt, and a token


@pytest.mark.slow
def test_inductor_changes_pages_in_place() -> None:
    """The default backend: equal tokens, and no plane is copied to be written to."""
    model = tiny_llama(num_hidden_layers=1, hidden_size=64, intermediate_size=64, head_dim=16)
    ids = prompt(1, 20)
    expected = decode(model, model, DynamicCache(config=model.config), ids, 20)
    cache = QuantizedPagedCache(model.config, "exact", max_length=60, **STATIC)
    step = torch.compile(model.forward, fullgraph=True, dynamic=False)
    assert torch.equal(decode(model, step, cache, ids, 20), expected)
    assert graphs() == (1, 0)
    missed = {name: n for name, n in counters["inductor"].items() if "missed_reinplacing" in name}
    assert not any(missed.values()), missed


def test_kernels_in_a_graph() -> None:
    """impl="triton": the operators launch the kernels; here in Triton's interpreter."""
    model = tiny_llama(num_hidden_layers=1)
    ids = prompt(1, 15)
    cache = QuantizedPagedCache(model.config, "int8", max_length=20, impl="triton", **STATIC)
    paged = QuantizedPagedCache(model.config, "int8", page_size=PAGE, impl="triton")
    step = torch.compile(model.forward, fullgraph=True, backend="eager", dynamic=False)
    assert torch.equal(decode(model, step, cache, ids, 4), decode(model, model, paged, ids, 4))
    assert graphs() == (1, 0) and cache.stores[0].sealed_pages == 1


def test_windows() -> None:
    """All tokens are kept and hidden by the mask; a step reads the pages of its window.  Or transformers' own layer."""
    model = tiny_windowed("gemma3")
    ids = prompt(2, 50)
    expected = model.generate(ids, **(GREEDY | {"max_new_tokens": 15}))
    recorder = Recorder()
    options = GREEDY | {"compile_config": compile_config(recorder), "max_new_tokens": 15}
    for sliding in ("quantized", "exact"):
        cache = QuantizedPagedCache(model.config, "exact", max_length=79, sliding=sliding, **STATIC)
        output = model.generate(ids, **with_cache(cache), disable_compile=sliding == "exact", **options)
        assert torch.equal(output, expected)
    assert len(recorder.graphs) == 1
    assert Counter(node.args[17] for node in recorder.calls("paged_attention")) == {24: 2, 0: 2}


def test_chunks_take_backs_and_beams(llama: PreTrainedModel) -> None:
    """What happens between steps, and steps of several tokens: as with a cache that grows."""
    ids = prompt(1, 45)
    ways = [
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 11},
        {"do_sample": True, "num_return_sequences": 3},
    ]
    for way in ways:
        outputs = []
        for options in ({}, STATIC | {"max_length": 80}):
            cache = QuantizedPagedCache(llama.config, "int8", **({"page_size": PAGE} | options))
            torch.manual_seed(3)
            outputs.append(llama.generate(ids, **with_cache(cache), **(GREEDY | way)))
        assert torch.equal(*outputs), way


def test_a_second_turn_and_a_copy(llama: PreTrainedModel) -> None:
    ids = prompt(1, 30)
    cache = QuantizedPagedCache(llama.config, "exact", max_length=120, **STATIC)
    first = llama.generate(ids, **with_cache(cache), **GREEDY)
    twin = copy.deepcopy(cache)
    for each, seed in ((cache, 1), (twin, 2)):
        longer = torch.cat([first, prompt(1, 5, seed)], 1)
        expected = llama.generate(longer, **GREEDY)
        assert torch.equal(llama.generate(longer, **with_cache(each), **GREEDY), expected)


def test_memory_stays_where_it_is(llama: PreTrainedModel) -> None:
    """Addresses are what a CUDA graph records: none changes, whatever is called; torch is told so."""
    cache = QuantizedPagedCache(llama.config, "int4", max_length=90, **STATIC)
    tensors: list[torch.Tensor] = []

    def held() -> list[int]:
        tensors[:] = [
            x
            for store in cache.stores
            for side in store.view()[:2]
            for x in (*side.planes, side.tail, store.page_table, store.lengths)
        ]
        return [x.data_ptr() for x in tensors]

    llama.generate(prompt(2, 40), **with_cache(cache), **GREEDY)
    before = held()
    assert all(x._dynamo_static_input_type for x in tensors)
    cache.crop(-25)
    cache.reorder_cache(torch.tensor([1, 1]))
    llama.generate(prompt(2, 80), **with_cache(cache), **(GREEDY | {"max_new_tokens": 5}))
    cache.reset()
    llama.generate(prompt(2, 33), **with_cache(cache), **GREEDY)
    assert held() == before
    cache.reset()
    llama.generate(prompt(3, 33), **with_cache(cache), **GREEDY)  # another batch is other memory
    assert held() != before and cache.report().batch_size == 3


def test_as_compileable_as_transformers_own() -> None:
    model = tiny_windowed("gemma3")
    ours = QuantizedPagedCache(model.config, max_length=70, **STATIC)
    theirs = StaticCache(model.config, max_cache_len=70)
    assert ours.is_compileable is theirs.is_compileable is True
    assert ours.get_max_length() == theirs.get_max_length() == 70
    assert ours.get_mask_sizes(5, 1) == theirs.get_mask_sizes(5, 1) == (70, 0)
    assert not QuantizedPagedCache(model.config).is_compileable
