"""save and load: the same bytes, the same tokens afterwards, shared pages shared again, and every bad file refused."""

import copy
import json
import struct
import warnings
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import _DECODER, build, prompt, ragged_prompts, tiny_gemma2, tiny_llama, tiny_qwen2, tiny_t5
from safetensors.torch import save_file
from stores import ONLINE, fill, live_pages, same_bytes, vectors
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from kvquant_hf import Int4PagedCache, Int8PagedCache, QuantizedPagedCache
from kvquant_hf.errors import (
    InterruptedForwardError,
    KVQuantError,
    KVQuantFallbackWarning,
    SavedCacheError,
    WrongModelError,
)
from kvquant_hf.files import cache as saving
from kvquant_hf.files import checked as checked_file
from kvquant_hf.files import layers as layer_state
from kvquant_hf.pages.store import PagedStore
from kvquant_hf.transformers_api.names import with_cache

PAGE = 16


def generate(model: PreTrainedModel, cache: Any, new: int = 40, **options: Any) -> torch.Tensor:
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KVQuantFallbackWarning)
        return model.generate(**with_cache(cache), max_new_tokens=new, **{"do_sample": False} | options)


def forward(model: PreTrainedModel, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **with_cache(cache)).logits


def reload(cache: QuantizedPagedCache, model: PreTrainedModel, path: Path) -> QuantizedPagedCache:
    """Save and load; the loaded cache holds the same bytes."""
    cache.save(path)
    loaded = QuantizedPagedCache.load(path, model.config)
    assert len(loaded.stores) == len(cache.stores)
    assert all(map(same_bytes, loaded.stores, cache.stores))
    for name in ("policy", "tokens", "batch_size", "packed_bytes", "other_bytes", "reopened_pages", "page_size"):
        assert getattr(loaded.report(), name) == getattr(cache.report(), name), name
    return loaded


def parts(path: Path) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Bytes before the tensors, the list of tensors, and our JSON."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    listing = json.loads(content[8 : 8 + length])
    return 8 + length, listing, json.loads(listing.pop("__metadata__")["cache"])


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_llama()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.safetensors"


@pytest.fixture
def saved(llama: PreTrainedModel, path: Path) -> Path:
    cache = QuantizedPagedCache(llama.config, "int4", page_size=PAGE)
    forward(llama, cache, prompt(2, 50))
    cache.save(path)
    return path


# -- round trips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("policy", [*ONLINE, "int8/int4-token"])
def test_continues_as_if_never_saved(policy: str, dtype: torch.dtype, path: Path) -> None:
    """A left-padded batch: bit for bit the same pages after 40 more tokens, some of which seal pages."""
    model = tiny_qwen2().to(dtype)
    inputs = ragged_prompts((70, 33, 1))
    cache = QuantizedPagedCache(model.config, policy, page_size=PAGE, prefill="quantized")
    ids = generate(model, cache, 5, **inputs)
    loaded = reload(cache, model, path)
    assert (loaded.policy.name, loaded.prefill) == (cache.policy.name, "quantized")
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 5, dtype=torch.long)], 1)
    ours, theirs = (generate(model, c, input_ids=ids, attention_mask=mask) for c in (loaded, cache))
    assert torch.equal(ours, theirs) and len(ours[:, ids.shape[1] :].unique()) > 5
    assert all(map(same_bytes, loaded.stores, cache.stores))


