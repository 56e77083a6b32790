"""Moments of queries in a calibration, and caches that begin with them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import prompt, ragged_prompts, tiny_gemma2, tiny_hybrid, tiny_llama
from stores import raw, same_bytes
from transformers import PreTrainedModel

from kvquant_hf import LayerwisePolicy, QuantizedPagedCache
from kvquant_hf.calibration import QParams, Statistics, collect, compute
from kvquant_hf.calibration import observe as observing
from kvquant_hf.errors import CalibrationError, QParamsError, WrongModelError
from kvquant_hf.pages.moments import PRIOR_TOKENS, Moments, metric_of
from kvquant_hf.pages.queries import SeenQueries
from kvquant_hf.transformers_api.names import with_cache

PAGE = 16
WINDOWS = prompt(3, 40, seed=9)
GREEDY = {"max_new_tokens": 20, "do_sample": False}


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def qparams(llama: PreTrainedModel) -> QParams:
    return compute(collect(llama, prompt(4, 60, seed=9)))


def without_queries(qparams: QParams) -> QParams:
    """What a file of before there were moments holds."""
    tensors = {name: x for name, x in qparams.tensors.items() if name not in qparams.queries}
    return QParams(tensors, qparams.model, qparams.facts)


def kv3(model: PreTrainedModel, qparams: Any = None, **options: Any) -> QuantizedPagedCache:
    return QuantizedPagedCache(model.config, "kv3", page_size=PAGE, qparams=qparams, **options)


def read(model: PreTrainedModel, cache: QuantizedPagedCache, ids: torch.Tensor, chunk: int = 1 << 30) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(part, **with_cache(cache)).logits for part in ids.split(chunk, 1)], 1)


def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nobody sees the queries of a sequence."""
    monkeypatch.setattr(SeenQueries, "see", lambda self, query: None)


def rounding(cache: QuantizedPagedCache) -> tuple[int, int]:
    report = cache.report()
    return report.feedback_pages, report.nearest_pages


# -- what a calibration collects ---------------------------------------------------------------------------------------


