"""``kvquant eval`` on a tiny model."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from command import Run, is_one_sentence

from kvquant_hf.policies.cost import page_cost

FAST = ("--context", "70", "--windows", "2", "--page-size", "16")


def test_as_json(run: Run, tiny: Path) -> None:
    code, out, err = run("eval", "--model", tiny, "--policies", "int4,int8", *FAST, "--json")
    data = json.loads(out)
    assert (code, err) == (0, "")
    conditions = {"windows": 2, "context_tokens": 70, "step": 16, "page_size": 16, "dtype": "float32", "outliers": None}
    assert conditions.items() <= data.items()
    assert list(data["caches"]) == ["exact", "int4", "int8"]
    for name, row in data["caches"].items():
        assert row["positions"] == 2 * 69
        cost = page_cost(name, 16, heads=2, page_size=16, dtype=torch.float32)
        assert row["page_bits_per_element"] == cost.bits_per_element
    exact, int4, int8 = data["caches"].values()
    assert abs(exact["kld_mean"]) < 1e-10 < int8["kld_mean"] < int4["kld_mean"]


def test_as_a_table_of_80_columns(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    policies = "exact,turboquant-qjl,int8/int4,4,int4-token"
    code, out, err = run("eval", "--model", tiny, "--policies", policies, *FAST, "--outliers", "32")
    assert code == 0
    assert "outliers x32" in out and "Python language reference" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line[:1] in "eit" and "%" in line}
    assert list(rows)[:4] == ["exact", "turboquant-qjl", "int8/int4", "int4-token"]
    assert rows["exact"][6] == "100.00%"
    assert "measuring" in err and "measuring" not in out


def test_a_budget_is_named_with_what_it_chose(run: Run, tiny: Path) -> None:
    code, out, err = run("eval", "--model", tiny, "--policies", "auto:7.5,auto:30,int8", *FAST, "--json")
    rows = json.loads(out)["caches"]
    assert (code, err) == (0, "") and list(rows) == ["exact", "auto:7.5 (int4)", "auto:30 (int8)", "int8"]
    assert rows["auto:30 (int8)"] == rows["int8"] and rows["auto:7.5 (int4)"]["page_bits_per_element"] <= 7.5
    code, out, err = run("eval", "--model", tiny, "--policies", "auto:2", *FAST)
    assert code == 2 and out == "" and "'kv2.4'" in err.splitlines()[-1]


def test_a_short_text_has_fewer_windows(run: Run, tiny: Path, tmp_path: Path) -> None:
    """Eight by default; what was asked for is needed."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4, encoding="utf-8")
    options = ("eval", "--model", tiny, "--text", text, "--policies", "int8", "--context", "70", "--json")
    code, out, _ = run(*options)
    assert code == 0 and json.loads(out)["windows"] == 180 // 70
    code, out, err = run(*options, "--windows", "3")
    assert code == 2 and "use at most --windows 2" in err


