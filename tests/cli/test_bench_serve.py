"""``kvquant bench --serve`` against servers that play the API."""

import csv
import json
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from command import Run, byte_tokenizer, is_one_sentence, save_tiny_model
from fake_server import Played, playing
from transformers import LlamaForCausalLM

from kvquant_hf.batching.hooks import unsupported
from kvquant_hf.benchmark.load import run as running
from kvquant_hf.benchmark.load import servers
from kvquant_hf.cli import bench_servers
from kvquant_hf.cli.sizes import times_of
from kvquant_hf.cli.terminal import InputError

FAKE = str(Path(__file__).parents[1] / "fake_server.py")
FEW = ("--requests", "3", "--max-prompt", "40", "--max-output", "4", "--rounds", "2")


def test_running_servers(run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was played is in the table, the files and the figure."""
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "140")
    table, picture = tmp_path / "table.csv", tmp_path / "figure.svg"
    slow = Played(first=0.05, gap=0.02)
    fast = Played(report={"most_used_blocks": 5, "cache": {"blocks": 7}})
    with playing(slow) as a, playing(fast) as b:
        options = ("--url", f"slow={a}", "--url", f"exact={b}/", "--csv", table, "--figure", picture)
        code, out, err = run("bench", "--serve", "--model", tiny, *FEW, *options, "--json")
    data = json.loads(out)
    assert (code, err) == (0, "")
    rows = {row["server"]: row for row in data["rows"]}
    assert list(rows) == ["slow", "exact"] and data["conditions"]["urls"] == [a, b]
    for row in rows.values():
        assert (row["rounds"], row["requests"], row["refused"], row["failed"]) == (2, 6, 0, 0)
        assert row["output_tokens"] == 12 and row["prompt_tokens"] == data["conditions"]["prompt_tokens"]
        assert row["same_answers"] == 12 and 1 <= row["most_at_once"] <= 3
    assert rows["slow"]["ratio"] == 1.0 and rows["slow"]["most_used_blocks"] is None
    quotients = [
        mine / its for mine, its in zip(*(rows[n]["round_tokens_per_s"] for n in ("exact", "slow")), strict=True)
    ]
    assert rows["exact"]["ratio"] == pytest.approx(statistics.median(quotients))
    assert rows["exact"]["ratio_to_exact"] == 1.0
    assert rows["slow"]["ttft"]["p50"] >= 0.05 and rows["slow"]["seconds"] >= 0.05 + 3 * 0.02
    assert (rows["exact"]["most_used_blocks"], rows["exact"]["blocks"]) == (5, 7)
    with open(table, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["server"] for line in lines] == list(rows) and lines[0]["rate_per_s"] == ""
    assert float(lines[1]["ttft_p99"]) == rows["exact"]["ttft"]["p99"]
    assert "lower is better" in picture.read_text(encoding="utf-8")


def test_servers_that_are_started(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are told the same budget; one that answers wrongly has no number."""
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(bench_servers, "import_serving", lambda: None)
    told: list[tuple[str, ...]] = []
    played = {"stock": {}, "exact": {"text": "b "}, "int4": {"missing": 0}, "int8": {"missing": 1}}
    command = servers._command

    def fake(*words: object) -> tuple[str, ...]:
        told.append(command(*words))
        name = told[-1][told[-1].index("--policy") + 1] if "--policy" in told[-1] else "stock"
        return (sys.executable, FAKE, json.dumps(played[name]))

    monkeypatch.setattr(servers, "_command", fake)
    options = ("--policies", "int8,int4", "--dtypes", "float32", "--kv-budget", "3x", "--stock-page-size", "16")
    code, out, err = run("bench", "--serve", "--model", tiny, *FEW, *options, "--rate", "100", "--concurrency", "2")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if " ms " in line] == ["stock", "int4"]
    assert "exact failed: 12 of 12 greedy answers differ from those of stock" in " ".join(out.split())
    assert "int8 failed: an answer has 3 tokens instead of 4" in " ".join(out.split())
    assert "starting the server stock ..." in err and "int4: load 2 of 2 ..." in err
    assert "requests come 100 a second, as a Poisson process, at most 2 connections" in out
    blocks = int(told[0][told[0].index("--cb-num-blocks") + 1])
    budgets = {words[words.index("--kv-budget") + 1] for words in told[1:]}
    assert budgets == {f"{blocks * 16 * 2 * 2 * 2 * 16 * 4 / 1e3:.3f}kB"}, "2 layers and heads, 16 x 4 bytes, k and v"
    for words in told:
        assert str(tiny) in words and words[words.index("--dtype") + 1] == "float32" and "256" in words


