"""Statistics, the check, planning, the machine and tables: pure functions, nothing is timed."""

import json
from pathlib import Path

import pytest
import torch

from kvquant_hf.benchmark.csv_file import flat
from kvquant_hf.benchmark.machine import PeakWatch, available_memory, kilobytes
from kvquant_hf.benchmark.pictures import check_figure
from kvquant_hf.benchmark.plan import crowded_out, known_dtypes, numbers_of, out_of_reach, prompt_tokens
from kvquant_hf.benchmark.shapes import SHAPES, affordable_vocabulary, random_model
from kvquant_hf.benchmark.speed.apart import read_answer
from kvquant_hf.benchmark.speed.check import TIE_EPSILONS, judge
from kvquant_hf.benchmark.speed.figure import faster_dtypes
from kvquant_hf.benchmark.speed.results import Comparison
from kvquant_hf.benchmark.speed.rows import Row
from kvquant_hf.benchmark.statistics import interleaved, paired_ratio, percentiles, quantile, summarize
from kvquant_hf.benchmark.status import SKIPPED
from kvquant_hf.benchmark.subject import shape
from kvquant_hf.errors import BenchmarkInputError

CPU = torch.device("cpu")


# -- statistics --------------------------------------------------------------------------------------------------------


def test_quantiles_of_known_samples() -> None:
    assert summarize([5.0, 1.0, 4.0, 2.0, 3.0]) == (5, pytest.approx(1.8), 3.0, pytest.approx(4.2))
    assert quantile([1.0, 3.0], 0.25) == 1.5
    assert percentiles(list(range(101))) == {"p50": 50, "p90": 90, "p99": 99}
    assert percentiles([]) is None
    with pytest.raises(ValueError, match="no samples"):
        quantile([], 0.5)


def test_ratios_are_of_the_same_round() -> None:
    """A slow moment of the machine hits a round, not a cache; medians of their own would give 4 here."""
    assert paired_ratio([2.0, 20.0, 2.0, 40.0], [1.0, 10.0, 1.0, 20.0]) == 2.0
    assert paired_ratio([2.0, 8.0, 8.0], [1.0]) == 2.0  # rounds that only one of them finished
    assert paired_ratio([], [1.0]) is None


def test_every_contender_once_a_round_and_first_in_turn() -> None:
    turns = list(interleaved(3, 4))
    assert [k for _, k in turns] == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]
    assert all(sorted(k for i, k in turns if i == turn) == [0, 1, 2] for turn in range(4))


# -- the check ---------------------------------------------------------------------------------------------------------


def test_choices_are_compared_and_near_ties_forgiven() -> None:
    reference = torch.randn(4, 50)
    same = judge(reference, reference + 5)  # another constant, the same choices
    assert same == (1.0, 0.0, True) and same.lossless(torch.float32)
    other = reference.clone()
    top, second = reference[2].topk(2).indices
    reference[2, second] = reference[2, top] - 1e-7
    other[2, second] = reference[2, top] + 1
    tie = judge(reference, other)
    assert tie.agreement == 0.75 and 0 < tie.gap < TIE_EPSILONS * torch.finfo(torch.float32).eps
    assert tie.lossless(torch.float32)
    wrong = judge(reference, reference.roll(1, dims=-1))
    assert not wrong.lossless(torch.float32) and not wrong.lossless(torch.bfloat16)
    other[0, 0] = float("nan")
    assert not judge(reference, other).lossless(torch.bfloat16)


# -- planning ----------------------------------------------------------------------------------------------------------


def test_the_prompt_leaves_room_for_the_steps() -> None:
    assert prompt_tokens(1024, 9, 24) == 1024 - 8 - 24
    with pytest.raises(BenchmarkInputError, match="--context 33 or more"):
        prompt_tokens(32, 9, 24)


def test_what_is_out_of_reach_says_why() -> None:
    assert out_of_reach(8192, 8192, 8192) == ""
    assert out_of_reach(8193, 8192, 9000) == "the model takes 8,192 tokens"
    assert out_of_reach(9001, None, 9000) == "the text has 9,000 tokens"


def test_what_does_not_fit_beside_the_others() -> None:
    needs = {"dynamic": 500, "static": 500, "int8": 100}
    refused = crowded_out(needs, working=200, available=1000)
    assert refused == {"static": "needs 500 B of memory, 200 B are left beside the others"}
    assert crowded_out(needs, working=200, available=None) == {}
    assert set(crowded_out(needs, working=2000, available=1000)) == set(needs)


def test_numbers_of_an_option() -> None:
    assert numbers_of("1k, 512,32K", "--context") == [1024, 512, 32768]
    for text in ("", "1m", "0", "-5", "1.5k"):
        with pytest.raises(BenchmarkInputError, match="--context"):
            numbers_of(text, "--context")
    assert known_dtypes(["bfloat16", "float32", "bfloat16"]) == ("bfloat16", "float32")
    for names in (["int4"], []):
        with pytest.raises(BenchmarkInputError, match="float16"):
            known_dtypes(names)


def test_a_vocabulary_is_cut_only_where_memory_demands() -> None:
    llama = SHAPES["llama-3-8b"]
    assert affordable_vocabulary(llama, 2, None) == affordable_vocabulary(llama, 2, 100 << 30) == llama.vocab_size
    cut = affordable_vocabulary(llama, 6, 16 << 30)
    assert 2 * cut * llama.hidden_size * 6 <= (16 << 30) / 5 < 2 * 2 * cut * llama.hidden_size * 6
    assert affordable_vocabulary(llama, 6, 1) >= 1024


