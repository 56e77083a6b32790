"""A transformers without what continuous batching needs: one sentence, and the rest of the package works."""

import pytest
from models import tiny_llama
from transformers import GenerationConfig

import kvquant_hf
from kvquant_hf.batching import hooks
from kvquant_hf.errors import UnsupportedVersionError

ASKING = GenerationConfig(cache_implementation="kvquant", max_new_tokens=2)


def refused(found: str) -> None:
    message = rf"needs transformers 5\.23 or newer, found {found}; run: pip install"
    with pytest.raises(UnsupportedVersionError, match=message):
        tiny_llama().generate_batch([[1, 2, 3]], ASKING)
    with pytest.raises(UnsupportedVersionError, match=message):
        tiny_llama().init_continuous_batching(ASKING)
    with pytest.raises(UnsupportedVersionError, match=message):
        _ = kvquant_hf.QuantizedBatchingConfig


def test_all_names_are_there() -> None:
    assert ("QuantizedBatchingConfig" in kvquant_hf.__all__) == (not hooks.unsupported())
    assert all(hasattr(kvquant_hf, name) for name in kvquant_hf.__all__)


@pytest.mark.parametrize("found", ["5.17.0", "5.22.3"])
def test_an_older_transformers_is_refused(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "version", lambda _: found)
    refused(found)


@pytest.mark.skipif("needs transformers" not in hooks.unsupported(), reason="this transformers is not too old")
def test_the_installed_one_is_refused() -> None:
    refused(hooks.version("transformers"))
