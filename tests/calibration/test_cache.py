"""Caches with policy ``int8-static``: every way of filling, sharing, saving and reading one, and what is refused."""

import copy
import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import prompt, ragged_prompts, tiny_gemma2, tiny_hybrid, tiny_llama, tiny_qwen2
from safetensors.torch import save_file
from stores import same_bytes
from transformers import PreTrainedModel

from kvquant_hf import Int8PagedCache, PagePools, QuantizedPagedCache
from kvquant_hf.calibration import QParams, Statistics, collect, compute
from kvquant_hf.errors import QParamsError, WrongModelError
from kvquant_hf.transformers_api.names import with_cache
from kvquant_hf.transformers_api.observe import ObservingCache

PAGE = 16
PER = pytest.mark.parametrize("per", ["tensor", "channel"])


def calibrated(model: PreTrainedModel, **options: Any) -> QParams:
    return compute(collect(model, prompt(4, 60, seed=9)), **options)


def recorded(model: PreTrainedModel, ids: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
    """Keys and values ``[batch, heads, tokens, head_dim]`` as the model hands them to a cache."""
    given: dict[tuple[int, str], torch.Tensor] = {}

    def observe(layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        given.update({(layer, "keys"): keys, (layer, "values"): values})

    with torch.no_grad():
        model(ids, **with_cache(ObservingCache(model.config, observe)), use_cache=True)
    return given


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def qparams(llama: PreTrainedModel) -> QParams:
    return calibrated(llama, per="channel")


@pytest.fixture
def folder(qparams: QParams, tmp_path: Path) -> Path:
    qparams.save(tmp_path / "made" / "on the way")
    return tmp_path / "made" / "on the way"


def static(model: PreTrainedModel, qparams: Any, **options: Any) -> QuantizedPagedCache:
    return QuantizedPagedCache(model.config, "int8-static", page_size=PAGE, qparams=qparams, **options)


def read(model: PreTrainedModel, cache: QuantizedPagedCache, ids: torch.Tensor, chunk: int = 1 << 30) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(part, **with_cache(cache)).logits for part in ids.split(chunk, 1)], 1)


def generate(model: PreTrainedModel, cache: QuantizedPagedCache, **options: Any) -> torch.Tensor:
    return model.generate(**with_cache(cache), max_new_tokens=20, do_sample=False, **options)


@PER
def test_a_page_at_a_time_is_token_by_token(per: str) -> None:
    model = tiny_llama().double()
    own = calibrated(model, per=per)
    caches = [static(model, own, prefill="quantized") for _ in range(2)]
    ids = prompt(2, 3 * PAGE)
    paged, single = (read(model, cache, ids, chunk) for cache, chunk in zip(caches, (PAGE, 1), strict=True))
    assert (paged - single).abs().max() <= 1e-10 * single.abs().max()


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gemma4", "lfm2"])
def test_every_layer_has_its_own(name: str) -> None:
    """Windows, shared keys, convolutions between: parameters are found by the index of the layer, not by counting."""
    makers = {"qwen2": tiny_qwen2, "gemma2": tiny_gemma2}
    model = makers[name]() if name in makers else tiny_hybrid(name)
    own = calibrated(model, per="channel")
    cache = static(model, own)
    logits = read(model, cache, prompt(2, 60))
    with torch.no_grad():
        assert torch.allclose(logits, model(prompt(2, 60)).logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max()))
    paged = {i: layer for i, layer in enumerate(cache.layers) if layer in cache.paged_layers and layer.store}
    assert list(paged) == own.layers
    for i, layer in paged.items():
        for side, view, codec in zip(("keys", "values"), layer.store.view(), layer.store.codecs, strict=False):
            assert all(map(torch.equal, codec.parameters, own.of(i, side)))
            assert all(torch.equal(plane[0], x) for plane, x in zip(view.planes[1:], own.of(i, side), strict=True))
    # The text of the calibration is within its range: half a step at most, and half a step more at the upper end.
    ids = prompt(4, 60, seed=9)
    cache, first = static(model, own), own.layers[0]
    read(model, cache, ids)
    given = recorded(model, ids)
    for side in ("keys", "values"):
        store = cache.layers[first].store
        x, x_hat = given[first, side], store.view().dense(side)
        step, held = own.of(first, side)[0].unsqueeze(1), x_hat.shape[2]
        assert ((x[:, :, -held:] - x_hat).abs() <= step * 1.001 + 1e-6).all()
        assert not torch.equal(x[:, :, -held:], x_hat)


