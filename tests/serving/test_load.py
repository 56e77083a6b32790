"""200 requests, 32 at once: no wrong answer, no leaked page, the right statuses, and the server lives."""

import asyncio
from typing import Any

import pytest
from serving.load import Crowd, crowd
from serving.servers import NAME, Served, alone, serving, tiny_model, wait_until

# Of 200: 40 go away, 10 ask for seven answers, 10 are too long.
STATUSES = {"left": 40, "400": 20, "answered": 140}
TOKENS = 24


def settled(served: Served) -> None:
    """Nothing runs, waits, or has pages."""

    def none() -> bool:
        report = served.app.report()
        return not any((report["requests"]["running"], report["requests"]["waiting"], report["cache"]["used_blocks"]))

    wait_until(none)
    report = served.app.report()
    assert report["cache"]["free_blocks"] + report["cache"]["cached_blocks"] == report["cache"]["blocks"]
    assert report["requests"]["failed"] == 0


@pytest.mark.parametrize(("policy", "prefill"), [("exact", "exact"), ("int4", "quantized")])
def test_a_crowd(policy: str, prefill: str) -> None:
    """Greedy answers are those of ``generate`` alone; those of one seed are one answer, whatever ran beside them."""
    questions = [f"{i} question {'and ' * (i * 2)}?" for i in range(12)]
    options: dict[str, Any] = {"policy": policy, "prefill": prefill, "kv_budget": 1_500_000, "max_concurrent": 8}
    with serving(**options) as served:
        found: Crowd = asyncio.run(crowd(served.url, NAME, questions, TOKENS, "x" * 600))
        assert found.statuses == STATUSES
        other = tiny_model()
        for question, texts in found.greedy.items():
            assert texts == {alone(other, served.tokenizer, question, TOKENS, policy, prefill=prefill)}, question
        for seed, texts in found.drawn.items():
            asked = {text.partition("\n")[0] for text in texts}
            assert len(texts) == len(asked), f"seed {seed} has several answers to one question"
        settled(served)
        left = served.app.report()["requests"]
        assert (left["finished"], left["refused"]) == (140, 20)
        assert 20 < left["cancelled"] <= 40  # some go away before they have come
