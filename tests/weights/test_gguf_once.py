"""A file is parsed once while a model is loaded from it, by whoever reads it, and what is read is the same."""

import sys
from pathlib import Path

import pytest
import torch
from gguf_files import save_gguf

from kvquant_hf.cli.models import load_model
from kvquant_hf.cli.terminal import InputError
from kvquant_hf.weights import load_packed
from kvquant_hf.weights.gguf_once import parsed_once

gguf = pytest.importorskip("gguf", reason="gguf is not installed")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that have been parsed."""
    paths: list[str] = []
    build = gguf.GGUFReader._build_tensors

    def counted(self: object, *args: object) -> None:
        paths.append(type(self).__name__)
        build(self, *args)

    monkeypatch.setattr(gguf.GGUFReader, "_build_tensors", counted)
    return paths


def test_what_is_read_is_the_same(tiny: Path) -> None:
    plain = gguf.GGUFReader(tiny)
    with parsed_once():
        once = gguf.GGUFReader(tiny)
        assert gguf.GGUFReader(str(tiny)) is once and gguf.GGUFReader(tiny, "r") is not once
        with parsed_once():
            assert gguf.GGUFReader(tiny) is once
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is names
    assert list(once.fields) == list(plain.fields)
    for name, field in plain.fields.items():
        assert once.fields[name].contents() == field.contents()
    for one, other in zip(once.tensors, plain.tensors, strict=True):
        assert (one.name, one.tensor_type, list(one.shape)) == (other.name, other.tensor_type, list(other.shape))
        assert (one.data == other.data).all()


@pytest.mark.parametrize("weights", ["full", "packed"])
def test_a_model_takes_one_reading(tiny: Path, parsed: list[str], weights: str) -> None:
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    loaded = load_model(str(tiny), "float32", hidden=True, weights=weights)
    assert parsed == ["Reader"] and loaded.weights == weights
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (reader, names)
    parsed.clear()
    packed = load_packed(tiny, torch.float32)
    assert parsed == ["Reader"]
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, packed(ids).logits, rtol=1e-4, atol=1e-4)


def test_nothing_stays_behind_where_loading_fails(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no such thing")
    reader = gguf.GGUFReader
    with pytest.raises(InputError, match=r"x\.gguf"):
        load_model(str(tmp_path / "x.gguf"), hidden=True)
    assert gguf.GGUFReader is reader


def test_without_gguf_others_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("kvquant_hf.weights.gguf_once.find_spec", lambda name: None)
    with parsed_once(), pytest.raises(ImportError):
        import gguf  # noqa: F401
