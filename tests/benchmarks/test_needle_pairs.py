"""Needles in pairs, with a tiny model that finds none and with cells that are made up."""

import csv
from pathlib import Path

import needle_pairs
import pytest
from command import byte_tokenizer
from models import tiny_llama

from kvquant_hf.evaluation.needle import Cell


def cell(found: bool, nats: float) -> Cell:
    return Cell(1024, 0.0, "12345", found, nats)


def test_what_a_row_says() -> None:
    exact = [cell(True, 0.1), cell(True, 0.2), cell(False, 0.9), cell(True, 0.1)]
    other = [cell(False, 0.5), cell(False, 0.4), cell(True, 0.7), cell(True, 0.1)]
    found = needle_pairs.row("kv3", exact, other)
    assert (found["found"], found["lost"], found["gained"], found["p"]) == (2, 2, 1, 1.0)
    assert found["difference"] == pytest.approx(0.1) and found["mean_size"] == pytest.approx(0.2)
    shown = "| `kv3` | 2 of 4 | 2 | 1 | 1.00 | 0.425 | +0.100 ± 0.129 | 0.200 |"
    assert needle_pairs.line(found) == shown


def test_haystacks_differ_and_caches_read_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(chr(97 + i * i % 23) for i in range(2 * needle_pairs.STEP))
    prompts = needle_pairs.haystacks(byte_tokenizer(), text, 300, 2)
    assert len(prompts) == 10 and len({tuple(prompt.ids) for prompt in prompts}) == 10
    assert {prompt.depth for prompt in prompts} == set(needle_pairs.DEPTHS)
    out = tmp_path / "pairs.csv"
    conditions = dict.fromkeys(needle_pairs.CONDITIONS, "here")
    needle_pairs.measure(tiny_llama(vocab_size=257), prompts, ["int8", "int4-token", "int8"], 5, out, conditions)
    rows = list(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))
    assert [row["cache"] for row in rows] == ["exact", "int8", "int4-token"]
    assert float(rows[0]["mean_size"]) == 0 < float(rows[1]["mean_size"]) < float(rows[2]["mean_size"])
    assert conditions.items() <= rows[0].items()
    assert len(capsys.readouterr().out.splitlines()) == 5