@PER
def test_full_pages_are_8_bits_and_every_byte_is_counted(per: str, llama: PreTrainedModel) -> None:
    cache = static(llama, calibrated(llama, per=per))
    read(llama, cache, prompt(2, 5 * PAGE + 1))
    _ = [store.page_table for store in cache.stores]
    report = cache.report()
    assert report.page_bits_per_element == 8.0
    tables = 3 * (2 * 2 * 5 * 4 + 2 * 2 * 4)  # on host and device, and lengths
    parameters = 3 * 2 * 2 * 2 * 32 * 4  # layers, sides, scale and zero, heads, channels, bytes
    assert report.bytes == report.packed_bytes + report.open_page_bytes + report.unused_bytes + tables + parameters
    assert report.policy == "int8-static"


def test_generate_by_name_is_generate_by_object(llama: PreTrainedModel, folder: Path, qparams: QParams) -> None:
    inputs = ragged_prompts((40, 33, 1))
    outputs = [generate(llama, static(llama, own), **inputs) for own in (folder, str(folder / QParams.FILE), qparams)]
    options = {"policy": "int8-static", "qparams": str(folder), "page_size": PAGE}
    for way in (
        {"cache_implementation": "kvquant", "cache_config": options},
        {"cache_implementation": "quantized", "cache_config": {"backend": "kvquant"} | options},
    ):
        outputs.append(llama.generate(**inputs, **way, max_new_tokens=20, do_sample=False))
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    beams = llama.generate(**inputs, **with_cache(static(llama, folder)), max_new_tokens=10, num_beams=3)
    assert beams.shape[0] == 3


def test_forks_share_pages_and_parameters(llama: PreTrainedModel, qparams: QParams) -> None:
    cache = static(llama, qparams)
    read(llama, cache, prompt(1, 3 * PAGE + 5))
    fork = copy.deepcopy(cache)
    assert fork.qparams is cache.qparams and fork.layers[0].codecs[0] is cache.layers[0].codecs[0]
    assert torch.equal(read(llama, fork, prompt(1, 2 * PAGE, seed=4)), read(llama, cache, prompt(1, 2 * PAGE, seed=4)))
    assert all(map(same_bytes, fork.stores, cache.stores))
    assert cache.report().shared_bytes > 0
    cache.crop(-(3 * PAGE))  # into a sealed page, which is decoded
    assert cache.report().reopened_pages == 3
    cache.reset()
    again, fresh = (read(llama, x, prompt(2, 40), PAGE) for x in (cache, static(llama, qparams)))
    assert torch.equal(again, fresh)


def test_shared_pools(llama: PreTrainedModel, qparams: QParams) -> None:
    """Two caches with parameters of their own in the pages of one pool; each is as it is alone."""
    others = calibrated(llama, symmetric=True)
    pools = PagePools(llama.config, "int8-static", page_size=PAGE)
    ids = prompt(1, 5 * PAGE)
    for own in (qparams, others):
        shared = QuantizedPagedCache(llama.config, pool=pools, qparams=own, prefill="quantized")
        alone = static(llama, own, prefill="quantized")
        assert torch.equal(read(llama, shared, ids, PAGE), read(llama, alone, ids, PAGE))
    with pytest.raises(QParamsError, match="needs calibrated parameters"):
        QuantizedPagedCache(llama.config, pool=pools)


