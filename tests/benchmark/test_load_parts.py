"""What a load is made of: lengths, prompts of exactly so many tokens, one budget for all, and processes."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from command import byte_tokenizer
from models import tiny_llama
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import cache as stock_cache

from kvquant_hf.benchmark import Request, sharegpt_requests
from kvquant_hf.benchmark.load import sizing
from kvquant_hf.benchmark.load.prompts import exact_prompts
from kvquant_hf.benchmark.load.servers import Launch, our_server, report_of, started, stock_server, target_at
from kvquant_hf.benchmark.serving.workload import SHAREGPT_LENGTHS, read_requests
from kvquant_hf.cli.sizes import bytes_of
from kvquant_hf.errors import BenchmarkError, BenchmarkInputError

FAKE = str(Path(__file__).parents[1] / "fake_server.py")


# -- lengths and prompts -----------------------------------------------------------------------------------------------


def test_the_sample_of_sharegpt() -> None:
    rows = sharegpt_requests(300, max_prompt=10**6, max_output=10**6)
    assert len(rows) == 300 and rows[256:] == rows[:44] and rows[0] == (169, 351)
    assert SHAREGPT_LENGTHS.read_text(encoding="utf-8").count("\n") == 257
    cut = sharegpt_requests(256, max_prompt=64, max_output=32)
    assert cut == [(min(64, prompt), min(32, output)) for prompt, output in rows[:256]]


def test_lengths_from_columns(tmp_path: Path) -> None:
    file = tmp_path / "lengths.csv"
    file.write_text("prompt_tokens,answer_tokens\n5,9\n500,1\n", encoding="utf-8")
    assert read_requests(str(file), 9, max_prompt=100) == [(5, 9), (100, 2)]
    assert read_requests(str(file), 1) == [(5, 9)]
    file.write_text("a,b,c\n1,2,3\n", encoding="utf-8")
    with pytest.raises(BenchmarkInputError, match="two columns of CSV"):
        read_requests(str(file), 9)


class Merging:
    """A tokenizer of bytes in which two blanks that follow each other are one token, after a special one."""

    def __call__(self, text: str) -> "Merging":
        self.input_ids = ["<s>", *text.replace("  ", "_")]
        return self

    @staticmethod
    def decode(ids: list[str]) -> str:
        return "".join(ids)


def test_prompts_have_exactly_so_many_tokens() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("".join(chr(97 + i % 26) for i in range(3000))).input_ids
    lengths = [1, 7, 100, 100, 2000]
    texts = exact_prompts(tokenizer, ids, lengths, seed=0)
    assert [len(tokenizer(text).input_ids) for text in texts] == lengths
    assert texts == exact_prompts(tokenizer, ids, lengths, seed=0) != exact_prompts(tokenizer, ids, lengths, seed=1)
    generator = random.Random(0)
    blanks = [generator.choice("ab ") for _ in range(5000)]
    texts = exact_prompts(Merging(), blanks, [4, 9, 9, 9], seed=0)
    assert [len(Merging()(text).input_ids) for text in texts] == [4, 9, 9, 9]
    assert len(set(texts[1:])) == 3, "each begins in another place"
    with pytest.raises(BenchmarkInputError, match="--max-prompt"):
        exact_prompts(tokenizer, ids[:50], [51], seed=0)
    with pytest.raises(BenchmarkInputError, match="exactly 5 tokens"):
        exact_prompts(Merging(), [" "] * 5000, [5], seed=0)


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_transformers_blocks_take_the_bytes_that_are_reckoned() -> None:
    """Against the memory that transformers' own cache reserves: the blocks, and the two that it never hands out."""
    model = tiny_llama(num_hidden_layers=2)
    per_token = sizing.dense_bytes_per_token(model.config, torch.float32)
    budget = 5 * 16 * per_token + 7
    blocks = sizing.stock_blocks(budget, per_token, 16)
    assert blocks == 5
    manager = model.init_continuous_batching(
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=blocks, page_size=16, max_batch_tokens=32)
    )
    held: list[stock_cache.PagedAttentionCache] = []
    original = manager._create_batch_processor
    manager._create_batch_processor = lambda *a, **k: held.append(original(*a, **k)) or held[-1]
    manager.start()
    try:
        manager.add_request([1, 2, 3], max_new_tokens=2)
        assert manager.get_result(timeout=60) is not None
        assert held[0].cache.cache_tensor.nbytes == (blocks + 2) * 16 * per_token
    finally:
        manager.stop(block=True)


