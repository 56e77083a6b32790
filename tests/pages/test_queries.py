"""Moments of queries: what counts, what does not, and what is left of them in a quarter of their bytes."""

import threading
from typing import Any

import numpy as np
import pytest
import torch
from models import ragged_prompts, tiny_llama
from stores import fill, make_store, same_bytes, vectors

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.pages import queries as queries_module
from kvquant_hf.pages.queries import Moments, SeenQueries
from kvquant_hf.pages.store import PagedStore
from kvquant_hf.pages.table import PageTable
from kvquant_hf.transformers_api.names import with_cache


def test_moments_come_back() -> None:
    q = torch.randn(3, 200, 16)
    q[:, :, 5] = 0  # a channel that no query has
    matrix = q.transpose(1, 2) @ q
    found = Moments.of(matrix).matrix()
    assert not found[:, 5].any()
    torch.testing.assert_close(found, matrix, rtol=0, atol=1e-3 * float(matrix.max()))


def test_padding_says_nothing_even_if_it_is_no_number() -> None:
    seen, alone = SeenQueries(2, 16), SeenQueries(2, 16)
    q = torch.randn(1, 4, 30, 16)
    alone.see(q[:, :, 10:])
    padded = q.clone()
    padded[:, :, :10] = float("nan")
    seen.padding = np.arange(30)[None] < 10
    seen.see(padded)
    metric, expected = seen.metric(), alone.metric()
    assert metric is not None and expected is not None
    off = ~torch.eye(16, dtype=torch.bool)  # the diagonal knows how many tokens there were
    torch.testing.assert_close(metric[..., off], expected[..., off])


@pytest.mark.parametrize("shape", [(1, 3, 30, 16), (1, 4, 30, 8), (2, 4, 30, 16), (4, 30, 16)], ids=str)
def test_queries_of_others_are_not_taken(shape: tuple[int, ...]) -> None:
    seen = SeenQueries(2, 16)
    seen.see(torch.randn(1, 4, 30, 16))
    before = seen.metric()
    seen.see(torch.randn(shape))
    after = seen.metric()
    assert before is not None and after is not None and torch.equal(before, after)


@pytest.mark.parametrize("longest", [12, 40])  # within the open page, and beyond it
def test_a_padded_prompt_has_the_moments_of_the_prompt_alone(longest: int) -> None:
    model, length = tiny_llama(), 7
    inputs = ragged_prompts((longest, length))
    found = []
    for ids, mask in (
        (inputs["input_ids"], inputs["attention_mask"]),
        (inputs["input_ids"][1:, -length:], inputs["attention_mask"][1:, -length:]),
    ):
        cache = QuantizedPagedCache(model.config, "kv3", page_size=16)
        model.generate(ids, attention_mask=mask, **with_cache(cache), max_new_tokens=1, do_sample=False)
        found.append(cache.stores[-1].seen.metric()[-1])
    off = ~torch.eye(found[0].shape[-1], dtype=torch.bool)
    torch.testing.assert_close(found[0][:, off], found[1][:, off], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("owner", "name"), [(PageTable, "append"), (queries_module, "round_keys")])
def test_a_pool_that_another_thread_grows_keeps_what_is_rounded(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    keys, values, query = vectors(1, 2, 100, 64), vectors(1, 2, 100, 64, seed=1), vectors(1, 4, 100, 64, seed=2)
    shared = make_store("int4", keys, values, 16)
    other = PagedStore(*shared.codecs, 16, keys, values, make_pool=lambda *planes: shared.pool)
    threads: list[threading.Thread] = []

    def meanwhile(*args: Any) -> None:
        """A thread needs pages now; it gets them at once, or when what is under way is done."""
        if not threads:
            threads.append(threading.Thread(target=fill, args=(other, keys, values)))
            threads[0].start()
            threads[0].join(0.2)

    original = getattr(owner, name)
    stores = [make_store("int4", keys, values, 16), shared]
    for store in stores:
        with monkeypatch.context() as patched:
            if store is shared:
                patched.setattr(owner, name, lambda *args, **kwargs: (meanwhile(), original(*args, **kwargs))[1])
            store.append(keys, values)
            kept = store.seen and store.seen.hand_over()
            assert kept is not None
            store.saw(query)
    threads[0].join()
    assert shared.seen is not None and shared.seen.rounded == 6
    assert same_bytes(*stores)