def test_an_interrupted_load(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drive = running.drive

    def interrupt(target, *args, **options):  # type: ignore[no-untyped-def]
        if target.name == "second":
            raise KeyboardInterrupt
        return drive(target, *args, **options)

    monkeypatch.setattr(running, "drive", interrupt)
    with ExitStack() as stack:
        urls = [f"{name}={stack.enter_context(playing(Played()))}" for name in ("first", "second")]
        options = ("--url", urls[0], "--url", urls[1], "--json")
        code, out, err = run("bench", "--serve", "--model", tiny, *FEW, *options)
    assert code == 130 and is_one_sentence(err)
    data = json.loads(out)
    assert data["interrupted"] and [row["status"] for row in data["rows"]] == ["ok", "skipped"]
    assert data["rows"][0]["rounds"] == 1


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("--serve", "--throughput"), "--throughput does not go with --serve"),
        (("--serve", "--shape", "llama-3-8b"), "--shape does not go"),
        (("--serve", "--dtypes", "float32,bfloat16"), "one dtype"),
        (("--serve", "--kv-budget", "much"), "500MB"),
        (("--serve", "--kv-budget", "0x"), "8x"),
        (("--serve", *FEW, "--kv-budget", "1kB"), "larger --kv-budget"),
        (("--serve", "--max-prompt", "2000"), "takes 1024 tokens"),
        (("--serve", "--url", "mine"), "--url mine=http"),
        (("--serve", "--url", "a=http://x", "--url", "a=http://y"), "a name of its own"),
        (("--serve", *FEW, "--url", "a=http://127.0.0.1:9"), "/v1/models"),
        (("--serve", "--url", "a=http://x", "--kv-budget", "8x"), "leave it out with --url"),
        (("--serve", "--requests-file", "/no/such.csv"), "/no/such.csv"),
        (("--rate", "3"), "--rate goes with --serve"),
        (("--stock-page-size", "64"), "--stock-page-size goes with --serve"),
        (("--throughput", "--kv-budget", "8x"), "500MB"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_one_sentence(
    run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], word: str
) -> None:
    monkeypatch.setattr(bench_servers, "import_serving", lambda: None)
    model = () if "--shape" in args else ("--model", tiny)
    code, out, err = run("bench", "--json", *model, *args)
    assert (code, out) == (2, "")
    assert is_one_sentence(err) and word in err


def test_times() -> None:
    assert [times_of(text) for text in ("8x", "1.5 X", "1GB")] == [8.0, 1.5, None]
    for text in ("x", "0x", "-1x", "1.2.3x"):
        with pytest.raises(InputError):
            times_of(text)


@pytest.mark.slow
def test_real_servers(run: Run, tmp_path: Path) -> None:
    """transformers' server and ours, in float32, in which ``exact`` must write the same; no token is missing."""
    pytest.importorskip("prometheus_client")
    if unsupported():
        pytest.skip(unsupported())
    folder = save_tiny_model(tmp_path / "tiny")
    model = LlamaForCausalLM.from_pretrained(folder)
    tokens = byte_tokenizer().convert_ids_to_tokens(range(model.config.vocab_size))
    with torch.no_grad():  # every token is a letter, so that each has a text
        model.lm_head.weight[[i for i, token in enumerate(tokens) if not (token.isascii() and token.isalpha())]] = 0
    model.save_pretrained(folder)
    sizes = ("--max-prompt", "150", "--max-output", "12", "--kv-budget", "3x", "--stock-page-size", "64")
    options = ("--policies", "exact,int4", "--dtypes", "float32", "--requests", "8", "--rounds", "1", "--json")
    code, out, _ = run("bench", "--serve", "--model", folder, *sizes, *options)
    data = json.loads(out)
    assert code == 0
    stock, exact, int4 = data["rows"]
    for row in data["rows"]:
        assert (row["status"], row["requests"], row["refused"], row["failed"]) == ("ok", 8, 0, 0)
        assert row["output_tokens"] == data["conditions"]["output_tokens"]
        assert row["prompt_tokens"] == data["conditions"]["prompt_tokens"]
        assert row["ttft"]["p50"] > 0 and row["ratio"] > 0
    assert stock["same_answers"] == exact["same_answers"] == 12
    assert stock["blocks"] is None and 0 < exact["most_used_blocks"] <= exact["blocks"] < int4["blocks"]
