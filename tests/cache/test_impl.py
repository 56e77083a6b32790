"""Which implementation a cache runs on: generation on the kernels, what the report says, and explicit choices."""

import pytest
import torch
from models import prompt, tiny_llama

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.errors import ImplementationError
from kvquant_hf.transformers_api.names import cache_in, with_cache

GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.mark.parametrize("policy", ["exact", "int8", "int4", "turboquant"])
def test_generation_on_the_kernels(policy: str) -> None:
    """Append and attention by Triton, in its interpreter where there is no GPU: the tokens of plain torch."""
    pytest.importorskip("triton", reason="Triton is not installed")
    model = tiny_llama(num_hidden_layers=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ids = prompt(1, 31).to(device)
    model.to(device)
    outputs, caches = [], {}
    for impl in ("reference", "triton"):
        caches[impl] = QuantizedPagedCache(model.config, policy, page_size=16, impl=impl)
        outputs.append(model.generate(ids, **with_cache(caches[impl]), max_new_tokens=4, do_sample=False))
    assert torch.equal(*outputs)
    for impl, cache in caches.items():
        report = cache.report()
        assert report.implementation == impl and report.implementation_reason == ""
        assert report.paged_calls == 3 and report.fallback_calls == 0
    reports = [cache.report() for cache in caches.values()]
    assert reports[0].bytes == reports[1].bytes and reports[0].tokens == reports[1].tokens == 34


def test_triton_on_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for and not to be had: one sentence with the remedy, and a cache that is as it was."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    model = tiny_llama()
    for options in (
        with_cache(QuantizedPagedCache(model.config, "int8", impl="triton")),
        {"cache_implementation": "kvquant", "cache_config": {"policy": "int8", "impl": "triton"}},
    ):
        with pytest.raises(ImplementationError, match=r"impl='triton' cannot run here: .*'cpu'.*use impl='auto'\.$"):
            model.generate(prompt(1, 70), **options, **GREEDY)
    cache = QuantizedPagedCache(model.config, "int8", impl="triton")
    with pytest.raises(ImplementationError), torch.no_grad():
        model(prompt(1, 70), **with_cache(cache))
    assert cache.report().tokens == 0 and cache.get_seq_length() == 0
    auto = model.generate(prompt(1, 70), cache_implementation="kvquant", return_dict_in_generate=True, **GREEDY)
    report = cache_in(auto).report()
    assert report.implementation == "cpu" and report.implementation_reason == ""


def test_pages_that_the_kernels_cannot_take() -> None:
    model = tiny_llama()
    cache = QuantizedPagedCache(model.config, "int8", page_size=24, impl="triton")
    with pytest.raises(ImplementationError, match="24 tokens"), torch.no_grad():
        model(prompt(1, 70), **with_cache(cache))
