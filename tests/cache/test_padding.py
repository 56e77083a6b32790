"""Left padding: no page of its own, no share in any scale, the same tokens as without it."""

import numpy as np
import pytest
import torch
from models import prompt, ragged_prompts, tiny_llama
from stores import make_store, raw, vectors

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.pages.padding import padded_pages, replace_padding
from kvquant_hf.pages.store import PagedStore
from kvquant_hf.policies.table import POLICIES
from kvquant_hf.transformers_api.names import cache_in, with_cache

PAGE = 16
GREEDY = {"max_new_tokens": 20, "do_sample": False}
policies = pytest.mark.parametrize("policy", list(POLICIES))


def left_padding(counts: tuple[int, ...], tokens: int) -> np.ndarray:
    return np.arange(tokens) < np.array(counts)[:, None]


def appended(policy: str, x: torch.Tensor, padding: np.ndarray, chunk: int) -> PagedStore:
    like = vectors(3, 2, 1, 32)
    store = make_store(policy, like, like, PAGE)
    for start in range(0, x.shape[2], chunk):
        part = x[:, :, start : start + chunk]
        first = store.sealed_pages * PAGE
        store.append(part, 2 * part, padding[:, first : start + part.shape[2]])
    return store


@policies
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_what_padding_holds_changes_no_stored_byte(policy: str, chunk: int) -> None:
    """Real tokens decode to the same numbers whatever stands in the padding, however the tokens arrive."""
    counts, tokens = (0, 5, 37), 3 * PAGE + 5
    padding = left_padding(counts, tokens)
    x = vectors(3, 2, tokens, 32)
    loud = x.masked_fill(torch.from_numpy(padding)[:, None, :, None], 1e4)
    stores = [appended(policy, x, padding, 100), appended(policy, loud, padding, chunk)]
    for b, count in enumerate(counts):
        first = count // PAGE  # the page in which the sequence begins
        for planes in zip(*(store.pool.planes for store in stores), strict=True):
            pages = [plane[store.page_table[b, first:].long()] for plane, store in zip(planes, stores, strict=True)]
            assert len(pages[0]) and torch.equal(raw(pages[0]), raw(pages[1]))
    if policy != "exact":  # and without being told, padding does get into the scales, or this test would show nothing
        told = stores[0].view().dense("keys")[1, :, counts[1] : PAGE]
        untold = appended(policy, loud, np.zeros_like(padding), 100).view().dense("keys")[1, :, counts[1] : PAGE]
        per_page = policy not in ("int8-token", "int4-token", "turboquant-qjl", "int8-static", "fp8", "nvfp4")
        assert torch.equal(told, untold) is not per_page


def test_pages_of_padding_are_one_page() -> None:
    tokens = 4 * PAGE + 1
    padding = left_padding((0, 2 * PAGE, 3 * PAGE + 2), tokens)
    store = appended("int4", vectors(3, 2, tokens, 32), padding, 100)
    table = store.page_table.numpy()
    blank = {int(page) for page in (*table[1, :2], *table[2, :3])}
    assert len(blank) == 1 and len(np.unique(table)) == 4 + 2 + 1 + 1 == store.pool.used
    assert store.pool.references(np.array(list(blank)))[0] == 5
    twin = store.fork()
    store.select(torch.tensor([2, 2, 0]))
    assert store.pool.references(np.array(list(blank)))[0] == 5 + 6
    twin.clear()
    store.crop(tokens)
    assert store.pool.used == 0


def test_a_page_that_was_padding_can_hold_tokens() -> None:
    """The page of padding is forgotten when it goes back to the pool, where anybody may take it."""
    tokens = 2 * PAGE + 1
    padding = left_padding((0, PAGE, 0), tokens)
    store = appended("exact", vectors(3, 2, tokens, 32), padding, 100)
    store.crop(tokens)
    x = vectors(3, 2, tokens, 32, seed=4)
    store.append(x[:, :, : PAGE + 1], x[:, :, : PAGE + 1])
    real = np.zeros_like(padding[:, : 2 * PAGE + 1])
    real[1, PAGE:] = True
    store.append(x[:, :, PAGE + 1 :], x[:, :, PAGE + 1 :], real[:, PAGE:])
    kept = ~torch.from_numpy(real)[:, None, :, None]
    assert torch.equal(store.view().dense("keys") * kept, x * kept) and store.pool.used == 6


