"""How many blocks there are, what they cost, and that every one comes back."""

import warnings
from typing import Any

import pytest
import torch
from batching.runs import GREEDY, batched, config_of, one_by_one, prompts_of
from models import prompt, tiny_llama, tiny_windowed
from stores import seeing_no_queries

from kvquant_hf import LayerwisePolicy
from kvquant_hf.batching.allocator import GIVEN_BACK
from kvquant_hf.batching.cache import QuantizedBatchingCache
from kvquant_hf.batching.sizing import PageMemory
from kvquant_hf.calibration import collect, compute
from kvquant_hf.errors import BatchingError, KVQuantRangeWarning, OutOfPages, QParamsError, WrongModelError
from kvquant_hf.policies.table import POLICIES

BUDGET = 8_000_000


def started(model: Any, config: Any) -> Any:
    """A manager that has made its cache and computed nothing."""
    manager = model.init_continuous_batching(GREEDY, config)
    manager.warmup()
    return manager


def head_dim_128() -> Any:
    return tiny_llama(head_dim=128, num_attention_heads=2, num_key_value_heads=1).to(torch.bfloat16)


@pytest.mark.parametrize(("policy", "least"), [("exact", 1), ("int8", 1.85), ("int4", 3.5), ("turboquant", 4.4)])
def test_blocks_in_the_memory_of_dense_ones(policy: str, least: float) -> None:
    """Of bf16 at head_dim 128; open pages are in the budget and not in the ratio."""
    manager = started(head_dim_128(), config_of(policy, num_blocks=400, max_requests=5))
    report, cache = manager.report(), manager.batch_processor.cache
    dense = 400 * report.dense_bytes_per_block
    assert report.dense_bytes_per_block == 3 * 64 * 2 * 128 * 2  # layers, tokens, keys and values, head_dim, bytes
    assert report.open_page_bytes == 5 * report.dense_bytes_per_block
    assert report.ratio >= least
    assert dense - 2 * report.bytes_per_block < report.blocks * report.bytes_per_block + report.open_page_bytes <= dense
    assert cache.cache_tensor.nbytes + report.open_page_bytes <= dense + 2 * report.bytes_per_block


@pytest.mark.parametrize("policy", ["int8", "int4"])
def test_all_bytes_are_in_the_budget(policy: str) -> None:
    report = started(tiny_llama(), config_of(policy, max_bytes=BUDGET)).report()
    assert BUDGET - 3 * report.bytes_per_block < report.bytes <= BUDGET
    assert report.blocks // report.requests in (3, 4), "as many requests of 256 tokens, three pages and an open one"


def test_what_memory_there_is_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PageMemory, "get_available_memory", lambda self: 50_000_000)
    report = started(tiny_llama(), config_of("int4", num_blocks=None, max_batch_tokens=64)).report()
    assert 48_500_000 < report.bytes <= 50_000_000
    assert report.requests == 64  # a step has a token for each


def test_no_room_is_said() -> None:
    model = tiny_llama()
    before = model.config._attn_implementation
    with pytest.raises(OutOfPages, match=r"have no room for a block .* raise num_blocks or max_bytes, or lower"):
        model.generate_batch(prompts_of((5,)), GREEDY, config_of("int4", max_bytes=BUDGET, max_requests=1000))
    assert model.config._attn_implementation == before  # and generate() goes on


@pytest.mark.parametrize("room", [{"num_blocks": 50}, {"max_bytes": BUDGET}, {"num_blocks": None}], ids=str)
def test_a_manager_that_starts_again_has_as_many_blocks(room: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PageMemory, "get_available_memory", lambda self: 50_000_000)
    manager = tiny_llama().init_continuous_batching(GREEDY, config_of("int4", max_batch_tokens=64, **room))
    blocks = []
    for _ in range(3):
        manager.start()
        manager.add_request(prompts_of((5,))[0])
        while (result := manager.get_result(timeout=1)) is None:
            assert manager.is_running()
        assert result.error is None
        manager.stop()
        blocks.append(manager.report().blocks)
    assert blocks[0] - 7 <= blocks[2] <= blocks[1] <= blocks[0]  # a dense block is 6.7 of these