_OPTIONS = {k: v for k, v in _DECODER.items() if k not in ("head_dim", "initializer_range")}
HYBRIDS: dict[str, Any] = {
    "sliding": tiny_gemma2,
    "conv": lambda: build(
        "Lfm2",
        _OPTIONS | {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    ),
    "linear attention": lambda: build(
        "Jamba", _OPTIONS | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_dt_rank": 8}
    ),
}


@pytest.mark.parametrize("kind", list(HYBRIDS))
def test_hybrids(kind: str, path: Path) -> None:
    model = HYBRIDS[kind]()
    cache = QuantizedPagedCache(model.config, "int4", page_size=PAGE, sliding="exact")
    ids = generate(model, cache, 20, input_ids=prompt(2, 50))
    loaded = reload(cache, model, path)
    assert cache.report().other_bytes > 0
    assert torch.equal(generate(model, loaded, input_ids=ids), generate(model, cache, input_ids=ids))
    for ours, theirs in zip(loaded.layers, cache.layers, strict=True):
        assert vars(ours).keys() == vars(theirs).keys()


def test_encoder_decoder(path: Path) -> None:
    """The quantized half is saved; the other half is filled again by the encoder's output."""
    model = tiny_t5()
    inputs = ragged_prompts((70, 9))
    own = QuantizedPagedCache(model.config, "int4", page_size=PAGE)
    cache = EncoderDecoderCache(own, DynamicCache(config=model.config))
    ids = generate(model, cache, 30, **inputs, do_sample=True, temperature=3.0)
    loaded = EncoderDecoderCache(reload(own, model, path), DynamicCache(config=model.config))
    ours, theirs = (generate(model, c, **inputs, decoder_input_ids=ids) for c in (loaded, cache))
    assert torch.equal(ours, theirs) and ours.shape[1] == 71


def test_an_empty_cache(llama: PreTrainedModel, path: Path) -> None:
    cache = QuantizedPagedCache(llama.config, "int8", page_size=PAGE)
    loaded = reload(cache, llama, path)
    assert loaded.get_seq_length() == 0 and loaded.page_size == PAGE
    forward(llama, cache, prompt(1, 40))
    cache.crop(-40)  # stores that hold nothing
    again = reload(cache, llama, path)
    for empty in (loaded, again):
        assert torch.equal(forward(llama, empty, prompt(3, 40)), forward(llama, copy.deepcopy(cache), prompt(3, 40)))
        cache.reset()


def test_cropped_on_a_page_boundary_and_inside_of_one(llama: PreTrainedModel, path: Path) -> None:
    cache = QuantizedPagedCache(llama.config, "int4", page_size=PAGE)
    forward(llama, cache, prompt(2, 70))
    for count in (6, 0, 16, 5):
        cache.crop(-count)
        loaded = reload(cache, llama, path)
        assert torch.equal(forward(llama, loaded, prompt(2, 3)), forward(llama, copy.deepcopy(cache), prompt(2, 3)))
    assert cache.report().reopened_pages > 0


def test_keys_and_values_of_different_head_dim(llama: PreTrainedModel, path: Path) -> None:
    cache = QuantizedPagedCache(llama.config, "int4", page_size=PAGE)
    for i, layer in enumerate(cache.layers):
        layer.update(vectors(2, 2, 40, 64, seed=i).half(), vectors(2, 2, 40, 32, seed=i).half())
    loaded = reload(cache, llama, path)
    assert [side.head_dim for side in loaded.stores[0].view()[:2]] == [64, 32]
    fill(loaded.stores[0], vectors(2, 2, 30, 64).half(), vectors(2, 2, 30, 32).half())
    fill(cache.stores[0], vectors(2, 2, 30, 64).half(), vectors(2, 2, 30, 32).half())
    assert same_bytes(loaded.stores[0], cache.stores[0])


def test_loaded_in_inference_mode_and_used_without(saved: Path, llama: PreTrainedModel) -> None:
    with torch.inference_mode():
        loaded = QuantizedPagedCache.load(saved, llama.config)
    expected = QuantizedPagedCache.load(str(saved), llama.config)
    saved.unlink()  # nothing of the file is needed any more
    assert torch.equal(forward(llama, loaded, prompt(2, 30)), forward(llama, expected, prompt(2, 30)))


# -- what is in the file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["int4", "kv3"])
def test_the_file_holds_pages_in_use_and_little_else(llama: PreTrainedModel, path: Path, policy: str) -> None:
    cache = QuantizedPagedCache(llama.config, policy, page_size=PAGE)
    generate(llama, cache, 90, input_ids=prompt(2, 600))  # grown: some of the pool is unused
    cache.crop(-40)
    report = cache.report()
    assert report.unused_bytes > 0
    cache.save(path)
    start, listing, header = parts(path)
    used = sum(side.tail[:, :, : v.tail_length].nbytes for v in (s.view() for s in cache.stores) for side in v[:2])
    used += sum(store.first.nbytes for store in cache.stores)
    seen = [store.seen.tensors() for store in cache.stores if store.seen is not None]
    tables = sum(store.page_table.nbytes for store in cache.stores) + sum(x.nbytes for t in seen for x in t.values())
    assert path.stat().st_size == start + report.packed_bytes + used + tables
    assert start < 8_000 and path.stat().st_size < report.bytes
    assert header["layers"][0]["kind"] == "QuantizedPagedLayer" and header["layers"][0]["version"] == 1
    assert header["tokens"] == 649 and header["dtype"] == "float32"
    assert listing["layers.2.keys.codes"]["dtype"] == "U8"
    again = path.with_name("again")
    QuantizedPagedCache.load(path, llama.config).save(again)
    assert again.read_bytes()[start:] == path.read_bytes()[start:] and parts(again) == parts(path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["again", "cache.safetensors"]


def test_pages_that_beams_share_are_shared_again(llama: PreTrainedModel, path: Path) -> None:
    cache = QuantizedPagedCache(llama.config, "int4", page_size=PAGE)
    ids = generate(llama, cache, 40, input_ids=prompt(2, 100), num_beams=3, num_return_sequences=3)
    store = cache.stores[0]
    pages = len(live_pages(store))
    assert pages < store.page_table.numel()
    loaded = reload(cache, llama, path)
    pool, table = loaded.stores[0].pool, loaded.stores[0].page_table
    assert pool.used == pool.capacity == pages
    assert pool.references(table.numpy()).tolist() == store.pool.references(store.page_table.numpy()).tolist()
    assert torch.equal(generate(llama, loaded, input_ids=ids), generate(llama, cache, input_ids=ids))
    loaded.batch_select_indices(torch.tensor([0]))
    assert pool.used == loaded.stores[0].sealed_pages
    loaded.reset()
    assert pool.used == pool.nbytes == 0


def test_a_fork_is_saved_without_its_twin(llama: PreTrainedModel, path: Path) -> None:
    cache = QuantizedPagedCache(llama.config, "int8", page_size=PAGE)
    forward(llama, cache, prompt(1, 50))
    fork = copy.deepcopy(cache)
    forward(llama, cache, prompt(1, 500))
    loaded = reload(fork, llama, path)
    assert path.stat().st_size < cache.report().bytes / 4
    assert torch.equal(forward(llama, loaded, prompt(1, 40)), forward(llama, fork, prompt(1, 40)))


def test_subclasses(llama: PreTrainedModel, path: Path) -> None:
    Int4PagedCache(llama.config, page_size=PAGE).save(path)
    assert type(QuantizedPagedCache.load(path, llama.config)) is QuantizedPagedCache
    loaded = Int4PagedCache.load(path, llama.config, impl="reference")
    assert type(loaded) is Int4PagedCache and (loaded.page_size, loaded.impl) == (PAGE, "reference")
    with pytest.raises(SavedCacheError, match=r"'int4' and Int8PagedCache is 'int8'; use QuantizedPagedCache.load"):
        Int8PagedCache.load(path, llama.config)


# -- refused -----------------------------------------------------------------------------------------------------------


def test_an_interrupted_forward_pass_is_not_saved(llama: PreTrainedModel, path: Path) -> None:
    cache = QuantizedPagedCache(llama.config, "int4", page_size=PAGE)
    forward(llama, cache, prompt(1, 20))
    cache.layers[0].update(vectors(1, 2, 1, 32), vectors(1, 2, 1, 32))
    for unlevel in (cache, copy.deepcopy(cache)):
        with pytest.raises(InterruptedForwardError, match=r"hold 21 and 20 tokens; call cache.rollback\(\)"):
            unlevel.save(path)
    assert not list(path.parent.iterdir())
    cache.rollback()
    reload(cache, llama, path)


def test_another_model(saved: Path) -> None:
    other = tiny_llama(num_hidden_layers=2)
    with pytest.raises(WrongModelError, match=r"\['llama', 3, .*\['llama', 2, .*with the config of the model"):
        QuantizedPagedCache.load(saved, other.config)


@pytest.mark.parametrize("sliding", ["quantized", "exact"])
def test_another_sliding_window(sliding: Literal["quantized", "exact"], path: Path) -> None:
    QuantizedPagedCache(tiny_gemma2().config, sliding=sliding).save(path)
    with pytest.raises(WrongModelError, match=r"layer 0 of .* has (sliding_)?window 24, the config given has 32"):
        QuantizedPagedCache.load(path, tiny_gemma2(sliding_window=32).config)


def test_windows_in_pages(path: Path) -> None:
    """A ring of pages comes back with what it has given back before: same positions, same tokens."""
    model = tiny_gemma2()
    cache = QuantizedPagedCache(model.config, "int4", page_size=PAGE)
    ids = generate(model, cache, 20, input_ids=prompt(2, 90))
    loaded = reload(cache, model, path)
    ring = [cache.layers[0] for cache in (cache, loaded)]
    assert ring[0].first == ring[1].first > 0 and ring[0].length == ring[1].length
    assert torch.equal(generate(model, loaded, input_ids=ids), generate(model, cache, input_ids=ids))


def test_files_that_are_not_ours(path: Path, llama: PreTrainedModel) -> None:
    with pytest.raises(FileNotFoundError, match=r"write one with cache.save"):
        QuantizedPagedCache.load(path, llama.config)
    with pytest.raises(FileNotFoundError, match=r"write one with cache.save"):
        QuantizedPagedCache.load(path.parent, llama.config)
    for content in (b"", b"text", b"PK\x03\x04" + bytes(200), struct.pack("<Q", 2**40) + b"{}"):
        path.write_bytes(content)
        with pytest.raises(SavedCacheError, match="truncated, corrupt or no safetensors file"):
            QuantizedPagedCache.load(path, llama.config)
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.zeros(3)}, path, metadata)
        with pytest.raises(SavedCacheError, match="not a cache saved by kvquant_hf"):
            QuantizedPagedCache.load(path, llama.config)
    save_file({}, path, {"format": saving.FORMAT, "version": "2"})
    with pytest.raises(SavedCacheError, match="format version 2, this version of kvquant_hf reads 1; load it with"):
        QuantizedPagedCache.load(path, llama.config)


