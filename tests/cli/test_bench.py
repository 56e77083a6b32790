"""``kvquant bench`` on a tiny model."""

import csv
import json
import re
import sys
from pathlib import Path

import pytest
from command import Run, is_one_sentence

from kvquant_hf.benchmark.speed import race as speed
from kvquant_hf.cli.sizes import bytes_of
from kvquant_hf.cli.terminal import InputError

FAST = ("--context", "64", "--rounds", "3", "--dtypes", "float32", "--policies", "int4")
CONDITIONS = {"model", "random_weights", "contexts", "dtypes", "rounds", "prefill_chunk", "date", "machine", "versions"}


def test_as_json_and_files(run: Run, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table, picture = tmp_path / "table.csv", tmp_path / "figure.svg"
    options = ("--no-peak", "--baselines", "static,quanto-4", "--csv", table, "--figure", picture, "--json")
    code, out, err = run("bench", "--model", tiny, *FAST, *options)
    data = json.loads(out)
    assert (code, err) == (0, "")
    assert data["conditions"].keys() >= CONDITIONS
    assert data["conditions"]["versions"].keys() >= {"torch", "transformers", "kvquant_hf"}
    caches = {row["cache"]: row for row in data["rows"]}
    assert list(caches) == ["dynamic", "static", "quanto-4", "exact", "int4"]
    assert caches["exact"]["top1_agreement"] == 1.0 and caches["int4"]["rounds"] == 3
    assert caches["quanto-4"]["status"] == "skipped" or caches["quanto-4"]["p50_ms"] > 0
    with open(table, newline="", encoding="utf-8") as file:
        assert [row["cache"] for row in csv.DictReader(file)] == list(caches)
    assert "int4 (fp32)" in picture.read_text(encoding="utf-8")


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says what a process has")
def test_peaks_come_from_processes_of_their_own(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = run("bench", "--model", tiny, *FAST[:-1], "exact", "--baselines", "")
    assert code == 0
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(("dynamic", "exact"))}
    assert list(lines) == ["dynamic", "exact"]
    for line in lines.values():
        assert re.search(r"[\d.]+ [kM]?B [\d.]+ [kM]?B 100%$", " ".join(line)), "held, then peak"
    assert "in a process of its own ..." in err and "no peak" not in out


def test_a_shape_as_a_table_of_100_columns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = run("bench", "--shape", "smollm2-135m", "--layers", "1", *FAST, "--no-peak", "--baselines", "")
    assert code == 0
    assert out.startswith("smollm2-135m with random weights, 1 of 30 layers") and "says nothing of accuracy" in out
    assert [line.split()[0] for line in out.splitlines() if " fp32 " in line] == ["dynamic", "exact", "int4"]
    assert max(map(len, out.splitlines())) <= 100


def test_throughput(run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = tmp_path / "lengths.jsonl"
    lengths.write_text('{"prompt_tokens": 20, "output_tokens": 3}\n' * 3, encoding="utf-8")
    options = ("--requests-file", lengths, "--kv-budget", "1MB", "--batch-sizes", "1,2", "--policies", "int4")
    code, out, err = run("bench", "--model", tiny, "--throughput", *options, "--dtypes", "float32", "--json")
    data = json.loads(out)
    assert (code, err) == (0, "")
    assert data["conditions"]["workload"].startswith("lengths of lengths.jsonl")
    assert [(row["cache"], row["batch_size"]) for row in data["rows"]] == [
        (name, size) for size in (1, 2) for name in ("dynamic", "exact", "int4")
    ]
    for row in data["rows"]:
        assert (row["requests"], row["output_tokens"], row["batches"]) == (3, 9, 3 if row["batch_size"] == 1 else 2)
        assert row["itl"].keys() == {"p50", "p90", "p99"} and row["stored_bytes"] <= 10**6
    monkeypatch.setenv("COLUMNS", "80")  # narrower than the table, of which nothing may be lost
    code, out, _ = run("bench", "--model", tiny, "--throughput", *options, "--dtypes", "float32")
    assert code == 0 and "TPOT p50" in out and "3 requests" in out
    lines = [line.split() for line in out.splitlines() if " fp32 " in line]
    assert [line[0] for line in lines] == ["dynamic", "exact", "int4"] * 2
    assert all(line[-1] in ("kB", "MB") for line in lines)


def test_interrupted(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(speed.Lane, "step", interrupt)
    code, out, err = run("bench", "--model", tiny, *FAST, "--no-peak", "--baselines", "", "--json")
    assert code == 130 and is_one_sentence(err)
    data = json.loads(out)
    assert data["interrupted"] and {row["reason"] for row in data["rows"]} == {"interrupted"}


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("--policies", "int5"), "turboquant"),
        (("--baselines", "hqq-5"), "hqq-4"),
        (("--context", "many"), "--context"),
        (("--context", "8"), "--rounds"),
        (("--dtypes", "int4"), "bfloat16"),
        (("--shape", "llama-9"), "llama-3-8b"),
        (("--shape", "llama-3-8b", "--model", "x"), "exclude"),
        (("--layers", "2"), "--shape"),
        (("--csv", "/no/such/folder/x.csv"), "folder that exists"),
        (("--figure", "x.gif"), ".png"),
        (("--throughput",), "--kv-budget"),
        (("--throughput", "--kv-budget", "1GB", "--figure", "x.png"), "leave it out"),
        (("--throughput", "--kv-budget", "much"), "500MB"),
        (("--kv-budget", "1GB"), "--throughput"),
        (("--model", "/no/such/folder"), "/no/such/folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_one_sentence(run: Run, args: tuple[str, ...], word: str) -> None:
    code, out, err = run("bench", "--json", *args)
    assert (code, out) == (2, "")
    assert is_one_sentence(err) and word in err


def test_sizes() -> None:
    assert [bytes_of(text) for text in ("1GB", "1.5 MB", "2KiB")] == [10**9, 1_500_000, 2048]
    for text in ("1", "GB", "-1GB", "0MB", "1.2.3GB"):
        with pytest.raises(InputError):
            bytes_of(text)


def test_help(run: Run) -> None:
    code, out, err = run("bench", "--help")
    assert (code, err) == (0, "")
    assert "--throughput" in out and "Usage: kvquant bench" in out
