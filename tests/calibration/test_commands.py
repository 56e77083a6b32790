"""``kvquant calibrate``, ``kvquant qparams``, and the commands that take their result."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from command import Outcome, Run, is_one_sentence, save_tiny_model

from kvquant_hf.calibration import QParams, Statistics
from kvquant_hf.calibration.texts import SOURCES, read_text
from kvquant_hf.cli import main

SHORT = ("--samples", "3", "--seqlen", "50", "--dtype", "float32")
EVAL = ("--context", "70", "--windows", "1", "--page-size", "16", "--json")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.delenv("KVQUANT_DEBUG", raising=False)

    def run(*args: object) -> Outcome:
        with pytest.raises(SystemExit) as exit_:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Outcome(exit_.value.code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


def test_from_text_to_tokens(run: Run, tiny: Path, tmp_path: Path) -> None:
    """The whole way: a text, statistics, parameters, raw files, generation and evaluation."""
    text, out = tmp_path / "text.txt", tmp_path / "new" / "folder"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 10, encoding="utf-8")
    code, printed, err = run("calibrate", "--model", tiny, "--dataset", text, "--out", out, *SHORT)
    assert (code, printed.strip()) == (0, str(out / "statistics.safetensors"))
    assert "calibrating" in err
    statistics = Statistics.load(out)
    facts = {"text": str(text), "samples": 3, "seqlen": 50, "dtype": "float32", "model": tiny.name}
    assert facts.items() <= statistics.facts.items() and statistics.layers == [0, 1]
    assert statistics.of(0, "keys")[0].shape == (2, 16)

    code, printed, err = run("qparams", out, "--turbomind", "--tp", "2")
    assert (code, err) == (0, "")
    names = [f"layers.{layer}.past_kv_scale.{rank}.weight" for layer in range(2) for rank in range(2)]
    assert printed.split() == [str(out / name) for name in ("qparams.safetensors", *names)]
    assert all(len(np.fromfile(out / name, "<f4")) == 4 for name in names)
    code, printed, _ = run("qparams", out / "statistics.safetensors", "--per", "channel", "--sym", "--out", out / "c")
    assert code == 0 and QParams.load(out / "c").facts["per"] == "channel"
    assert QParams.load(out / "c").facts["calibration"]["seqlen"] == 50
    assert not QParams.load(out / "c").of(1, "values")[1].any()

    options = ("generate", "--model", tiny, "--prompt", "abc", "--max-new-tokens", "20", "--page-size", "16", "--json")
    code, printed, _ = run(*options, "--policy", "int8-static", "--qparams", out)
    report = json.loads(printed)["report"]
    assert code == 0 and (report["policy"], report["page_bits_per_element"]) == ("int8-static", 8.0)

    code, printed, _ = run("eval", "--model", tiny, *EVAL, "--policies", "int8,int8-static", "--qparams", out)
    rows = json.loads(printed)["caches"]
    assert code == 0 and list(rows) == ["exact", "int8", "int8-static"]
    assert rows["int8-static"]["page_bits_per_element"] == 8.0 and rows["int8-static"]["kld_mean"] > 1e-9

    klds = []
    for given in ((), ("--qparams", out)):
        code, printed, _ = run("eval", "--model", tiny, *EVAL, "--policies", "int8,kv3", *given)
        klds.append(json.loads(printed)["caches"]["kv3"]["kld_mean"])
        assert code == 0
    assert klds[0] != klds[1]  # the prior is used
    code, printed, _ = run(*options, "--policy", "kv3", "--qparams", out)
    report = json.loads(printed)["report"]
    assert code == 0 and (report["policy"], report["nearest_pages"]) == ("kv3", 0)


def test_the_default_text(run: Run, tiny: Path, tmp_path: Path) -> None:
    code, _, _ = run("calibrate", "--model", tiny, "--out", tmp_path, "--samples", "1", "--seqlen", "20")
    assert code == 0 and Statistics.load(tmp_path).facts["text"] == "Python language reference"


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("calibrate", "--out", "x", "--dataset", "wikitext3"), "c4, ptb, wikitext2, pileval"),
        (("calibrate", "--out", "x", "--dataset", __file__, "--seqlen", "2000"), "--seqlen 1024"),
        (("calibrate", "--out", "x", "--dataset", __file__, "--seqlen", "500"), "--samples"),
        (("calibrate", "--out", "x", "--dtype", "int8"), "bfloat16"),
        (("calibrate",), "--out"),
        (("generate", "--prompt", "x", "--policy", "int8-static"), "run kvquant calibrate and kvquant qparams"),
        (("generate", "--prompt", "x", "--policy", "int8", "--qparams", "/none"), "takes no qparams"),
        (("eval", "--policies", "int8-static"), "run kvquant calibrate and kvquant qparams"),
        (("eval", "--policies", "int8", "--qparams", "/none"), "add int8-static to --policies"),
        (("eval", "--policies", "int8-static", "--qparams", "/none"), "there is no file /none"),
        (("eval", "--policies", "kv3", "--qparams", "/none"), "there is no file /none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_one_sentence(
    run: Run, tiny: Path, args: tuple[str, ...], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*args, "--model", tiny)
    lines = [line for line in err.splitlines() if not line.endswith(" ...")]  # what was being done until then
    assert (code, out) == (2, "") and len(lines) == 1
    assert is_one_sentence(lines[0] + "\n") and word in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("/none",), "write one with kvquant calibrate"),
        (("/none", "--turbomind", "--per", "channel"), "per tensor"),
        (("/none", "--tp", "2"), "add --turbomind"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_of_qparams(run: Run, args: tuple[str, ...], word: str) -> None:
    code, out, err = run("qparams", *args)
    assert (code, out) == (2, "") and is_one_sentence(err) and word in err


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A library ``datasets``; what it was asked for, and how many rows were read."""
    calls: list[Any] = []

    class Rows:
        def __init__(self, column: str) -> None:
            self.column = column

        def __iter__(self) -> Any:
            for i in range(1000):
                calls.append(i)
                yield {self.column: f"row {i}".ljust(100)}

    def load_dataset(path: str, config: str | None, split: str, **options: Any) -> Rows:
        if path == SOURCES["c4"].path:
            raise ConnectionError("Couldn't reach the hub.\nmore")
        calls.append((path, config, split, options))
        return Rows("sentence" if "ptb" in path else "text")

    module = ModuleType("datasets")
    vars(module).update(load_dataset=load_dataset, __spec__=ModuleSpec("datasets", None))
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_data_sets_by_name(library: list[Any]) -> None:
    """Rows are read in their order, and only as many as are needed."""
    text = read_text("ptb", 50)
    rows = [text[i : i + 100].strip() for i in range(0, len(text), 102)]
    assert rows == [f"row {i}" for i in range(8)] and len(text) >= 50 * 16
    asked = ("ptb-text-only/ptb_text_only", "penn_treebank", "train", {"revision": "refs/convert/parquet"})
    assert library == [asked, *range(8)]
    library.clear()
    assert read_text("wikitext2", 1).startswith("row 0") and read_text("pileval", 1).startswith("row 0")
    assert [call[:3] for call in library if isinstance(call, tuple)] == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        ("mit-han-lab/pile-val-backup", None, "validation"),
    ]


def test_data_sets_that_cannot_be_had(library: list[Any], run: Run, tmp_path: Path) -> None:
    code, _, err = run("calibrate", "--dataset", "c4", "--out", tmp_path)
    assert code == 2 and is_one_sentence(err)
    assert "cannot load the data set 'c4': Couldn't reach the hub; " in err and "--dataset FILE" in err
