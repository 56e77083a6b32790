"""transformers' own quantized caches: through a backend made here, and the errors where there is none."""

from typing import Any

import pytest
import torch
from models import prompt, tiny_llama
from transformers import cache_utils

from kvquant_hf.errors import EvaluationInputError, MissingPackageError
from kvquant_hf.evaluation import baselines, decode, evaluate, paged
from kvquant_hf.evaluation.baselines import baseline, parse_baseline
from kvquant_hf.evaluation.figure import points_of

WINDOWS = prompt(batch=2, length=200)


class RoundingLayer(cache_utils.QuantizedLayer):
    """One scale per token, codes in int8 whatever ``nbits`` is; as HQQ does it, a tensor and a dict."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
        scale = tensor.abs().amax(-1, keepdim=True) / (2 ** (self.nbits - 1) - 1)
        return (tensor / scale).round().to(torch.int8), {"scale": scale, "axis": axis}

    def _dequantize(self, quantized: Any) -> torch.Tensor:
        codes, meta = quantized
        return codes * meta["scale"]


@pytest.fixture
def hqq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_utils, "HQQQuantizedLayer", RoundingLayer)
    monkeypatch.setattr(baselines, "_installed", lambda module: module == "hqq")


def test_a_baseline_is_measured_like_ours(hqq: None) -> None:
    model = tiny_llama()
    made: list[Any] = []
    eight, four = (baseline(model, name) for name in ("hqq-8", "hqq-4"))
    contenders = [paged(model, "int8"), eight._replace(make=lambda: made.append(eight.make()) or made[-1]), four]
    results = evaluate(model, WINDOWS, contenders, batch=2)
    int8, hqq8, hqq4 = (results[name].accuracy.kld_mean for name in ("int8", "hqq-8", "hqq-4"))
    assert int8 / 10 < hqq8 < hqq4 / 10
    storage = results["hqq-8"].storage
    assert storage.page_bits_per_element is None
    # In a figure all have bits of the same kind: those in pages only where every cache has some.
    ours, label = points_of({"int8": results["int8"]})
    assert ours == {"int8": (results["int8"].storage.page_bits_per_element, int8)} and "full pages" in label
    points, label = points_of(results)
    assert points.keys() == {"int8", "hqq-8", "hqq-4"} and "everything held" in label
    assert points["int8"] == (results["int8"].storage.bits_per_element, int8)
    # A code of a byte for each element and a float32 scale for 32 of them; the last tokens may be exact, how many
    # depends on the version of transformers.
    keys = made[0].layers[0].keys
    exact = keys.shape[2] if keys.dim() == 4 else 0
    elements = 2 * 2 * 3 * 2 * 32
    assert storage.elements == 200 * elements
    assert storage.bytes == elements * ((200 - exact) * 36 // 32 + 4 * exact)


def test_a_baseline_decodes_like_ours(hqq: None) -> None:
    model = tiny_llama()
    _, results = decode(model, WINDOWS[:, :70], 200, [baseline(model, f"hqq-{bits}") for bits in (8, 4)], batch=2)
    eight, four = results["hqq-8"], results["hqq-4"]
    assert all(0 < a < b / 10 for a, b in zip(eight.quarters, four.quarters, strict=True))
    assert 0 < eight.chunked < four.chunked / 10
    storage = eight.result.storage
    assert storage.page_bits_per_element is None and storage.elements == four.result.storage.elements


@pytest.mark.parametrize("name", ["quanto-8", "hqq-5", "hqq", "fp8-8", "-", "int4"])
def test_no_such_baseline(name: str) -> None:
    with pytest.raises(EvaluationInputError, match="use quanto-2, quanto-4, hqq-1"):
        parse_baseline(name)


@pytest.mark.parametrize(("name", "package"), [("quanto-4", "optimum-quanto"), ("hqq-4", "hqq")])
def test_a_backend_is_not_installed(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(module: str) -> None:
        if "." in module:
            raise ModuleNotFoundError(module)  # as importlib does where the parent is missing

    monkeypatch.setattr(baselines.importlib.util, "find_spec", find_spec)
    with pytest.raises(MissingPackageError, match=f"pip install {package},"):
        parse_baseline(name)
