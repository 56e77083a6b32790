"""Requests and batches: pure functions, nothing is timed."""

import itertools
import json
import math
import statistics as stdlib
from pathlib import Path

import pytest

from kvquant_hf.benchmark import draw_requests, read_requests
from kvquant_hf.benchmark.serving.batching import Batch, Served, fill_batches, served
from kvquant_hf.benchmark.serving.rows import ServingRow, ratio_to_dynamic, summarize_answers
from kvquant_hf.benchmark.serving.workload import OUTPUT_MEAN, PROMPT_MEAN, Request
from kvquant_hf.errors import BenchmarkInputError

# -- workload ----------------------------------------------------------------------------------------------------------


def test_drawn_lengths_have_the_means_of_sharegpt() -> None:
    drawn = draw_requests(20000, max_prompt=10**6, max_output=10**6)
    for mean, lengths in (
        (PROMPT_MEAN, [request.prompt_tokens for request in drawn]),
        (OUTPUT_MEAN, [request.output_tokens for request in drawn]),
    ):
        error = stdlib.stdev(lengths) / math.sqrt(len(lengths))
        assert abs(stdlib.mean(lengths) - mean) < 4 * error + 0.5
    assert drawn[:50] == draw_requests(50, max_prompt=10**6, max_output=10**6) != draw_requests(50, seed=1)
    short = draw_requests(99, max_prompt=64, max_output=32)
    assert all(4 <= r.prompt_tokens <= 64 and 2 <= r.output_tokens <= 32 for r in short)
    with pytest.raises(BenchmarkInputError, match="--max-output 2"):
        draw_requests(3, max_output=1)


class Words:
    """A tokenizer whose tokens are words."""

    def __call__(self, text: str, add_special_tokens: bool) -> "Words":
        self.input_ids = text.split()
        return self


def test_lengths_from_files(tmp_path: Path) -> None:
    lines = tmp_path / "lengths.jsonl"
    lines.write_text('{"prompt_tokens": 5, "output_tokens": 9}\n\n{"prompt_tokens": 500, "output_tokens": 1}\n')
    assert read_requests(str(lines), 9, max_prompt=100) == [(5, 9), (100, 2)]
    assert read_requests(str(lines), 1) == [(5, 9)]
    texts = (("a b c", "d e", "f"), ("x",))
    chats = [{"conversations": [{"value": text} for text in turns]} for turns in texts]
    sharegpt = tmp_path / "sharegpt.json"
    sharegpt.write_text(json.dumps(chats))
    assert read_requests(str(sharegpt), 9, Words()) == [(3, 2)]
    empty, wrong = tmp_path / "empty", tmp_path / "wrong"
    empty.write_text("[]")
    wrong.write_text('{"prompt": 5}')
    for file, word in ((empty, "no request"), (wrong, "KeyError"), (tmp_path / "none", "No such file")):
        with pytest.raises(BenchmarkInputError, match=word):
            read_requests(str(file), 9, Words())
    with pytest.raises(BenchmarkInputError, match="no tokenizer"):
        read_requests(str(sharegpt), 9)


# -- batches -----------------------------------------------------------------------------------------------------------


def test_no_request_is_lost_and_the_budget_is_kept() -> None:
    requests = draw_requests(200, max_prompt=300, max_output=300)

    def cost(batch: int, tokens: int) -> int:
        return batch * tokens * 10

    for budget, most in ((20_000, None), (20_000, 4), (None, 8), (3_000, None)):
        batches, refused = fill_batches(requests, cost, budget, most)
        places = [place for batch in batches for place in batch.places]
        assert sorted(places + refused) == list(range(200)) and places == sorted(places)
        for batch in batches:
            assert budget is None or cost(len(batch.requests), batch.tokens) <= budget
            assert most is None or len(batch.requests) <= most
            assert batch.requests == tuple(requests[i] for i in batch.places)
        alone = [i for i, r in enumerate(requests) if budget and cost(1, sum(r) - 1) > budget]
        assert refused == alone
        for batch, following in itertools.pairwise(batches):  # as full as can be
            more = Batch((), (*batch.requests, following.requests[0]))
            gap = any(batch.places[-1] < i < following.places[0] for i in refused)
            full = most is not None and len(batch.requests) == most
            assert gap or full or (budget and cost(len(more.requests), more.tokens) > budget)


def test_accounting_of_known_times() -> None:
    batch = Batch((4, 7), (Request(10, 2), Request(30, 4)))
    assert (batch.prompt_tokens, batch.output_tokens, batch.tokens) == (30, 4, 33)
    first, second = served(batch, 5.0, [1.0, 1.5, 2.5, 4.0])
    assert first == Served(4, 5.0, (1.0, 1.5)) and first.tpot_s == 0.5
    assert second.itl_s == [0.5, 1.0, 1.5] and second.tpot_s == 1.0
    row = ServingRow("int4", "kvquant", "bfloat16", None, seconds=9.0)
    summarize_answers(row, [first, second])
    assert (row.requests, row.output_tokens) == (2, 6)
    assert (row.requests_per_s, row.tokens_per_s) == (2 / 9, 6 / 9)
    assert row.ttft == {"p50": 1.0, "p90": 1.0, "p99": 1.0} and row.ttft_queued["p50"] == 6.0
    assert row.itl["p50"] == 0.75  # of 0.5, 0.5, 1.0, 1.5
    dynamic = ServingRow("dynamic", "transformers", "bfloat16", None, requests=2, tokens_per_s=1 / 3)
    assert ratio_to_dynamic(row, [dynamic, row], "bfloat16") == 2.0
    dynamic.requests = 1  # another mix
    assert ratio_to_dynamic(row, [dynamic, row], "bfloat16") is None
