"""Text: files, data sets, windows."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from command import byte_tokenizer
from tokenizers.processors import TemplateProcessing

from kvquant_hf.errors import EvaluationInputError, MissingPackageError
from kvquant_hf.evaluation.text import cut_windows, read_dataset, read_file


def test_windows_follow_each_other() -> None:
    tokenizer = byte_tokenizer()
    windows = cut_windows(tokenizer, "abcdefghijk", context=3, count=3)
    assert windows.dtype == torch.int64
    assert [tokenizer.decode(row) for row in windows] == ["abc", "def", "ghi"]


def test_every_window_begins_as_the_tokenizer_begins_a_text() -> None:
    tokenizer = byte_tokenizer(bos_token="</s>")
    special = [("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=special)
    windows = cut_windows(tokenizer, "abcdef", context=4, count=2)
    assert [tokenizer.decode(row) for row in windows] == ["</s>abc", "</s>def"]


def test_an_end_is_no_beginning() -> None:
    tokenizer = byte_tokenizer()
    special = [("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=special)
    assert tokenizer.decode(cut_windows(tokenizer, "abcdef", context=3, count=2)[0]) == "abc"


def test_too_little_text() -> None:
    with pytest.raises(EvaluationInputError, match=r"11 tokens.*need 12.*--windows 3"):
        cut_windows(byte_tokenizer(), "abcdefghijk", context=3, count=4)
    with pytest.raises(EvaluationInputError, match=r"11 tokens.*needs 12; give a longer text, or a smaller --context"):
        cut_windows(byte_tokenizer(), "abcdefghijk", context=12, count=1, or_fewer=True)
    with pytest.raises(EvaluationInputError, match="nothing to predict"):
        cut_windows(byte_tokenizer(), "abc", context=1, count=1)


@pytest.mark.parametrize(("count", "found"), [(2, 2), (3, 3), (4, 3)])
def test_as_many_windows_as_there_are(count: int, found: int) -> None:
    assert cut_windows(byte_tokenizer(), "abcdefghijk", context=3, count=count, or_fewer=True).shape == (found, 3)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("ä", encoding="utf-8")
    assert read_file(str(file)) == "ä"
    file.write_bytes(b"\xe4")
    with pytest.raises(EvaluationInputError, match="UTF-8"):
        read_file(str(file))
    with pytest.raises(EvaluationInputError, match="No such file"):
        read_file(str(tmp_path / "none"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A library ``datasets`` with one data set; what it was asked for."""
    calls: list[Any] = []

    class Rows(dict[str, list[str]]):
        column_names = property(lambda self: list(self))

    def load_dataset(path: str, config: str | None, split: str) -> Rows:
        calls.append((path, config, split))
        if path == "none":
            raise ValueError("Unknown split.\nmore")
        return Rows(label=["1"]) if path == "labels" else Rows(text=["a", "", "b"])

    module = ModuleType("datasets")
    vars(module).update(load_dataset=load_dataset, __spec__=ModuleSpec("datasets", None))
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_data_sets(asked: list[Any]) -> None:
    assert read_dataset("wikitext") == read_dataset("wikitext:raw") == read_dataset("a/b:raw:train") == "a\n\n\n\nb"
    assert asked == [("wikitext", None, "test"), ("wikitext", "raw", "test"), ("a/b", "raw", "train")]
    with pytest.raises(EvaluationInputError, match=r"Unknown split; .*--text"):
        read_dataset("none")
    with pytest.raises(EvaluationInputError, match=r"no column 'text' but label; .*--text"):
        read_dataset("labels")


def test_datasets_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else SimpleNamespace())
    with pytest.raises(MissingPackageError, match="pip install datasets"):
        read_dataset("wikitext")
