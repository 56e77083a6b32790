"""What users do that caches were not made for: threads, modes, masks that do not fit, writes into packed tensors."""

import copy
import threading

import pytest
import torch
from models import tiny_llama
from transformers import DynamicCache

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.errors import CacheMismatchError, WrongModelError
from kvquant_hf.transformers_api.names import with_cache


def ids(tokens: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def test_forks_in_threads_do_not_disturb_each_other() -> None:
    """Forks share one pool; each thread makes it grow while the others read and write."""
    model = tiny_llama()
    prefix, rest = ids(600), ids(160)
    cache = QuantizedPagedCache(model.config, "int8", page_size=8)
    with torch.no_grad():
        model(prefix, **with_cache(cache))

    def read_on(fork: QuantizedPagedCache) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model(chunk, **with_cache(fork)).logits for chunk in rest.split(8, 1)], 1)

    expected = read_on(copy.deepcopy(cache))
    results: list[torch.Tensor | None] = [None] * 4

    def work(i: int, fork: QuantizedPagedCache) -> None:
        results[i] = read_on(fork)

    threads = [threading.Thread(target=work, args=(i, copy.deepcopy(cache))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert result is not None and torch.equal(result, expected)
    del threads
    assert all(store.pool.used == store.sealed_pages for store in cache.stores)


def test_inference_mode_first_and_no_grad_later() -> None:
    model = tiny_llama()
    cache, reference = QuantizedPagedCache(model.config, "exact"), DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids(100), **with_cache(cache))
        model(ids(100), **with_cache(reference))
    more = torch.cat([ids(100), ids(5)], 1)
    options = {"max_new_tokens": 90, "do_sample": False, "attention_mask": torch.ones_like(more)}
    got = model.generate(more, **with_cache(cache), **options)
    assert torch.equal(got, model.generate(more, **with_cache(reference), **options))
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([0, 0]))
    assert cache.report().batch_size == 2


@pytest.mark.parametrize(
    ("mask", "word"),
    [
        (torch.ones(1, 1, 1, 150, dtype=torch.bool), "needs \\[1, 4, 1, 151\\]"),
        (torch.ones(1, 1, 1, 300, dtype=torch.bool), "needs \\[1, 4, 1, 151\\]"),
        (torch.ones(1, 1, 1, 151, dtype=torch.long), "bool mask"),
        (torch.ones(2, 1, 1, 151, dtype=torch.bool), "needs \\[1, 4, 1, 151\\]"),
    ],
    ids=("short", "long", "integer", "batch"),
)
def test_masks_that_do_not_fit(mask: torch.Tensor, word: str) -> None:
    model = tiny_llama()
    cache = QuantizedPagedCache(model.config, "int4")
    with torch.no_grad():
        model(ids(150), **with_cache(cache))
        with pytest.raises(CacheMismatchError, match=word):
            model(ids(1), **with_cache(cache), attention_mask=mask)


def test_dropout_is_not_ignored() -> None:
    """The packed path has none, so the call goes the dense way and is counted."""
    model = tiny_llama(attention_dropout=0.5)
    cache = QuantizedPagedCache(model.config, "int8")
    with torch.no_grad(), pytest.warns(UserWarning, match="dropout"):
        model(ids(100), **with_cache(cache))
        model.train()(ids(1), **with_cache(cache))
    assert cache.report().fallback_reasons == {"argument 'dropout'": model.config.num_hidden_layers}


def test_writing_into_packed_keys_is_refused() -> None:
    model = tiny_llama()
    cache = QuantizedPagedCache(model.config, "int8")
    with torch.no_grad():
        model(ids(100), **with_cache(cache))
    with pytest.raises(CacheMismatchError, match="clone"):
        cache.layers[0].keys.mul_(0)


def test_a_fork_belongs_to_the_same_model() -> None:
    model = tiny_llama()
    cache = QuantizedPagedCache(model.config, "int8")
    model.generate(ids(80), **with_cache(cache), max_new_tokens=2, attention_mask=torch.ones(1, 80))
    with pytest.raises(WrongModelError, match="another model"):
        tiny_llama(seed=1).generate(ids(90), **with_cache(copy.deepcopy(cache)), max_new_tokens=2)