def attended(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    """The queries ``[1, query_heads, tokens, head_dim]`` that torch's attention gets, of each window by layer."""
    original, given = torch.nn.functional.scaled_dot_product_attention, []

    def watched(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        given.append(query)
        return original(query, *args, **kwargs)

    windows = []
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        for row in WINDOWS.split(1):
            given.clear()
            model(row, use_cache=False)
            windows.append(list(given))
    return windows


@pytest.mark.parametrize("attention", ["sdpa", "eager", "kvquant"])
def test_moments_are_those_of_what_attention_gets(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the rotary embedding, of all query heads of a key/value head together, for one token."""
    found = collect(tiny_llama(attention=attention), WINDOWS)
    windows = attended(tiny_llama(), monkeypatch)
    assert found.layers == [0, 1, 2] and len(windows) == 3
    for layer in found.layers:
        q = torch.cat([window[layer] for window in windows], 2)[0].double()  # [4, 120, 32]
        for head in range(2):
            rows = q[2 * head : 2 * head + 2].flatten(0, 1)
            expected = rows.T @ rows / q.shape[1]
            moments = found.moments(layer)
            assert moments is not None
            # Half a unit of fp16 of each correlation, and float32 sums.
            size = expected.diagonal().sqrt()
            atol = float(torch.outer(size, size).max()) * (2**-11 + 1e-5)
            torch.testing.assert_close(moments.matrix()[head].double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["gemma2", "gemma4", "lfm2"])
def test_every_layer_with_keys_has_moments(name: str) -> None:
    """Windows, keys that other layers read too, convolutions between."""
    found = collect(tiny_gemma2() if name == "gemma2" else tiny_hybrid(name), WINDOWS)
    for layer in found.layers:
        moments = found.moments(layer)
        assert moments is not None and moments.diagonal.shape == found.of(layer, "keys")[0].shape
        assert (moments.diagonal > 0).any()


def test_latents_meet_no_queries() -> None:
    """DeepSeek's keys are made of what is cached: there is nothing that could be known of it, and it is said."""
    model = tiny_hybrid("deepseek-v3")
    found = collect(model, WINDOWS)
    assert not found.knows_queries and found.moments(0) is None
    with pytest.raises(QParamsError, match="shows no queries"):
        kv3(model, compute(found))


def test_a_layer_whose_queries_are_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """All or none: a prior for some layers would be a surprise."""
    answers = iter([True, True, False])
    monkeypatch.setattr(observing, "takes", lambda query, heads, head_dim: next(answers))
    assert not collect(tiny_llama(), WINDOWS[:1]).knows_queries


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_queries_that_are_not_finite_are_refused(value: float) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight[0, 0] = value
    with pytest.raises(CalibrationError, match=r"queries of layer 2 are not finite; .*float32"):
        collect(model, WINDOWS)


# -- files -------------------------------------------------------------------------------------------------------------


def test_they_go_through_both_files(llama: PreTrainedModel, tmp_path: Path) -> None:
    statistics = Statistics.load(collect(llama, WINDOWS).save(tmp_path))
    qparams = QParams.load(compute(statistics, per="channel").save(tmp_path))
    assert len(qparams.queries) == 2 * 3
    assert qparams.queries.keys() == statistics.queries.keys()
    assert all(torch.equal(x, statistics.queries[name]) for name, x in qparams.queries.items())
    diagonal, correlations = qparams.moments(1) or ()
    assert torch.equal(diagonal, statistics.tensors["layers.1.queries.moments"])
    assert torch.equal(correlations, statistics.tensors["layers.1.queries.correlations"])


def test_files_of_before_there_were_any(llama: PreTrainedModel, qparams: QParams, tmp_path: Path) -> None:
    without_queries(qparams).save(tmp_path)
    old = QParams.load(tmp_path)
    assert not old.knows_queries and old.moments(0) is None
    caches = [QuantizedPagedCache(llama.config, "int8-static", qparams=own, page_size=PAGE) for own in (old, qparams)]
    logits = [read(llama, cache, prompt(2, 50), PAGE) for cache in caches]
    assert torch.equal(*logits) and all(cache.layers[0].prior is None for cache in caches)
    with pytest.raises(QParamsError, match=r"'kv3' could use nothing but moments of queries.* run kvquant [^.]*\.$"):
        kv3(llama, tmp_path)
    mixed = QuantizedPagedCache(llama.config, "kv3/int8-static", qparams=old)  # it has what this needs
    assert mixed.layers[0].prior is None


NAME = "layers.1.queries"
BROKEN = {
    "one missing": lambda x: x.pop(f"{NAME}.moments"),
    "a layer missing": lambda x: [x.pop(f"{NAME}.{name}") for name in ("moments", "correlations")],
    "one too many": lambda x: x.update({f"{NAME}.count": torch.ones(2, 32)}),
    "dtype": lambda x: x.update({f"{NAME}.correlations": x[f"{NAME}.correlations"].float()}),
    "heads": lambda x: x.update({f"{NAME}.moments": torch.ones(1, 32)}),
    "channels": lambda x: x.update({f"{NAME}.moments": torch.ones(2, 16)}),
    "too few": lambda x: x.update({f"{NAME}.correlations": x[f"{NAME}.correlations"][:, 1:].clone()}),
    "negative": lambda x: x[f"{NAME}.moments"].neg_(),
    "infinite": lambda x: x[f"{NAME}.moments"].fill_(float("inf")),
    "no number": lambda x: x[f"{NAME}.correlations"].fill_(float("nan")),
    "no correlation": lambda x: x[f"{NAME}.correlations"].fill_(1.5),
}


@pytest.mark.parametrize("change", list(BROKEN))
def test_wrong_moments_under_a_right_checksum(change: str, qparams: QParams, tmp_path: Path) -> None:
    path = qparams.save(tmp_path)
    text, mapped = QParams.KIND.read(path)
    tensors = {name: x.clone() for name, x in mapped.items()}
    BROKEN[change](tensors)
    QParams.KIND.write(path, json.loads(text), tensors)
    with pytest.raises(QParamsError, match="are not those of a file of quantization parameters; run kvquant"):
        QParams.load(path)


# -- caches that grow --------------------------------------------------------------------------------------------------


def test_a_prior_is_so_many_tokens_and_queries_are_added() -> None:
    q = torch.randn(2, 4, 30, 16)
    rows = torch.randn(2, 500, 16)
    prior = Moments.of(rows.transpose(1, 2) @ rows / 500)
    seen = SeenQueries(2, 16, prior, batch=2)
    metric = seen.metric()
    assert metric is not None and torch.equal(metric, metric_of(prior).expand(2, -1, -1, -1))
    seen.see(q)
    found = seen.metric()
    own = q.unflatten(1, (2, 2)).flatten(2, 3)
    expected = prior.matrix() * PRIOR_TOKENS + own.transpose(2, 3) @ own
    diagonal = expected.diagonal(dim1=2, dim2=3)
    assert seen.count == PRIOR_TOKENS + 30
    diagonal *= 1 + 64 / seen.count
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.max()))
    empty = seen.empty(3).metric()
    assert empty is not None and torch.equal(empty, metric_of(prior).expand(3, -1, -1, -1))


def test_early_pages_are_rounded_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no query yet, the errors of keys cost less in the metric of the prior than those of nearest codes; here
    queries have few directions, as those of trained models have."""
    llama = tiny_llama()
    weight = llama.model.layers[0].self_attn.q_proj.weight.detach()
    left, size, right = torch.linalg.svd(weight, full_matrices=False)
    size[6:] = 0
    weight.copy_(left * size @ right)
    qparams = compute(collect(llama, prompt(4, 60, seed=9)))
    blind(monkeypatch)
    ids, costs = prompt(1, 3 * PAGE + 1), []
    keys: dict[int, torch.Tensor] = {}
    original = QuantizedPagedCache.update

    def update(
        self: Any, key_states: torch.Tensor, value_states: torch.Tensor, layer: int, *args: Any, **kw: Any
    ) -> Any:
        keys[layer] = key_states
        return original(self, key_states, value_states, layer, *args, **kw)

    monkeypatch.setattr(QuantizedPagedCache, "update", update)
    for own, expected in ((None, (0, 3)), (qparams, (3, 0))):
        cache = kv3(llama, own, prefill="quantized", sinks=0)
        read(llama, cache, ids)
        assert rounding(cache) == (3 * expected[0], 3 * expected[1])
        error = (keys[0] - cache.stores[0].view().dense("keys"))[0, :, : 3 * PAGE]  # of the first layer, alike in both
        moments = qparams.moments(0)
        assert moments is not None
        costs.append(float((error @ moments.matrix() * error).sum()))
    assert costs[1] < 0.8 * costs[0]


def test_forks_selections_and_resets(llama: PreTrainedModel, qparams: QParams) -> None:
    cache = kv3(llama, qparams, prefill="quantized")
    first = read(llama, cache, prompt(2, 40), PAGE)
    twin = copy.deepcopy(cache)
    assert twin.layers[0].prior is cache.layers[0].prior
    more = prompt(2, 40, seed=4)
    assert torch.equal(read(llama, twin, more, PAGE), read(llama, cache, more, PAGE))
    assert all(map(same_bytes, twin.stores, cache.stores))
    twin.reorder_cache(torch.tensor([1, 1]))
    both = twin.stores[0].seen.metric()
    assert torch.equal(both[0], both[1]) and torch.equal(both[0], cache.stores[0].seen.metric()[1])
    cache.reset()
    assert torch.equal(read(llama, cache, prompt(2, 40), PAGE), first)
    twin.stores[0].clear()
    assert torch.equal(twin.stores[0].seen.metric()[1], metric_of(qparams.moments(0)))


def test_the_sum_is_saved_and_the_prior_too(llama: PreTrainedModel, qparams: QParams, tmp_path: Path) -> None:
    path, inputs = tmp_path / "cache.safetensors", ragged_prompts((50, 33))
    cache = kv3(llama, qparams)
    ids = llama.generate(**inputs, **with_cache(cache), **GREEDY)
    cache.save(path)
    loaded = QuantizedPagedCache.load(path, llama.config)
    assert all(map(same_bytes, loaded.stores, cache.stores))
    for a, b in zip(loaded.stores, cache.stores, strict=True):
        assert a.seen.count == b.seen.count > PRIOR_TOKENS + 50
        assert torch.equal(a.seen.metric(), b.seen.metric())
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 20, dtype=torch.long)], 1)
    ours, theirs = (llama.generate(ids, attention_mask=mask, **with_cache(c), **GREEDY) for c in (loaded, cache))
    assert torch.equal(ours, theirs) and all(map(same_bytes, loaded.stores, cache.stores))
    loaded.reset()  # the prior is there for the next text
    fresh = kv3(llama, qparams)
    assert torch.equal(read(llama, loaded, prompt(1, 50), PAGE), read(llama, fresh, prompt(1, 50), PAGE))
    assert all(map(same_bytes, loaded.stores, fresh.stores))


def test_bytes_of_the_prior_are_counted_once(llama: PreTrainedModel, qparams: QParams) -> None:
    cache = kv3(llama, qparams)
    read(llama, cache, prompt(3, 1))
    for store in cache.stores:
        store.seen._recent.clear()
    own = 2 * 32 * 4 + 2 * 32 * 31 // 2 * 2  # diagonals and correlations of 2 heads
    assert all(store.seen.nbytes == own + 2 * 32 * 4 for store in cache.stores)  # and the diagonal, 256 times


def test_layers_of_other_policies_have_none(llama: PreTrainedModel, qparams: QParams) -> None:
    cache = QuantizedPagedCache(llama.config, LayerwisePolicy(["kv3", "int8", "kv2.4"]), qparams=qparams)
    assert [layer.prior is not None for layer in cache.layers] == [True, False, True]
    read(llama, cache, prompt(1, 70))
    values = QuantizedPagedCache(llama.config, "int8-static/int3-ranked", qparams=qparams)
    assert [layer.prior for layer in values.layers] == [None] * 3
    with pytest.raises(QParamsError, match="takes no qparams"):
        QuantizedPagedCache(llama.config, "int8/int3-ranked", qparams=qparams)


def test_a_prior_of_other_heads(llama: PreTrainedModel, qparams: QParams) -> None:
    other = tiny_llama(head_dim=16)  # the fingerprint does not know
    with pytest.raises(WrongModelError, match=r"the moments of queries are for heads x head_dim \[2, 32\], this layer"):
        read(other, kv3(other, qparams), prompt())


# -- caches that see no queries ----------------------------------------------------------------------------------------


def static(model: PreTrainedModel, qparams: Any, **options: Any) -> QuantizedPagedCache:
    return kv3(model, qparams, static=True, max_length=120, **options)


@pytest.mark.parametrize("prefill", ["exact", "quantized"])
def test_the_first_prompt_of_a_static_cache(
    prefill: Any, llama: PreTrainedModel, qparams: QParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With padding and first tokens: the bytes of a cache that grows, has the same prior and sees nothing more."""
    blind(monkeypatch)
    inputs = ragged_prompts((3 * PAGE + 5, 40, 3))
    grown, fixed = kv3(llama, qparams, prefill="quantized"), static(llama, qparams, prefill=prefill)
    options = GREEDY | {"max_new_tokens": 1}
    for cache in (grown, fixed):
        llama.generate(**inputs, **with_cache(cache), **options)
    a, b = grown.stores[0], fixed.stores[0]
    tables = a.page_table.long(), b.page_table[:, : b.sealed_pages].long()
    real = inputs["attention_mask"][:, : 3 * PAGE].view(3, 3, PAGE).any(-1)  # a page of padding is stored once
    for x, y in zip(a.pool.planes, b._planes, strict=True):
        assert torch.equal(raw(x[tables[0]][real]), raw(y[tables[1]][real]))
    assert rounding(fixed) == (3 * 3 * 3, 0)


def test_later_pages_of_a_static_cache_are_nearest(llama: PreTrainedModel, qparams: QParams) -> None:
    cache = static(llama, qparams)
    read(llama, cache, prompt(2, 2 * PAGE + 1))
    read(llama, cache, prompt(2, PAGE, seed=1))
    assert rounding(cache) == (3 * 2 * 2, 3 * 2)
    cache.crop(-2 * PAGE)
    read(llama, cache, prompt(2, PAGE, seed=1))
    assert rounding(cache) == (3 * 2, 3 * 2)
    cache.reset()
    read(llama, cache, prompt(2, PAGE))
    assert rounding(cache) == (0, 0)
    without = static(llama, None)
    read(llama, without, prompt(2, 2 * PAGE + 1))
    assert rounding(without) == (0, 3 * 2 * 2)


def test_a_first_prompt_that_is_compiled(llama: PreTrainedModel, qparams: QParams) -> None:
    """The same bytes from a graph, in which the memory is made too."""
    ids, model = prompt(2, 2 * PAGE + 1), tiny_llama()
    eager, compiled = static(llama, qparams), static(model, qparams)
    read(llama, eager, ids)
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    read(model, compiled, ids)
    torch.compiler.reset()
    for a, b in zip(eager.stores, compiled.stores, strict=True):
        pages = a.page_table[:, :2].long()
        assert all(torch.equal(raw(x[pages]), raw(y[pages])) for x, y in zip(a._planes, b._planes, strict=True))
    assert rounding(compiled) == rounding(eager) == (3 * 2 * 2, 0)