def test_pages_are_given_back_when_appending_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    like = vectors(3, 2, 1, 32)
    store = make_store("int4", like, like, PAGE)

    def fail(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    x = vectors(3, 2, 3 * PAGE, 32)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr("kvquant_hf.pages.store.append_pages", fail)
        store.append(x, x, left_padding((0, 30, 40), 3 * PAGE))
    assert store.pool.used == 0 and store.length == 0


def test_helpers() -> None:
    padding = left_padding((0, 3, 4, 7), 8)
    assert padded_pages(padding, 4).tolist() == [[False] * 2, [False] * 2, [True, False], [True, False]]
    x = torch.arange(8.0).view(1, 1, 8, 1).repeat(4, 1, 1, 1)
    filled = replace_padding(x, padding, 4).squeeze().tolist()
    assert filled == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [3, 3, 3, 3, 4, 5, 6, 7],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 3, 7, 7, 7, 7],
    ]
    hole = np.array([[False, True, False, True]])
    assert replace_padding(x[:1, :, :4], hole, 4).flatten().tolist() == [0, 0, 2, 0]


@pytest.mark.parametrize("chunk", [None, 20])
def test_generate_says_where_the_padding_is(chunk: int | None) -> None:
    """Through ``generate``, with and without chunks: padded pages are shared, tokens are DynamicCache's."""
    model = tiny_llama()
    inputs = ragged_prompts((70, 69, 30, 1))
    expected = model.generate(**inputs, **GREEDY)
    for options in ({"cache_implementation": "kvquant", "cache_config": {"policy": "exact", "page_size": PAGE}}, None):
        cache = QuantizedPagedCache(model.config, "exact", page_size=PAGE)
        options = options or with_cache(cache)
        output = model.generate(**inputs, **options, **GREEDY, prefill_chunk_size=chunk, return_dict_in_generate=True)
        assert torch.equal(output.sequences, expected)
        store = cache_in(output).stores[0]
        # 89 tokens held: 5 sealed pages each; sequences 2 and 3 begin in their third and fifth page.
        assert store.pool.used == 4 * 5 - 2 - 4 + 1
        assert np.array_equal(cache_in(output).layers[0].padding, (inputs["attention_mask"] == 0).numpy())


def test_padding_changes_nothing_for_the_real_tokens() -> None:
    """int4 is close to the exact logits for a padded sequence as for the same sequence alone."""
    model = tiny_llama()
    inputs = ragged_prompts((70, 33))
    errors = []
    for told in (True, False):
        cache = QuantizedPagedCache(model.config, "int4", page_size=PAGE, prefill="quantized", sinks=0)
        if told:
            cache.set_padding(inputs["attention_mask"])
        with torch.no_grad():
            exact = model(**inputs).logits[1, -1]
            errors.append(float((model(**inputs, **with_cache(cache)).logits[1, -1] - exact).abs().max()))
    assert errors[0] <= errors[1] and errors[0] > 0


def test_padding_follows_its_sequence() -> None:
    model = tiny_llama()
    cache = QuantizedPagedCache(model.config, "int8", page_size=PAGE)
    inputs = ragged_prompts((40, 33))
    cache.set_padding(inputs["attention_mask"])
    with torch.no_grad():
        model(**inputs, **with_cache(cache))
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.layers[0].padding.tolist() == inputs["attention_mask"].eq(0).flip(0).tolist()
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].padding[:, 0].tolist() == [True, True, False, False]
    cache.set_padding(torch.ones(4, 40))
    assert cache.layers[0].padding is None
    cache.set_padding(inputs["attention_mask"])
    cache.reset()
    assert cache.layers[0].padding is None
    with torch.no_grad():
        model(prompt(3, 20), **with_cache(cache))
    assert cache.report().tokens == 20
