"""Where pages live: offloaded layers, models spread over devices by accelerate, dtypes and autocast."""

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from models import DECODERS, prompt, ragged_prompts, tiny_llama
from stores import chunks, logical_planes, same_bytes
from transformers import DynamicCache, PreTrainedModel

from kvquant_hf import PagePools, QuantizedPagedCache
from kvquant_hf.layers.attention import attend
from kvquant_hf.layers.paged import PagedLayer
from kvquant_hf.pages import offload as offload_module
from kvquant_hf.pages.offload import HostCopy
from kvquant_hf.transformers_api.names import with_cache

PAGE = 16
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama(num_hidden_layers=4)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as a device with a memory of its own: offloaded pages are copied out and in, by the same code."""
    monkeypatch.setattr(HostCopy, "helps", staticmethod(lambda device: True))


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """Every offload and prefetch of a layer, and every update of one, in order."""
    log: list[tuple[str, int]] = []

    def logged(name: str) -> Callable[..., Any]:
        original = getattr(PagedLayer, name)

        def method(self: PagedLayer, *args: Any) -> Any:
            log.append((name, self.number))  # type: ignore[attr-defined]
            return original(self, *args)

        return method

    for name in ("offload", "prefetch", "append"):
        monkeypatch.setattr(PagedLayer, name, logged(name))
    yield log


def numbered(cache: QuantizedPagedCache) -> QuantizedPagedCache:
    for i, layer in enumerate(cache.layers):
        layer.number = i
    return cache


def forward(model: PreTrainedModel, cache: Any, ids: torch.Tensor, chunk: int = 1 << 30) -> torch.Tensor:
    with torch.no_grad():
        parts = [model(ids[:, part], **with_cache(cache)).logits for part in chunks(ids.shape[1], chunk)]
    return torch.cat(parts, 1)


def present(cache: QuantizedPagedCache) -> list[bool]:
    """Which layers' pages are on the device."""
    return [store.pool.device_bytes > 0 for store in cache.stores]


# -- offloading --------------------------------------------------------------------------------------------------------


def test_order_of_offload_and_prefetch(model: PreTrainedModel, apart: None, moves: list[tuple[str, int]]) -> None:
    cache = numbered(QuantizedPagedCache(model.config, "int4", page_size=PAGE, offload=True))
    forward(model, cache, prompt(1, 50))
    expected = [
        *(("prefetch", 1), ("append", 0)),
        *(("offload", 0), ("prefetch", 2), ("append", 1)),  # layer 0 has been attended to by now
        *(("offload", 1), ("prefetch", 3), ("append", 2)),
        *(("offload", 2), ("prefetch", 0), ("append", 3)),
    ]
    assert moves == expected
    # The last layer is still being attended to, the first one is already on its way for the next step.
    assert present(cache) == [True, False, False, True]
    moves.clear()
    forward(model, cache, prompt(1, 1))
    assert moves == [("offload", 3), *expected]
    assert present(cache) == [True, False, False, True]