def test_one_budget_for_all() -> None:
    requests = [Request(100, 50), Request(300, 150)]
    assert sizing.mean_tokens(requests) == 300
    assert sizing.budget_for(8, requests, 10, 256) == 10 * 256 * 10, "2,400 tokens are ten blocks, the last one in part"
    sizing.check_budget(512 * 10, requests, 10, 256)
    with pytest.raises(BenchmarkInputError, match="450 tokens takes 5,120 bytes"):
        sizing.check_budget(511 * 10, requests, 10, 256)
    assert sizing.longest_request([Request(4, 2)]) == 104, "of the check before the load"


def test_requests_that_fit_into_a_budget() -> None:
    config = tiny_llama(num_hidden_layers=2).config
    requests = [Request(100, 29)] * 99  # two sealed pages and an open one
    open_page = 64 * sizing.dense_bytes_per_token(config, torch.bfloat16)
    fitting = {
        policy: sizing.fitting_requests(32 * open_page, policy, config, torch.bfloat16, requests)
        for policy in ("exact", "int8", "int4", "turboquant")
    }
    assert fitting["exact"] == 10 < fitting["int8"] < fitting["int4"] <= fitting["turboquant"] < 32
    assert sizing.fitting_requests(1, "exact", config, torch.bfloat16, requests) == 1
    assert sizing.fitting_requests(10**9, "int4", config, torch.bfloat16, requests) == 99


# -- processes ---------------------------------------------------------------------------------------------------------


def test_command_lines() -> None:
    _, stock, model = stock_server("m", dtype="bfloat16", blocks=9, page_size=256, max_batch_tokens=128)
    assert model == "m"
    assert stock[0] == sys.executable and stock[-2:] == ("--port", "0")
    assert " ".join(stock).count("serve m --dtype bfloat16 --continuous-batching --cb-num-blocks 9 --cb-block-size 256")
    ours = our_server("m", "int4", dtype="float32", budget=123_457, max_batch_tokens=128, max_concurrent=7, queue=99)
    words = list(ours.command)
    assert ours.name == "int4" and words[words.index("--policy") + 1] == "int4"
    assert bytes_of(words[words.index("--kv-budget") + 1]) == 123_457, "to the byte"


def fake(name: str, **played: object) -> Launch:
    return Launch(name, (sys.executable, FAKE, json.dumps(played)))


def test_a_server_is_found_and_stopped() -> None:
    with started(fake("int4", report={"most_used_blocks": 3}), timeout=60) as target:
        assert target.name == "int4" and target.model == "fake"
        assert report_of(target) == {"most_used_blocks": 3}
    assert report_of(target) == {}
    with pytest.raises(BenchmarkInputError, match="does not name its model"):
        target_at("int4", target.url)


def test_a_server_that_does_not_start() -> None:
    ended = Launch("int4", (sys.executable, "-c", "raise SystemExit('no such model')"))
    with (
        pytest.raises(BenchmarkError, match=r"'int4' ended at once \(no such model\).*run it by itself"),
        started(ended, timeout=60),
    ):
        pass
    silent = Launch("int8", (sys.executable, "-c", "import threading; threading.Event().wait()"))
    with pytest.raises(BenchmarkError, match="did not take requests within 0 s"), started(silent, timeout=0.05):
        pass