def test_save_and_load(llama: PreTrainedModel, qparams: QParams, tmp_path: Path) -> None:
    """Parameters travel with the cache: the file of parameters is not needed again, nor for an empty cache."""
    path = tmp_path / "cache.safetensors"
    inputs = ragged_prompts((50, 33))
    cache = static(llama, qparams)
    ids = generate(llama, cache, **inputs)
    cache.save(path)
    loaded = QuantizedPagedCache.load(path, llama.config)
    assert all(map(same_bytes, loaded.stores, cache.stores))
    for name in ("policy", "tokens", "packed_bytes", "open_page_bytes", "page_bits_per_element"):
        assert getattr(loaded.report(), name) == getattr(cache.report(), name), name
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 20, dtype=torch.long)], 1)
    ours, theirs = (generate(llama, c, input_ids=ids, attention_mask=mask) for c in (loaded, cache))
    assert torch.equal(ours, theirs)
    assert loaded.qparams is not None and loaded.qparams.facts == qparams.facts

    empty = static(llama, qparams)
    empty.save(path)
    loaded = QuantizedPagedCache.load(path, llama.config)
    assert torch.equal(read(llama, loaded, prompt(1, 50), PAGE), read(llama, empty, prompt(1, 50), PAGE))

    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    more = prompt(2, 30, seed=5)
    assert torch.equal(read(llama, loaded, more, 1), read(llama, cache, more, 1))


def test_mixed_with_a_codec_that_measures_itself(llama: PreTrainedModel, qparams: QParams, tmp_path: Path) -> None:
    cache = QuantizedPagedCache(llama.config, "int8-static/int4", page_size=PAGE, qparams=qparams)
    read(llama, cache, prompt(2, 50))
    keys, values = cache.stores[0].codecs
    assert keys.parameters == qparams.of(0, "keys") and values.parameters == ()
    cache.save(tmp_path / "x")
    assert all(map(same_bytes, QuantizedPagedCache.load(tmp_path / "x", llama.config).stores, cache.stores))


def test_the_kernels_take_it() -> None:
    """Pages written and read by the kernels (in Triton's interpreter here) are those of plain torch."""
    model = tiny_llama(num_hidden_layers=1)
    own, ids = calibrated(model, per="channel"), prompt(1, 2 * PAGE + 3)
    caches = [static(model, own, impl=impl) for impl in ("triton", "reference")]
    for cache in caches:
        read(model, cache, ids)  # appended; attention is on the exact keys and values
    assert same_bytes(caches[0].stores[0], caches[1].stores[0])
    logits = [read(model, cache, ids[:, :1]) for cache in caches]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4 * float(logits[1].abs().max()))
    assert [cache.report().implementation for cache in caches] == ["triton", "reference"]


# -- refused -----------------------------------------------------------------------------------------------------------


def test_without_parameters(llama: PreTrainedModel) -> None:
    for policy in ("int8-static", "int8-static/int4", "exact/int8-static"):
        with pytest.raises(QParamsError, match=r"run kvquant calibrate and kvquant qparams, .*\.$"):
            QuantizedPagedCache(llama.config, policy)
    with pytest.raises(QParamsError, match="takes no qparams; leave them out"):
        QuantizedPagedCache(llama.config, "int8", qparams="anything")
    with pytest.raises(QParamsError, match="'int8' takes no qparams"):
        Int8PagedCache(llama.config, qparams="anything")


def test_parameters_of_another_model(llama: PreTrainedModel, folder: Path, qparams: QParams) -> None:
    with pytest.raises(WrongModelError, match=r"calibrated with the model \['llama', 3, .*of \['qwen2'"):
        static(tiny_qwen2(), folder)
    with pytest.raises(WrongModelError, match=r"\['llama', 3, .*of \['llama', 2"):
        static(tiny_llama(num_hidden_layers=2), qparams)
    # What the fingerprint does not know: the size of a head, which shows with the first keys.
    other = tiny_llama(head_dim=16)
    cache = static(other, qparams)
    with pytest.raises(WrongModelError, match=r"heads x head_dim \[2, 32\], this layer has \[2, 16\]; calibrate this"):
        read(other, cache, prompt())
    fewer = {name: x for name, x in qparams.tensors.items() if not name.startswith("layers.1.")}
    with pytest.raises(WrongModelError, match="has no layer 1; run kvquant calibrate"):
        static(llama, QParams(fewer, qparams.model))