def test_every_truncation_and_flipped_bit_is_refused(saved: Path, llama: PreTrainedModel) -> None:
    content = saved.read_bytes()
    start = parts(saved)[0]
    broken = saved.with_name("broken")

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.integers(0, start - 1) | st.integers(0, len(content) - 1),  # the header deserves half of the examples
        st.none() | st.integers(0, 7),
    )
    def check(offset: int, bit: int | None) -> None:
        changed = bytearray(content)
        if bit is None:
            del changed[offset:]
        else:
            changed[offset] ^= 1 << bit
        broken.write_bytes(changed)
        with pytest.raises(SavedCacheError):
            QuantizedPagedCache.load(broken, llama.config)

    check()
    broken.write_bytes(content + b"\0")
    with pytest.raises(SavedCacheError):
        QuantizedPagedCache.load(broken, llama.config)


def _set(*keys: Any, to: Any) -> Any:
    def change(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        inner: Any = header
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to

    return change


def _tensor(name: str, change: Any) -> Any:
    return lambda header, tensors: tensors.update({name: change(tensors[name]).contiguous()})


HAND_MADE: dict[str, tuple[Any, str]] = {
    "codec gone": (_set("policy", "keys", to="fp5"), "needs 'fp5'.* install kvquant-hf .*"),
    "option of the future": (_set("options", "magic", to=1), "needs 'magic'.*install kvquant-hf"),
    "codec changed": (_set("layers", 0, "state", "codecs", 0, 1, to=5), "layer 0 of .*with the codecs.*'int4-ranked'"),
    "other kind": (_set("layers", 1, "kind", to="Rolling"), "layer 1 of .* is a Rolling .*QuantizedPagedLayer"),
    "kind of the future": (_set("layers", 1, "version", to=2), r"\(version 2\), here.*\(version 1\)"),
    "integer of the future": (_set("layers", 0, "state", "integers", "dropped", to=1), "layer 0 of .* inconsistent"),
    "negative integer": (_set("layers", 0, "state", "integers", "reopened_pages", to=-1), "inconsistent"),
    "layers missing": (lambda header, tensors: header["layers"].pop(), "inconsistent"),
    "field missing": (lambda header, tensors: header["layers"][0].pop("state"), "inconsistent"),
    "no dict": (_set("layers", 0, to=7), "inconsistent"),
    "length": (_set("tokens", to=51), "inconsistent"),
    "tensor missing": (lambda header, tensors: tensors.pop("layers.2.values.step"), "inconsistent"),
    "open page missing": (lambda header, tensors: tensors.pop("layers.2.keys.open"), "inconsistent"),
    "one tensor more": (lambda header, tensors: tensors.update({"layers.0.x": torch.ones(1)}), "inconsistent"),
    "table beyond the pages": (_tensor("layers.0.table", lambda x: x + 1), "inconsistent"),
    "table below zero": (_tensor("layers.0.table", lambda x: x - 1), "inconsistent"),
    "page that is nobody's": (_tensor("layers.0.table", lambda x: x.clamp(max=4)), "inconsistent"),
    "table dtype": (_tensor("layers.0.table", lambda x: x.long()), "inconsistent"),
    "table of another batch": (_tensor("layers.0.table", lambda x: x.reshape(1, -1)), "inconsistent"),
    "flat table": (_tensor("layers.0.table", lambda x: x.flatten()), "inconsistent"),
    "fewer pages": (_tensor("layers.1.keys.codes", lambda x: x[1:]), "inconsistent"),
    "plane shape": (_tensor("layers.1.keys.codes", lambda x: x[..., 1:]), "inconsistent"),
    "plane dtype": (_tensor("layers.1.values.step", lambda x: x.float()), "inconsistent"),
    "open dtype": (_tensor("layers.1.values.open", lambda x: x.int()), "inconsistent"),
    "open page too long": (
        lambda header, tensors: tensors.update(
            {f"layers.0.{side}.open": torch.zeros(2, 2, PAGE + 1, 32) for side in ("keys", "values")}
        ),
        "inconsistent",
    ),
    "open pages of different length": (_tensor("layers.0.keys.open", lambda x: x[:, :, 1:]), "inconsistent"),
}


@pytest.mark.parametrize("case", list(HAND_MADE))
def test_hand_made_files(case: str, saved: Path, llama: PreTrainedModel) -> None:
    """Right checksum, wrong content."""
    change, message = HAND_MADE[case]
    text, mapped = saving.read_file(saved)
    header, tensors = json.loads(text), {name: x.clone() for name, x in mapped.items()}
    saving.write_file(saved, header, tensors)
    QuantizedPagedCache.load(saved, llama.config)
    change(header, tensors)
    saving.write_file(saved, header, tensors)
    with pytest.raises(SavedCacheError, match=message):
        QuantizedPagedCache.load(saved, llama.config)


def test_layers_of_another_transformers(path: Path, monkeypatch: pytest.MonkeyPatch, llama: PreTrainedModel) -> None:
    """Ours load with any version; transformers' own need the one that knows what their attributes mean."""
    model = tiny_gemma2()
    cache = QuantizedPagedCache(model.config, page_size=PAGE, sliding="exact")
    forward(model, cache, prompt(1, 30))
    reload(cache, model, path)
    monkeypatch.setattr(layer_state, "version", lambda name: "5.99.1")
    with pytest.raises(
        SavedCacheError, match=r"layer 0 of .*DynamicSlidingWindowLayer as transformers 5\.\d+.* 5.99.1"
    ):
        QuantizedPagedCache.load(path, model.config)
    reload(QuantizedPagedCache(llama.config), llama, path)


def test_one_more_integer(saved: Path, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version whose stores keep another integer reads older files, and older versions refuse its files."""
    with monkeypatch.context() as newer:
        newer.setattr(PagedStore, "SAVED", (*PagedStore.SAVED, "version"))
        cache = QuantizedPagedCache.load(saved, llama.config)
        cache.stores[0].version = 12345
        cache.save(saved)
        assert QuantizedPagedCache.load(saved, llama.config).stores[0].version == 12345
    with pytest.raises(SavedCacheError, match="layer 0"):
        QuantizedPagedCache.load(saved, llama.config)


def test_a_state_that_a_file_cannot_hold(path: Path) -> None:
    cache = QuantizedPagedCache(tiny_gemma2().config, sliding="exact")
    cache.layers[0].hook = object()
    with pytest.raises(SavedCacheError, match=r"DynamicSlidingWindowLayer.hook holds a object.*copy.deepcopy\(cache\)"):
        cache.save(path)
    assert not path.exists()


def test_a_failing_save_leaves_what_was_there(
    saved: Path, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()
    cache = QuantizedPagedCache.load(saved, llama.config)

    def half_written(tensors: Any, name: Path, metadata: Any) -> None:
        Path(name).write_bytes(before[:1000])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checked_file, "save_file", half_written)
        with pytest.raises(KeyboardInterrupt):
            cache.save(saved)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name] and saved.read_bytes() == before
    with pytest.raises(FileNotFoundError, match="does not exist; make it"):
        cache.save(saved.parent / "nowhere" / "x")
    with pytest.raises(IsADirectoryError):
        cache.save(saved.parent)
    link = saved.with_name("link")
    link.symlink_to(saved)
    forward(llama, cache, prompt(2, 1))
    cache.save(link)
    assert link.is_symlink() and saved.read_bytes() != before


def test_the_error_is_ours() -> None:
    assert issubclass(SavedCacheError, KVQuantError) and issubclass(SavedCacheError, ValueError)