def test_files(run: Run, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4, encoding="utf-8")
    table, picture = tmp_path / "table.csv", tmp_path / "figure.svg"
    options = ("--text", text, "--csv", table, "--figure", picture, "--policies", "int8", "--step", "8")
    code, out, _ = run("eval", "--model", tiny, *FAST, *options, "--json")
    data = json.loads(out)
    assert code == 0 and data["text"] == "text.txt" and data["step"] == 8
    with open(table, newline="", encoding="utf-8") as file:
        rows = {row["cache"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["exact", "int8"]
    assert float(rows["int8"]["kld_mean"]) == data["caches"]["int8"]["kld_mean"]
    assert rows["int8"]["torch_version"] == data["versions"]["torch"]
    drawn = picture.read_text(encoding="utf-8")
    assert drawn.startswith("<?xml") and "int8" in drawn


def test_a_continuation_is_decoded(run: Run, tiny: Path, tmp_path: Path) -> None:
    table, picture = tmp_path / "table.csv", tmp_path / "figure.svg"
    options = ("--mode", "generate", "--prompt", "20", "--policies", "int4", "--csv", table, "--figure", picture)
    code, out, _ = run("eval", "--model", tiny, *FAST, *options, "--json")
    data = json.loads(out)
    conditions = {"mode": "generate", "prompt_tokens": 20, "step": 1, "windows": 2, "context_tokens": 70}
    assert code == 0 and conditions.items() <= data.items()
    with open(table, newline="", encoding="utf-8") as file:
        rows = {row["cache"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(data["caches"]) == ["exact", "int4"]
    for name, row in data["caches"].items():
        assert row["positions"] == 2 * 50
        for key in ("kld_mean", "kld_mean_chunked", *(f"kld_mean_quarter_{i}" for i in range(1, 5))):
            assert float(rows[name][key]) == row[key]
            assert (abs(row[key]) < 1e-9) == (name == "exact"), key
    assert rows["int4"]["prompt_tokens"] == "20"
    drawn = picture.read_text(encoding="utf-8")
    assert drawn.startswith("<?xml") and "int4" in drawn and "tokens read" in drawn


def test_a_continuation_as_tables_of_80_columns(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("eval", "--model", tiny, "--policies", "turboquant-qjl", *FAST, "--mode", "generate")
    assert code == 0 and "first 2 windows of 70, prompts of 64, 12 positions" in out
    _, _, way = out.partition("quarter 1")
    headings, *lines = way.splitlines()
    assert headings.split() == ["2", "3", "4", "mean", "KLD", "chunked", "KLD"]
    rows = {line.split()[0]: line.split() for line in lines if line.startswith(("exact", "turbo"))}
    assert list(rows) == ["exact", "turboquant-qjl"] and all(len(row) == 7 for row in rows.values())
    assert max(map(len, out.splitlines())) <= 80


def test_rounding_is_told_from_quantization(run: Run, tiny: Path) -> None:
    """In bfloat16 the difference of two orders of summation is as large as int8's; the command says so."""
    code, _, err = run("eval", "--model", tiny, "--policies", "exact/int8,int4", *FAST, "--dtype", "bfloat16", "--json")
    assert code == 0
    assert is_one_sentence(err) and "noise floor of bfloat16" in err


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("--policies", "int5"), "turboquant"),
        (("--baselines", "quanto-8"), "quanto-4"),
        (("--text", "/no/such/file"), "No such file"),
        (("--text", "x", "--dataset", "y"), "exclude"),
        (("--context", "1"), "--context"),
        (("--context", "2000"), "--context 1024"),
        (("--windows", "100000"), "--windows"),
        (("--step", "48"), "divisor"),
        (("--page-size", "60"), "multiple of 8"),
        (("--outliers", "3"), "power of two"),
        (("--csv", "/no/such/folder/x.csv"), "folder that exists"),
        (("--figure", "x.gif"), ".png"),
        (("--mode", "decode"), "chunks or generate"),
        (("--prompt", "32"), "--mode generate"),
        (("--mode", "generate", "--step", "8"), "--mode chunks"),
        (("--mode", "generate", "--context", "64"), "larger --context"),
        (("--mode", "generate", "--prompt", "510"), "smaller --prompt"),
        (("--dtype", "int4"), "bfloat16"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_one_sentence(run: Run, tiny: Path, args: tuple[str, ...], word: str) -> None:
    code, out, err = run("eval", "--model", tiny, "--json", *args)
    assert code == 2
    assert out == ""
    assert is_one_sentence(err)
    assert word in err


@pytest.mark.parametrize(
    ("args", "package"),
    [
        (("--dataset", "wikitext:wikitext-2-raw-v1"), "datasets"),
        (("--figure", "x.png"), "matplotlib"),
        (("--baselines", "quanto-4"), "optimum-quanto"),
        (("--baselines", "hqq-4"), "hqq"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_package_is_missing(
    run: Run, tiny: Path, args: tuple[str, ...], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec, missing = importlib.util.find_spec, ("datasets", "matplotlib", "optimum.quanto", "hqq")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in missing else find_spec(name, *rest)
    )
    code, out, err = run("eval", "--model", tiny, *args)
    assert (code, out) == (1, "")
    assert is_one_sentence(err) and f"pip install {package}" in err


def test_help(run: Run) -> None:
    code, out, err = run("eval", "--help")
    assert (code, err) == (0, "")
    assert "--outliers" in out and "Usage: kvquant eval" in out
