"""``compare`` on tiny random models: every number is there, nothing wrong is timed, nothing is silent."""

import csv
import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import prompt, tiny_llama

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.benchmark import Subject, compare, in_memory
from kvquant_hf.benchmark import compare as compare_function
from kvquant_hf.benchmark import contenders as table
from kvquant_hf.benchmark.contenders import Dimensions, choose, expected_bytes
from kvquant_hf.benchmark.speed.apart import Job, Peak, measure_apart
from kvquant_hf.benchmark.speed.race import CHECKED, Lane, race
from kvquant_hf.benchmark.speed.rows import Row
from kvquant_hf.errors import BenchmarkError, BenchmarkInputError, UnknownPolicyError
from kvquant_hf.policies.table import POLICIES, parse_policy
from kvquant_hf.transformers_api.names import with_cache

FAST = {"contexts": (48, 90), "rounds": 4, "prefill_chunk": 32, "peak": False}
module: Any = sys.modules[compare_function.__module__]


def quick(model: Any = None, **options: Any) -> Any:
    return compare(in_memory(model or tiny_llama(), prompt(length=200)), **FAST | options)


def lanes(model: Any, *names: str, context: int = 90) -> list[Lane]:
    chosen = {c.name: c for c in choose(["int8"], ["static"])}
    return [Lane(Row(name, chosen[name].family, "float32", context), chosen[name], model) for name in names]


# -- compare -----------------------------------------------------------------------------------------------------------


def test_every_number_is_measured() -> None:
    advanced: list[float] = []
    result = quick(
        policies=["int8", "int4"], baselines=["static"], dtypes=["float32", "bfloat16"],
        advance=lambda what, share: advanced.append(share),
    )  # fmt: skip
    caches = ["dynamic", "static", "exact", "int8", "int4"]
    expected = [(n, c, d) for c in (48, 90) for n in caches for d in ("float32", "bfloat16")]
    assert [(row.cache, row.context, row.dtype) for row in result.rows] == expected
    for row in result.rows:
        assert (row.status, row.reason, row.rounds, row.checked) == ("ok", "", 4, CHECKED)
        assert row.prompt_tokens == row.context - 4 - CHECKED + 1
        assert 0 < row.prefill_s < row.ttft_s
        assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms and row.tokens_per_s == pytest.approx(1e3 / row.p50_ms)
        assert row.top1_agreement == 1.0 or row.cache in ("int8", "int4") or row.dtype == "bfloat16"
        # At 48 tokens no page of 64 is full, and attention is the model's own.
        assert row.implementation == ("cpu" if row.family == "kvquant" and row.context > 64 else "")
        assert row.peak_bytes is None and row.ratio > 0
        if row.cache == "dynamic":
            assert row.ratio_same_dtype == 1.0
    for context in (48, 90):
        fastest = min(("float32", "bfloat16"), key=lambda dtype: result.row("dynamic", context, dtype).p50_ms)
        assert result.row("dynamic", context, fastest).ratio == 1.0
        # 3 layers of 2 x 2 x 32 elements of 4 bytes a token.
        assert result.row("dynamic", context, "float32").stored_bytes == context * 3 * 128 * 4
    assert sum(advanced) == pytest.approx(1)


def test_files_and_pictures(tmp_path: Path) -> None:
    result = quick(policies=["int4"], baselines=["hqq-4"], contexts=(48,))
    result.write_csv(tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["cache"] for row in rows] == [row.cache for row in result.rows]
    assert float(rows[0]["p50_ms"]) == result.rows[0].p50_ms and rows[0]["peak_bytes"] == ""
    assert rows[0]["versions_torch"] == torch.__version__ and rows[0]["machine_threads"] == "1"
    data = result.as_dict()
    assert data["rows"] == [dataclasses.asdict(row) for row in result.rows] and not data["interrupted"]
    pytest.importorskip("matplotlib")
    figure = result.figure()
    assert figure._repr_png_().startswith(b"\x89PNG")
    speed, memory = figure.axes
    assert [len(line.get_xdata()) for line in speed.lines] == [1, 1, 1]  # dynamic, exact, int4; hqq-4 did not run
    assert "held by the cache" in memory.get_ylabel()
    with pytest.raises(BenchmarkInputError, match="name another file"):
        result.write_csv(tmp_path / "no" / "table.csv")


def test_rounds_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    step = Lane.step
    monkeypatch.setattr(Lane, "step", lambda lane: (order.append(lane.row.cache), step(lane)))
    names = ("dynamic", "exact", "int8")
    with torch.inference_mode():
        race(lanes(tiny_llama(), *names), prompt(length=60), rounds=3, chunk=64, timeout=60)
    assert order == [*names, "exact", "int8", "dynamic", "int8", "dynamic", "exact"]