@pytest.mark.parametrize("policy", ["exact", "int4", "turboquant"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_offloaded_pages_give_the_same_results(policy: str, name: str, apart: None) -> None:
    model = DECODERS[name]()
    caches = [QuantizedPagedCache(model.config, policy, page_size=PAGE, offload=flag) for flag in (True, False)]
    outputs = [model.generate(**ragged_prompts(), **with_cache(cache), **GREEDY) for cache in caches]
    assert torch.equal(*outputs)
    assert all(map(same_bytes, caches[0].stores, caches[1].stores))
    there = present(caches[0])
    for cache in caches:
        if name != "gemma2":  # whose other layers, transformers' own, cannot be cropped
            cache.crop(-34)  # into sealed pages, layer by layer
        cache.reorder_cache(torch.tensor([2, 0, 1, 1]))
    assert present(caches[0]) == there
    more = prompt(4, 40, seed=3)
    assert torch.equal(forward(model, caches[0], more, 7), forward(model, caches[1], more, 7))
    assert all(map(same_bytes, caches[0].stores, caches[1].stores))


def test_a_saved_cache_may_be_loaded_offloaded(model: PreTrainedModel, apart: None, tmp_path: Path) -> None:
    cache = QuantizedPagedCache(model.config, "int4", page_size=PAGE)
    forward(model, cache, prompt(1, 90))
    cache.save(tmp_path / "cache.safetensors")
    loaded = QuantizedPagedCache.load(tmp_path / "cache.safetensors", model.config, offload=True)
    assert loaded.pools.offload and not cache.pools.offload
    more = prompt(1, 20, seed=3)
    assert torch.equal(forward(model, loaded, more, 7), forward(model, cache, more, 7))
    assert not all(present(loaded))  # looked at before they are read, which brings them
    assert all(map(same_bytes, loaded.stores, cache.stores))


def test_inference_mode_and_no_grad_may_alternate(model: PreTrainedModel, apart: None) -> None:
    ids = prompt(1, 30)
    caches = [QuantizedPagedCache(model.config, "int4", page_size=8, offload=flag) for flag in (True, False)]
    for cache in caches:
        for i in range(4):
            with torch.inference_mode(i % 2 == 0):
                forward(model, cache, ids)
    assert all(map(same_bytes, caches[0].stores, caches[1].stores))


def test_offloaded_caches_fork_save_and_share(model: PreTrainedModel, apart: None) -> None:
    pools = PagePools(model.config, "int4", page_size=PAGE, offload=True)
    ids, more = prompt(1, 70), prompt(1, 45, seed=1)
    reference = QuantizedPagedCache(model.config, "int4", page_size=PAGE)
    cache, other = (QuantizedPagedCache(model.config, pool=pools) for _ in range(2))
    for each in (cache, other, reference):
        forward(model, each, ids)
    expected = forward(model, copy.deepcopy(reference), more, 9)
    twin = copy.deepcopy(cache)
    file = io.BytesIO()
    torch.save(QuantizedPagedCache(model.config, "int4", offload=True), file)  # an empty one
    for each in (twin, other, cache):
        assert torch.equal(forward(model, each, more, 9), expected)
    alone = QuantizedPagedCache(model.config, "int4", page_size=PAGE, offload=True)
    forward(model, alone, ids)
    torch.save(alone, file := io.BytesIO())
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(forward(model, loaded, more, 9), expected) and loaded.pools.offload
    for each in (cache, other, twin):
        each.reset()
    assert pools.report().used_bytes == pools.report().offloaded_bytes == 0


def test_report_says_where_pages_are(model: PreTrainedModel, apart: None) -> None:
    cache = QuantizedPagedCache(model.config, "int8", page_size=PAGE, offload=True)
    forward(model, cache, prompt(1, 5 * PAGE + 1))
    forward(model, cache, prompt(1, 1))
    page = cache.stores[0].pool.page_bytes
    # Layers 0 to 2 have left once; 0 is back, 3 has not left yet.
    assert [store.pool.host_bytes for store in cache.stores] == [5 * page] * 4
    assert [store.pool.device_bytes for store in cache.stores] == [5 * page, 0, 0, 5 * page]
    report = cache.report()
    assert report.devices == {"cpu": (4 + 2) * 5 * page + report.open_page_bytes}
    assert report.packed_bytes == 4 * 5 * page and report.unused_bytes == 0
    copies = 2 * 5 * page
    tables = sum(store.footprint().tables for store in cache.stores)
    assert report.bytes == report.packed_bytes + report.open_page_bytes + tables + copies
    assert " on cpu" in str(report)


def test_offloading_on_the_cpu_copies_nothing(model: PreTrainedModel) -> None:
    cache = QuantizedPagedCache(model.config, "int8", page_size=PAGE, offload=True)
    forward(model, cache, prompt(1, 100), 30)
    assert [store.pool.host_bytes for store in cache.stores] == [0] * 4
    assert cache.report().devices["cpu"] == cache.report().bytes - sum(s.footprint().tables for s in cache.stores)


def test_only_pages_sealed_meanwhile_are_written_back(model: PreTrainedModel, apart: None) -> None:
    """The copy on the CPU stays good while the pages visit: a step that seals nothing writes nothing."""
    cache = QuantizedPagedCache(model.config, "int8", page_size=PAGE, offload=True)
    forward(model, cache, prompt(2, 2 * PAGE + 1))
    pool = cache.stores[1].pool
    for plane in pool._host.planes:
        plane.view(torch.uint8).add_(1)  # marks: what is not written back stays different
    marks = [plane.clone() for plane in pool._host.planes]
    forward(model, cache, prompt(2, 3), 1)
    assert all(map(torch.equal, pool._host.planes, marks))


class Streams:
    """Stands in for torch.cuda where there is none: streams and events that write down what is asked of them."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = self.Stream(self, "compute")
        self.count = 0

    class Stream:
        def __init__(self, owner: "Streams", name: str) -> None:
            self.owner, self.name = owner, name

        def wait_stream(self, other: "Streams.Stream") -> None:
            self.owner.log.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: str) -> None:
            self.owner.log.append(f"{self.name} waits for {event}")

        def record_event(self) -> str:
            self.owner.count += 1
            event = f"event {self.owner.count} of {self.name}"
            self.owner.log.append(event)
            return event

    def stream(self, stream: "Streams.Stream") -> Any:
        owner = self

        class Context:
            def __enter__(self) -> None:
                self.before, owner.current = owner.current, stream

            def __exit__(self, *args: object) -> None:
                owner.current = self.before

        return Context()


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    fake = Streams()
    for name in ("wait_stream", "wait_event", "record_event"):
        assert hasattr(torch.cuda.Stream, name)  # the real ones can do it
    cuda = SimpleNamespace(
        current_stream=lambda device: fake.current, stream=fake.stream, is_available=lambda: False, Stream=None
    )
    bridge = SimpleNamespace(empty=torch.empty, inference_mode=torch.inference_mode, no_grad=torch.no_grad, cuda=cuda)
    monkeypatch.setattr(offload_module, "torch", bridge)
    monkeypatch.setattr(offload_module, "_copy_stream", lambda device: copying)
    copying = Streams.Stream(fake, "copy")
    return fake


def test_streams_wait_for_each_other(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    host = HostCopy(torch.device("cpu"))
    host.streams = True
    planes = [torch.arange(6.0).reshape(3, 2)]
    host.written(torch.arange(3).numpy())
    assert host.leave(planes, 3) == [] and host.away
    assert streams.log == ["event 1 of compute"]  # the pages are on the CPU
    streams.log.clear()

    brought = host.begin([])
    assert streams.log == ["copy waits for compute", "copy waits for event 1 of compute", "event 2 of copy"]
    streams.log.clear()
    assert torch.equal(host.arrived(brought)[0], planes[0])
    assert streams.log == ["compute waits for event 2 of copy"]
    streams.log.clear()

    # Another thread's stream reads and writes pages: it waits, is recorded on them, and is waited for.
    recorded = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: recorded.append(stream.name))
    with streams.stream(Streams.Stream(streams, "other")):
        host.arrived(brought)
        host.written(torch.tensor([1]).numpy())
        brought[0][1] = 9.0
    assert streams.log == ["other waits for event 2 of copy"] and recorded == ["other"]
    streams.log.clear()
    host.leave(brought, 3)
    assert streams.log == ["compute waits for event 2 of copy", "compute waits for other", "event 3 of compute"]
    assert host.planes[0].tolist() == [[0.0, 1.0], [9.0, 9.0], [4.0, 5.0]]


# -- models over several devices ---------------------------------------------------------------------------------------

SPLITS: dict[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {
    "cpu offload": lambda model, folder: accelerate.cpu_offload(model, torch.device("cpu")),
    "disk offload": lambda model, folder: accelerate.disk_offload(model, folder, torch.device("cpu")),
    "two layers on disk": lambda model, folder: accelerate.dispatch_model(
        model,
        {
            "model.embed_tokens": "cpu",
            "model.rotary_emb": "cpu",
            "model.norm": "cpu",
            "lm_head": "cpu",
            **{f"model.layers.{i}": "disk" if i in (1, 2) else "cpu" for i in range(4)},
        },
        main_device="cpu",
        offload_dir=folder,
        force_hooks=True,
    ),
}


@pytest.mark.parametrize(
    ("split", "offload"),
    [
        pytest.param(split, offload, marks=[pytest.mark.full] * (offload and split != "two layers on disk"))
        for split in SPLITS
        for offload in (False, True)
    ],
)
def test_weights_elsewhere(split: str, offload: bool, tmp_path: Path, model: PreTrainedModel, apart: None) -> None:
    """Layers whose weights are on the meta device between calls: pages are where the keys are computed."""
    inputs = ragged_prompts()
    expected = model.generate(**inputs, **with_cache(DynamicCache(config=model.config)), **GREEDY)
    spread = SPLITS[split](copy.deepcopy(model), tmp_path)
    assert any(parameter.device.type == "meta" for parameter in spread.parameters())
    cache = QuantizedPagedCache(spread.config, "exact", page_size=PAGE, offload=offload)
    assert torch.equal(spread.generate(**inputs, **with_cache(cache), **GREEDY), expected)
    assert {store.device.type for store in cache.stores} == {"cpu"} and list(cache.report().devices) == ["cpu"]
    again = QuantizedPagedCache(spread.config, "int4", page_size=PAGE, offload=offload)
    here = QuantizedPagedCache(model.config, "int4", page_size=PAGE)
    assert torch.equal(
        spread.generate(**inputs, **with_cache(again), **GREEDY),
        model.generate(**inputs, **with_cache(here), **GREEDY),
    )


def test_each_layer_lives_on_its_device() -> None:
    """The meta device for layer 1 stands for a second GPU: its pages, open page and table are made there."""
    model = tiny_llama(num_hidden_layers=2)
    cache = QuantizedPagedCache(model.config, "exact", page_size=PAGE)
    for layer, device in enumerate(("cpu", "meta")):
        x = torch.zeros(2, 2, 10, 32, device=device)
        cache.layers[layer].initialize(x, x)
    for store, device in zip(cache.stores, ("cpu", "meta"), strict=True):
        held = [*store.pool.planes, *(side.tail for side in store.view()[:2]), store.page_table, store.lengths]
        assert {tensor.device.type for tensor in held} == {device}
    assert set(cache.report().devices) == {"cpu", "meta"} and " on meta" in str(cache.report())


# -- dtypes ------------------------------------------------------------------------------------------------------------


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in ("llama", "qwen2") for dtype in FLOATS]
    # Their layer norms take no float16 under autocast on a CPU.
    + [(name, dtype) for name in ("gpt2", "falcon") for dtype in FLOATS[:2]],
    ids=str,
)
@pytest.mark.parametrize("policy", ["exact", "int8"])
def test_autocast(name: str, policy: str, dtype: torch.dtype) -> None:
    """Keys leave the rotary embedding in float32 and values the projection in bfloat16; both are held in float32."""
    model = DECODERS[name]().to(dtype)
    ids = prompt(2, 80)
    plain = DynamicCache(config=model.config)
    cache = QuantizedPagedCache(model.config, policy, page_size=PAGE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = (
            torch.cat([forward(model, c, ids[:, :60]), forward(model, c, ids[:, 60:], 3)], 1) for c in (plain, cache)
        )
    with torch.no_grad():
        reference = model.float()(ids).logits
    error, usual = ((x.float() - reference).square().mean().sqrt().item() for x in (found, expected))
    # The whole error is bfloat16's; a wrong key, value or scale shows as ten times as much.
    assert 0 < error < 1.5 * usual < 0.2 * reference.std().item()
    # Values are held in the keys' dtype at least; DynamicCache does so before transformers 5.24.
    view, held = cache.stores[0].view(), plain.layers[0]
    assert view.keys.tail.dtype == view.values.tail.dtype == held.keys.dtype
    if policy == "exact":  # what layer 0 gets does not depend on attention
        assert torch.equal(view.dense("keys"), held.keys)
        assert torch.equal(view.dense("values"), held.values.to(view.values.tail.dtype))


@pytest.mark.parametrize("policy", ["int4", "turboquant"])
def test_autocast_does_not_touch_what_is_stored(policy: str) -> None:
    """Nor how it is read: rotations and products stay in float32."""
    keys, values = torch.randn(2, 1, 2, 100, 32).unbind()
    query = torch.randn(1, 4, 1, 32)
    results = []
    for enabled in (False, True):
        cache = QuantizedPagedCache(tiny_llama().config, policy, page_size=PAGE)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled), torch.no_grad():
            cache.update(keys, values, 0)
            packed = cache.update(keys[:, :, :1], values[:, :, :1], 0)
            results += [attend(query, *packed, mask=None, scale=None, causal=True), packed[0].dense("test")]
        results += [*logical_planes(cache.stores[0])]
    half = len(results) // 2
    assert all(map(torch.equal, results[:half], results[half:]))