def test_shapes_are_models() -> None:
    """Every row makes a config; one makes a model, the same each time."""
    for name, known in SHAPES.items():
        assert known.num_attention_heads % known.num_key_value_heads == 0, name
    changes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32}
    first, second = (random_model("qwen3-8b", "float32", **changes) for _ in range(2))
    ids = torch.arange(5).view(1, 5)
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert first.dtype == torch.float32 and torch.get_default_dtype() == torch.float32
    for wrong in (lambda: shape("llama-9"), lambda: shape("smollm2-135m", layers=31)):
        with pytest.raises(BenchmarkInputError, match="smollm2-135m"):
            wrong()


# -- machine -----------------------------------------------------------------------------------------------------------


def test_memory_of_the_machine() -> None:
    text = "MemTotal:       100 kB\nMemAvailable:        7 kB\n"
    assert kilobytes(text, "MemAvailable") == 7 * 1024
    assert kilobytes(text, "MemAvail") is None
    free = available_memory(CPU)
    assert free is None or free > 1 << 20


@pytest.mark.parametrize("how", ["high-water mark", "sampled"])
def test_the_peak_counts_what_is_gone_again(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux says what a process has")
    if how == "sampled":
        monkeypatch.setattr(Path, "write_text", lambda *args, **kwargs: (_ for _ in ()).throw(PermissionError()))
    with PeakWatch() as watch:
        if watch.how != how:
            pytest.skip("the high-water mark cannot be set back here")
        memory = torch.ones(64 << 20, dtype=torch.uint8)
        for _ in range(5):  # long enough for a look
            memory.add_(1)
        del memory
        assert 60 << 20 < watch.peak() < 120 << 20


def test_what_a_process_answers() -> None:
    peak = {"peak_bytes": 7, "how": "sampled", "cuda_peak_bytes": None}
    assert read_answer(0, json.dumps(peak).encode(), b"noise") == (7, "sampled", None)
    assert read_answer(0, b"?", b"").how == "its process answered nonsense"
    assert "memory" in read_answer(-9, b"", b"").how
    assert read_answer(1, b"", b"Traceback ...\nKeyError: 'x'\n").how == "KeyError: 'x'"


# -- tables ------------------------------------------------------------------------------------------------------------

CONDITIONS = {
    "model": "a model",
    "random_weights": False,
    "rounds": 4,
    "prefill_chunk": 64,
    "checked_positions": 9,
    "dtypes": ["float32"],
    "machine": {"device": "cpu", "threads": 1, "processor": "a processor"},
}


def timed(cache: str, dtype: str, context: int, p50_ms: float, **fields: object) -> Row:
    return Row(cache, "kvquant", dtype, context, p50_ms=p50_ms, tokens_per_s=1e3 / p50_ms, **fields)


def test_nothing_is_dropped_from_the_table() -> None:
    rows = [timed("dynamic", "float32", 64, 5.0), timed("int4", "float32", 64, 10.0, ratio=0.5, peak_how="killed")]
    rows.append(Row("hqq-4", "transformers", "float32", 64, SKIPPED, "hqq is not installed"))
    far = "the model takes 64 tokens"
    rows += [Row(name, "kvquant", "float32", 4096, SKIPPED, far) for name in ("dynamic", "int4")]
    rows.append(Row("hqq-4", "transformers", "float32", 4096, SKIPPED, "hqq is not installed"))
    result = Comparison(CONDITIONS, rows)
    table = result.table()
    assert ("int4", "fp32", "100.0", "0.50") in [line[:4] for line in table.lines]  # a loss stays in
    assert table.headings == ("cache", "dtype", "tok/s", "ratio", "step")  # the others have no number
    assert {len(line) for line in table.lines} == {0, 5}
    assert "hqq-4: skipped: hqq is not installed" in table.notes
    assert "int4 fp32 at 64: no peak: killed" in table.notes
    assert "dynamic fp32 at 4,096, int4 fp32 at 4,096: skipped: the model takes 64 tokens" in table.notes
    assert all(reason in str(result) and reason in result._repr_html_() for reason in ("killed", "64 tokens"))
    columns = {line.count("|") for line in str(result).splitlines() if line.startswith("|")}
    assert columns == {len(table.headings) + 1}
    assert result.row("int4", 64).p50_ms == 10.0
    assert timed("int4", "float32", 64, 1, peak_bytes=7).peak == 7
    assert timed("int4", "float32", 64, 1, peak_bytes=7, cuda_peak_bytes=3).peak == 3
    with pytest.raises(KeyError):
        result.row("int8", 64)


def test_the_figure_takes_the_faster_dtype_at_the_longest_context() -> None:
    rows = [timed("int4", dtype, context, ms) for dtype, context, ms in (("float32", 64, 1), ("bfloat16", 64, 2))]
    rows += [timed("int4", "float32", 128, 4), timed("int4", "bfloat16", 128, 3), timed("dynamic", "float32", 64, 9)]
    assert faster_dtypes(rows) == {"int4": "bfloat16", "dynamic": "float32"}
    with pytest.raises(BenchmarkInputError, match=r"\.png"):
        check_figure("x.gif")


def test_conditions_become_columns() -> None:
    assert flat({"a": {"b": 1, "c": {"d": None}}, "e": [1, 2]}) == {"a_b": 1, "a_c_d": None, "e": "[1, 2]"}