def test_policies_by_layer_waste_nothing() -> None:
    """A block is as large as its pages are, each of its own policy."""
    model = tiny_llama()
    mixed = LayerwisePolicy(["exact", "int4", "int8"])
    sizes = {name: started(model, config_of(name)).report().bytes_per_block for name in ("exact", "int8", "int4")}
    report = started(model, config_of(mixed)).report()
    assert report.policy == "mixed"
    assert report.bytes_per_block == sum(sizes.values()) / 3
    prompts = prompts_of((70, 200))
    other = tiny_llama()  # the managers have not been stopped
    assert batched(other, prompts, config_of(mixed))[0] == one_by_one(other, prompts, mixed)
    with pytest.raises(WrongModelError, match="for 2 layers"):
        started(model, config_of(LayerwisePolicy(["int8", "int4"])))


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "int8-static"])
def test_every_policy(policy: str) -> None:
    """Alone in a batch the arithmetic is that of generate(), to the last bit."""
    model, prompts = tiny_llama(), prompts_of((150,), seed=3)
    assert batched(model, prompts, config_of(policy))[0] == one_by_one(model, prompts, policy)


@pytest.mark.parametrize("number", [0, 4, 8, 42])
def test_lmdeploys_numbers(number: int) -> None:
    assert started(tiny_llama(), config_of(number)).report().policy == config_of(number).policy.name


