"""``serve`` on tiny random models: the budget is kept, everyone is answered, and what does not fit is named."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import prompt, tiny_llama

from kvquant_hf.benchmark import Request, draw_requests, in_memory, serve
from kvquant_hf.benchmark.contenders import Contender, choose
from kvquant_hf.benchmark.serving.batching import Batch
from kvquant_hf.benchmark.serving.serve import run_batch
from kvquant_hf.errors import BenchmarkInputError


def serving(requests: list[Request], **options: Any) -> Any:
    subject = in_memory(tiny_llama(num_hidden_layers=2), prompt(length=200))
    return serve(subject, requests, policies=["int4"], dtypes=["float32"], **options)


def test_serving_keeps_the_budget_and_answers_everyone() -> None:
    requests = draw_requests(7, max_prompt=40, max_output=6)
    budget = 700_000
    result = serving(requests, kv_budget=budget)
    for row in result.rows:
        assert (row.status, row.requests, row.refused) == ("ok", 7, 0)
        assert row.stored_bytes <= row.expected_bytes <= budget
        assert row.output_tokens == sum(request.output_tokens for request in requests)
        assert row.tokens_per_s == pytest.approx(row.output_tokens / row.seconds)
        assert 0 < row.ttft["p50"] <= row.ttft_queued["p50"] and row.itl["p50"] <= row.itl["p99"]
    assert result.rows[0].ratio == 1.0 and "int4" in str(result)
    assert result.as_dict()["conditions"]["kv_budget_bytes"] == budget


def test_batch_sizes_and_what_does_not_fit(tmp_path: Path) -> None:
    result = serving([Request(20, 3)] * 3 + [Request(150, 3)], kv_budget=600_000, batch_sizes=[1, 4])
    by_cache = {(row.cache, row.batch_size): row for row in result.rows}
    assert by_cache["dynamic", 1].batches == 4 and by_cache["dynamic", 1].largest_batch == 1
    # 4 sequences of 152 tokens x 2 layers x 128 elements in float32.
    assert (
        by_cache["dynamic", 4].status == "skipped"
        and "need 623 kB, the budget is 600 kB" in by_cache["dynamic", 4].reason
    )
    assert by_cache["int4", 4].largest_batch == 4
    result.write_csv(tmp_path / "serving.csv")
    with open(tmp_path / "serving.csv", newline="", encoding="utf-8") as file:
        assert [row["status"] for row in csv.DictReader(file)] == [row.status for row in result.rows]
    refused = serving([Request(20, 3), Request(150, 3)], kv_budget=100_000)
    assert (refused.rows[0].requests, refused.rows[0].refused) == (1, 1)
    assert any("1 requests do not fit" in note for note in refused.table().notes)


def test_a_batch_writes_what_generate_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding on the left, every answer to the end, one time for each token; the model's own settings come back."""
    model = tiny_llama()
    model.generation_config.eos_token_id = list(range(97))  # it would end at once
    settings = model.generation_config
    written: list[torch.Tensor] = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *args, **kw: written.append(generate(*args, **kw)) or written[0])
    ids = prompt(length=50)[0].tolist()
    dynamic: Contender = choose([], [])[0]
    times, cache = run_batch(model, dynamic, Batch((0, 1), (Request(5, 2), Request(30, 6))), ids)
    assert written[0].shape == (2, 36) and len(times) == 6 and times == sorted(times)
    assert written[0][0, 25:30].tolist() == ids[:5] and cache.get_seq_length() == 35
    assert model.generation_config is settings


def test_serving_needs_a_size_or_a_budget() -> None:
    calls: tuple[Callable[[], Any], ...] = (
        lambda: serving([Request(20, 3)]),
        lambda: serving([Request(199, 30)], kv_budget=10**6),
    )
    for call, word in zip(calls, ("--kv-budget", "--max-prompt"), strict=True):
        with pytest.raises(BenchmarkInputError, match=word):
            call()