def test_an_exact_that_differs_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that are wrong by a little: before any step is timed."""
    update = QuantizedPagedCache.update

    def wrong(self: Any, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return update(self, keys * 1.5, values, *args, **kwargs)

    monkeypatch.setattr(QuantizedPagedCache, "update", wrong)
    monkeypatch.setattr(Lane, "step", lambda lane: pytest.fail("timed"))
    with pytest.raises(BenchmarkError, match=r"'exact' in float32 at 48 tokens .* run the tests"):
        quick(policies=["int8"], baselines=[])


def test_what_fails_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(table.transformers.StaticCache, "update", broken)
    result = quick(policies=[], baselines=["static", "hqq-4"], contexts=(48,))
    assert [(row.cache, row.status) for row in result.rows] == [
        ("dynamic", "ok"), ("static", "failed"), ("hqq-4", "skipped"), ("exact", "ok")
    ]  # fmt: skip
    assert result.rows[1].reason == "RuntimeError: no such kernel"
    assert "static: failed: RuntimeError: no such kernel" in result.table().notes


def test_a_lossless_cache_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    update = table.transformers.StaticCache.update
    monkeypatch.setattr(
        table.transformers.StaticCache, "update", lambda self, k, v, *rest, **more: update(self, -k, v, *rest, **more)
    )
    result = quick(policies=[], baselines=["static"], contexts=(48,))
    row = result.row("static", 48)
    assert row.status == "failed" and "other tokens than DynamicCache" in row.reason and row.p50_ms is None


def test_skips_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(max_position_embeddings=64)
    result = quick(model, policies=[], baselines=[])
    assert {row.reason for row in result.rows if row.context == 90} == {"the model takes 64 tokens"}
    assert all(row.status == "ok" for row in result.rows if row.context == 48)
    monkeypatch.setattr(module, "available_memory", lambda device: 450_000)
    result = quick(policies=["int4"], baselines=[], contexts=(90,))
    assert all(row.status == "skipped" and "are left beside the others" in row.reason for row in result.rows)


def test_a_slow_prompt_is_given_up() -> None:
    running = lanes(tiny_llama(), "dynamic", "exact")
    with torch.inference_mode():
        race(running, prompt(length=60), rounds=3, chunk=64, timeout=0)
    assert [lane.row.reason for lane in running] == ["reading the prompt took more than the 0 s of --timeout"] * 2


@pytest.mark.parametrize("moment", [3, 13])
def test_an_interruption_leaves_what_was_measured(moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of two caches: after the third step (the second round) and in the second context."""
    steps = 0
    step = Lane.step

    def interrupted(lane: Lane) -> None:
        nonlocal steps
        steps += 1
        if steps == moment:
            raise KeyboardInterrupt
        step(lane)

    monkeypatch.setattr(Lane, "step", interrupted)
    result = quick(policies=[], baselines=[], contexts=(48, 60, 90))
    assert result.interrupted and len(result.rows) == 6
    rounds = [row.rounds for row in result.rows]
    assert rounds == ([1, 1, None, None, None, None] if moment == 3 else [4, 4, 2, 2, None, None])
    assert [row.reason for row in result.rows] == ["" if n else "interrupted" for n in rounds]


def test_wrong_input() -> None:
    for options, error in (
        ({"policies": ["int5"]}, UnknownPolicyError),
        ({"policies": ["auto:3.5"]}, BenchmarkInputError),
        ({"baselines": ["hqq-5"]}, BenchmarkInputError),
        ({"contexts": (8,)}, BenchmarkInputError),
        ({"contexts": ()}, BenchmarkInputError),
        ({"dtypes": ["int4"]}, BenchmarkInputError),
        ({"rounds": 0}, BenchmarkInputError),
    ):
        with pytest.raises(error):
            quick(**options)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_policy_and_a_cache_of_the_same_name() -> None:
    names = [contender.name for contender in choose(["fp8", "int4"], ["fp8"])]
    assert names == ["dynamic", "fp8", "exact", "fp8/fp8", "int4"]
    assert parse_policy("fp8/fp8") == POLICIES["fp8"]


@pytest.mark.parametrize("name", ["dynamic", "static", "fp8", "exact", "int8", "int4", "turboquant"])
def test_what_is_reckoned_bounds_what_is_held(name: str) -> None:
    """And is not much more than that, or batches would be smaller than the budget allows."""
    model = tiny_llama(num_hidden_layers=2)
    contender = {c.name: c for c in choose(["int8", "int4", "turboquant"], ["static", "fp8"])}[name]
    if contender.missing:
        pytest.skip(contender.missing)
    for batch, tokens in ((1, 700), (3, 129)):
        cache = contender.make(model, tokens)
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(prompt(batch=batch, length=tokens - 1), **with_cache(cache))
            model(prompt(batch=batch, length=1), **with_cache(cache))
        held = contender.held(cache)
        reckoned = expected_bytes(name, Dimensions.of(model.config), tokens, torch.float32, batch)
        assert held <= reckoned + 64 < 1.6 * held + 20_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says what a process has")
def test_peak_memory_of_a_process() -> None:
    """A new process, which gets a model in memory by way of a folder; and one that cannot load its model."""
    with in_memory(tiny_llama(num_hidden_layers=2)).load_apart() as load:
        job = Job(load, "float32", "int4", True, prompt(length=200)[0].tolist(), 210, 64, 1, 60.0)
        peak = measure_apart(job)
    assert (
        peak.how in ("high-water mark", "sampled") and 0 <= peak.peak_bytes < 1 << 30 and peak.cuda_peak_bytes is None
    )
    assert "another process" in measure_apart(job._replace(load=lambda dtype: None)).how


def tiny_in(dtype: str) -> Any:
    return tiny_llama().to(getattr(torch, dtype))


def test_peaks_are_asked_for_each_row_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []

    def fake(job: Job) -> Peak:
        jobs.append(job)
        return Peak(None, "killed") if job.cache == "exact" else Peak(1000 * job.context, "sampled")

    monkeypatch.setattr(module, "measure_apart", fake)
    subject = Subject("a model", tiny_in, prompt(length=200)[0].tolist())
    result = compare(subject, **FAST | {"peak": True}, policies=["int4"], baselines=["hqq-4"], dtypes=["float32"])
    assert [(job.cache, job.ours, job.context) for job in jobs] == [
        (name, name != "dynamic", context) for context in (48, 90) for name in ("dynamic", "exact", "int4")
    ]
    assert jobs[0].load is tiny_in and len(jobs[0].ids) == result.rows[0].prompt_tokens
    assert result.row("int4", 90).peak_bytes == 90_000 and result.row("exact", 90).peak_how == "killed"
    pytest.importorskip("matplotlib")
    assert "peak" in result.figure().axes[1].get_ylabel()