def test_files_that_are_not_parameters(llama: PreTrainedModel, folder: Path, qparams: QParams) -> None:
    path = folder / QParams.FILE
    content = path.read_bytes()
    with pytest.raises(QParamsError, match=r"there is no file .*; run kvquant calibrate and kvquant qparams\.$"):
        static(llama, folder.parent)
    collect(llama, prompt(1, 8)).save(folder)
    with pytest.raises(QParamsError, match="is not a file of quantization parameters; run kvquant"):
        static(llama, folder / Statistics.FILE)
    with pytest.raises(QParamsError, match="is not a calibration's statistics; write one with kvquant calibrate"):
        Statistics.load(path)
    (length,) = struct.unpack("<Q", content[:8])
    for at in (9, 8 + length // 2, 8 + length + 3, len(content) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(QParamsError):
            static(llama, folder)
    path.write_bytes(content[:-1])
    with pytest.raises(QParamsError, match="truncated"):
        static(llama, folder)
    path.write_bytes(b"")
    with pytest.raises(QParamsError, match="truncated, corrupt or no safetensors file"):
        static(llama, folder)
    save_file({}, path, {"format": QParams.KIND.format, "version": "2"})
    with pytest.raises(QParamsError, match="format version 2, this version of kvquant_hf reads 1"):
        static(llama, folder)
    cache = static(llama, qparams)
    cache.save(path)
    with pytest.raises(QParamsError, match="is not a file of quantization parameters"):
        static(llama, folder)


@pytest.mark.parametrize("change", ["missing", "too many", "dtype", "shape", "nan", "none"])
def test_wrong_content_under_a_right_checksum(change: str, llama: PreTrainedModel, folder: Path) -> None:
    path = folder / QParams.FILE
    text, mapped = QParams.KIND.read(path)
    tensors = {name: x.clone() for name, x in mapped.items()}
    name = "layers.1.keys.scale"
    if change == "missing":
        del tensors[name]
    elif change == "too many":
        tensors["layers.1.keys.steps"] = torch.ones(2, 32)
    elif change == "none":
        tensors.clear()
    else:
        tensors[name] = {
            "dtype": tensors[name].half(),
            "shape": tensors[name][0].clone(),
            "nan": tensors[name] * float("nan"),
        }[change]
    QParams.KIND.write(path, json.loads(text), tensors)
    with pytest.raises(QParamsError, match="are not those of a file of quantization parameters; run kvquant"):
        static(llama, folder)
    QParams.KIND.write(path, {"model": 3}, {key: x.clone() for key, x in mapped.items()} | tensors)
    with pytest.raises(QParamsError):
        static(llama, folder)


def test_round_trip_of_the_files(folder: Path, qparams: QParams, llama: PreTrainedModel, tmp_path: Path) -> None:
    loaded = QParams.load(folder)
    assert loaded.model == list(qparams.model) and loaded.facts == qparams.facts
    assert all(torch.equal(loaded.tensors[name], x) for name, x in qparams.tensors.items())
    statistics = collect(llama, prompt(1, 8), {"samples": 1})
    again = Statistics.load(statistics.save(tmp_path))
    assert again.facts == {"samples": 1}
    assert all(np.array_equal(again.tensors[name], x) for name, x in statistics.tensors.items())
    (tmp_path / "file").write_text("")
    with pytest.raises(QParamsError, match="cannot make the folder"):
        statistics.save(tmp_path / "file")