def test_calibrated_parameters() -> None:
    model, prompts = tiny_llama(), prompts_of((150, 70), seed=3)
    qparams = compute(collect(model, prompt(4, 60, seed=9)), per="channel")
    found, report = batched(model, prompts, config_of("int8-static", qparams=qparams))
    alone = [
        model.generate(
            torch.tensor([prompt]),
            generation_config=GREEDY,
            cache_implementation="kvquant",
            cache_config={"policy": "int8-static", "qparams": qparams},
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    assert (found, report.policy) == (alone, "int8-static")
    with pytest.raises(QParamsError, match="needs calibrated parameters"):
        started(model, config_of("int8-static"))


def test_a_cancelled_request_gives_everything_back() -> None:
    model, prompts = tiny_llama(), prompts_of((300, 300, 300))
    with model.continuous_batching_context_manager(GREEDY, continuous_batching_config=config_of("int4")) as manager:
        names = manager.add_requests(prompts, max_new_tokens=1500, streaming=True)
        ended, seen = set(), set()
        while len(ended) < 2:
            result = manager.get_result(timeout=1)
            assert result is not None or manager.is_running()
            if result is None:
                continue
            seen.add(result.request_id)
            if result.request_id == names[0] and len(result.generated_tokens) == 5:
                manager.cancel_request(names[0])
            if result.is_finished():
                ended.add(result.request_id)
    report = manager.report()
    assert ended == set(names[1:])
    assert (report.live_requests, report.used_blocks) == (0, 0)


def test_a_request_that_never_fits_is_refused() -> None:
    """Alone, a request fills all blocks and its open page; one token more would end the run of all others."""
    model, config = tiny_llama(), config_of("exact", num_blocks=4, max_requests=1)
    with model.continuous_batching_context_manager(GREEDY, continuous_batching_config=config) as manager:
        with pytest.raises(BatchingError, match="240 tokens and up to 18 new ones need 4 blocks, there are 3; shorten"):
            manager.add_request(prompts_of((240,))[0], max_new_tokens=18)
        manager.add_request(prompts_of((240,))[0], max_new_tokens=17)
        while (result := manager.get_result(timeout=1)) is None:
            assert manager.is_running()
    assert (result.error, len(result.generated_tokens)) == (None, 17)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Blocks that the requests of each step have, by kind."""
    found: dict[str, list[int]] = {}
    original = QuantizedBatchingCache._plan

    def plan(self: Any) -> Any:
        for kind, allocator in self.cache_allocators.items():
            tables = allocator.block_table.values()
            found.setdefault(kind, []).append(sum(b != GIVEN_BACK for table in tables for b in table))
        return original(self)

    monkeypatch.setattr(QuantizedBatchingCache, "_plan", plan)
    return found


def test_windows_give_blocks_back(held: dict[str, list[int]]) -> None:
    """Where every layer has a window, a request holds the blocks of its last window, whatever its length."""
    model, prompts = tiny_windowed("mistral"), prompts_of((500,))
    config = config_of("exact", page_size=8, num_blocks=10, max_requests=1, max_batch_tokens=32)
    found, report = batched(model, prompts, config)
    assert found == one_by_one(model, prompts)
    assert report.blocks == 9
    (blocks,) = held.values()
    assert max(blocks) <= (24 + 32) // 8 + 1  # the window, the tokens of a step, and the page that both share
    assert blocks[-1] <= 24 // 8 + 1


def test_windows_in_turn_give_blocks_back(held: dict[str, list[int]]) -> None:
    """Five layers with a window and one without: a block is a page of one layer, and can be given to any."""
    types = ["sliding_attention"] * 5 + ["full_attention"]
    model, prompts = tiny_windowed("gemma3", num_hidden_layers=6, layer_types=types), prompts_of((400, 100), seed=2)
    config = config_of("exact", page_size=8, num_blocks=40, max_requests=2, max_batch_tokens=32)
    found, report = batched(model, prompts, config)
    assert found == [batched(model, [prompt], config)[0][0] for prompt in prompts]
    assert max(held["full_attention"]) >= (400 + 24 - 2) // 8
    assert max(held["sliding_attention"]) <= 2 * 5 * ((24 + 32) // 8 + 1)
    assert held["full_attention"][-1] == (100 + 24 - 2) // 8  # the shorter one, alone
    assert held["sliding_attention"][-1] <= 5 * (24 // 8 + 1)
    assert report.dense_bytes_per_block == 8 * 2 * 2 * 16 * 4  # tokens, keys and values, heads, head_dim, bytes


def test_policies_by_layer_with_windows() -> None:
    """Pages of different sizes: a block has one of every layer, and nothing is given back."""
    model, prompts = tiny_windowed("gemma3"), prompts_of((150, 40), seed=2)
    mixed = LayerwisePolicy(["int4", "exact", "int8", "exact"])
    assert batched(model, prompts, config_of(mixed))[0] == one_by_one(model, prompts, mixed)


def test_what_is_out_of_range_is_said() -> None:
    """In the step that seals such a page, not before, and once."""
    model = tiny_llama()
    model.model.layers[1].self_attn.k_proj.weight.data[0] *= 1e6
    config = config_of("int4")
    with warnings.catch_warnings():
        warnings.simplefilter("error", KVQuantRangeWarning)
        assert not batched(model, prompts_of((40,)), config)[1].out_of_range
    with pytest.warns(KVQuantRangeWarning, match="beyond the range") as said:
        _, report = batched(model, prompts_of((100, 70)), config)
    assert report.out_of_range
    assert "cut off" in str(report)
    assert sum(issubclass(warning.category, KVQuantRangeWarning) for warning in said) == 1


def test_live_requests_are_reported() -> None:
    model = tiny_llama()
    with model.continuous_batching_context_manager(GREEDY, continuous_batching_config=config_of("int4")) as manager:
        manager.add_requests(prompts_of((200, 100)), max_new_tokens=500, streaming=True)
        while manager.get_result(timeout=1) is None:
            assert manager.is_running()
        with manager.pause():
            report = manager.report()
    assert report.live_requests == 2
    assert report.used_blocks == 3 + 1
    assert report.blocks == report.used_blocks + report.cached_blocks + report.free_blocks
    text = str(report)
    assert "2 live of at most" in text
    assert f"{report.blocks}: 4 used" in text
    assert set(report.as_dict()) >= {"ratio", "free_blocks", "blocks"}


@pytest.mark.parametrize("tokens", [2048, 90])
def test_a_calibration_rounds_every_page(tokens: int) -> None:
    """Prompts whole and in chunks that end within pages, and answers: as by generate() that begins with the same prior
    and sees no queries.  Others in the batch, and a prefix that is shared, change nothing."""
    model, prompts = tiny_llama(), prompts_of((250, 150, 60), seed=3)
    prompts.append(prompts[0][:200] + prompts[1][:30])
    qparams = compute(collect(model, prompt(4, 60, seed=9)))
    config = config_of("kv3", qparams=qparams, max_batch_tokens=tokens, prefill="quantized")
    options = {"policy": "kv3", "qparams": qparams, "prefill": "quantized", "sinks": 0}
    kwargs = {"cache_implementation": "kvquant", "cache_config": options, "prefill_chunk_size": tokens}
    with seeing_no_queries():
        alone = [
            model.generate(torch.tensor([ids]), generation_config=GREEDY, **kwargs)[0, len(ids) :].tolist()
            for ids in prompts
        ]
    found, report = batched(model, prompts, config, in_turn=True)
    assert found == alone and report.shared_tokens == 192
    if tokens == 2048:
        assert batched(model, prompts, config)[0] == alone
    without = compute(collect(model, prompt(1, 60)))
    old = type(without)({k: x for k, x in without.tensors.items() if k not in without.queries}, without.model)
    with pytest.raises(QParamsError, match="nothing but moments of queries"):
        started(model, config_of("kv3", qparams=old))
