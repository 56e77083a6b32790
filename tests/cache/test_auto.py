"""``policy="auto"``: the most accurate policy that fits a budget, wherever a policy is given, and said by its name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import prompt, tiny_gemma2, tiny_llama, tiny_qwen2
from support.architectures import ARCHITECTURES
from transformers import BloomConfig, PreTrainedModel

from kvquant_hf import LayerwisePolicy, PagePools, QuantizedPagedCache
from kvquant_hf.errors import OutOfPages, PoolMismatchError, UnknownPolicyError, UnsupportedModelError
from kvquant_hf.policies.auto import LADDER, AutoPolicy
from kvquant_hf.policies.cost import choose, ladder, page_cost
from kvquant_hf.policies.sizes import parse_size
from kvquant_hf.policies.table import POLICIES, parse_policy
from kvquant_hf.transformers_api.auto import head_dims, policy_for
from kvquant_hf.transformers_api.names import with_cache
from kvquant_hf.triton_kernels.codecs import CODECS

PAGE = 16
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama()


def bits_of(policy: str, head_dim: int = 32, page_size: int = 64, dtype: torch.dtype = torch.float32) -> float:
    return page_cost(policy, head_dim, page_size=page_size, dtype=dtype).bits_per_element


# -- the ladder --------------------------------------------------------------------------------------------------------


def test_the_ladder_is_of_our_own_and_descends() -> None:
    """More accurate ones take more bits, or they would be the only rung; formulae of others are never chosen."""
    for dim in (64, 80, 96, 128, 256):
        bits = list(ladder(dim, dim, 64, BF16).values())
        assert bits == sorted(bits, reverse=True) and len(bits) == len(LADDER)
    for name in LADDER:
        policy = POLICIES[name]
        assert not policy.calibrated and not any(CODECS[c].reproduces for c in (policy.keys, policy.values))


@given(
    bits=st.floats(0.5, 40),
    dims=st.tuples(st.sampled_from((1, 20, 36, 64, 80, 128)), st.sampled_from((6, 64, 96))),
    page=st.sampled_from((8, 16, 64, 128)),
    dtype=st.sampled_from((BF16, torch.float32)),
)
def test_the_first_that_fits(bits: float, dims: tuple[int, int], page: int, dtype: torch.dtype) -> None:
    """Against every policy of the ladder asked by itself."""
    storable = [
        name
        for name in LADDER
        if dims[0] % CODECS[POLICIES[name].keys].head_dim_multiple == 0
        and dims[1] % CODECS[POLICIES[name].values].head_dim_multiple == 0
    ]
    costs = {
        name: page_cost(name, dims[0], value_head_dim=dims[1], page_size=page, dtype=dtype).bits_per_element
        for name in storable
    }
    rungs = ladder(*dims, page, dtype)
    assert rungs == costs
    fitting = [name for name in storable if costs[name] <= bits]
    if fitting:
        assert choose(AutoPolicy(bits), rungs).name == fitting[0]
        return
    with pytest.raises(UnknownPolicyError) as caught:
        choose(AutoPolicy(bits), rungs)
    least = float(str(caught.value).rstrip(".").rpartition("at least ")[2])
    assert choose(AutoPolicy(least), rungs).name in storable, "what the message asks for is enough"
    assert least - min(costs.values()) < 0.0101


# -- what is written ---------------------------------------------------------------------------------------------------


def test_written_in_one_word() -> None:
    for written in ("auto:3.5", "auto: 3.5", "auto:3.50"):
        assert parse_policy(written) == parse_policy("auto", 3.5) == AutoPolicy(3.5)
    assert parse_policy("auto:4").name == "auto:4" and parse_policy(AutoPolicy(4)) == AutoPolicy(4.0)
    assert parse_policy(AutoPolicy(2.875).name) == AutoPolicy(2.875) and not AutoPolicy(3.0).calibrated
    assert page_cost("auto:3.5", 64) == page_cost("kv3", 64)


@pytest.mark.parametrize(
    ("policy", "bits", "words"),
    [
        ("auto", None, ("auto:3.5", "bits=3.5", "kv_budget")),
        ("auto:3.5", 3.5, ("one place",)),
        ("auto:", None, ("auto:3.5",)),
        ("auto:x", None, ("auto:3.5",)),
        ("auto:nan", None, ("auto:3.5",)),
        ("auto:-1", None, ("auto:3.5",)),
        ("auto:3/int4", None, ("auto:3.5",)),
        ("auto", 0, ("positive number",)),
        ("auto", True, ("positive number",)),
        ("auto", "3", ("positive number",)),
        ("auto", float("inf"), ("positive number",)),
        ("int4", 3.5, ("'int4' has bits of its own", "policy='auto'")),
        (POLICIES["int4"], 3.5, ("'int4' has bits of its own",)),
        (4, 3.5, ("bits of its own",)),
        ("int8/auto:3", None, ("unknown values",)),
    ],
    ids=repr,
)
def test_budgets_that_are_none(policy: Any, bits: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(UnknownPolicyError) as caught:
        parse_policy(policy, bits)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_layer_has_no_budget_of_its_own() -> None:
    with pytest.raises(UnknownPolicyError, match="one policy"):
        LayerwisePolicy(["auto:3.5", "int8"])


@pytest.mark.parametrize(
    ("text", "size"),
    [("2 GiB", 2**31), ("1.5GB", 1_500_000_000), ("500 mb", 500_000_000), ("2", None), ("-2GB", None), ("", None)],
)
def test_sizes(text: str, size: int | None) -> None:
    assert parse_size(text) == size


# -- in a cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LADDER)
def test_bits_of_a_cache(name: str, model: PreTrainedModel) -> None:
    """Its own bits are enough for each policy, a hair less is the next one's, and pages hold what was promised."""
    bits = bits_of(name, page_size=PAGE)
    cache = QuantizedPagedCache(model.config, "auto", bits=bits, page_size=PAGE)
    with torch.no_grad():
        model(prompt(length=40), **with_cache(cache))
    report = cache.report()
    assert report.policy == name == cache.policy.name and name in str(report)
    assert report.page_bits_per_element == pytest.approx(bits, rel=1e-12)
    if name != LADDER[-1]:
        less = QuantizedPagedCache(model.config, f"auto:{bits * (1 - 1e-9)}", page_size=PAGE)
        assert less.policy.name == LADDER[LADDER.index(name) + 1]


def test_no_policy_is_small_enough(model: PreTrainedModel) -> None:
    with pytest.raises(UnknownPolicyError, match=r"^no policy has 2 bits.*'kv2\.4', takes \d\.\d+: give at least"):
        QuantizedPagedCache(model.config, "auto", bits=2)


def test_exact_takes_what_the_model_takes() -> None:
    """32 bits in float32, 16 in bfloat16; a config that names no dtype stands for the larger."""
    config = tiny_llama().config
    for dtype, expected in ((None, "int8"), (torch.float32, "int8"), (BF16, "exact")):
        config.dtype = dtype
        assert policy_for(config, "auto:16").name == expected


def test_head_dims_decide() -> None:
    """A head_dim of 20 has no codecs that want eights."""
    config = tiny_qwen2(hidden_size=80).config
    assert head_dims(config) == [(20, 20)]
    rungs = ladder(20, 20, 64, torch.float32)
    assert not {"kv3", "kv2.9", "kv2.4"} & set(rungs) and "int8" in rungs
    assert {policy_for(config, "auto", bits=bits).name for bits in (*rungs.values(), 31)} == set(rungs)
    with pytest.raises(UnknownPolicyError, match=f"the smallest, '{list(rungs)[-1]}'"):
        policy_for(config, "auto:3.5")


@pytest.mark.parametrize(
    "form", [{"cache_config": {"policy": "auto", "bits": 3.8}}, {"cache_config": {"policy": "auto:3.8"}}]
)
@pytest.mark.parametrize("static", [False, True])
def test_by_name(form: dict[str, Any], static: bool, model: PreTrainedModel) -> None:
    options = {"cache_implementation": "kvquant", "cache_config": form["cache_config"] | {"static": static}}
    output = model.generate(
        prompt(length=70),
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        disable_compile=True,
        **options,
    )
    assert output.past_key_values.report().policy == "kv3"


def test_a_saved_cache_has_the_policy_that_was_chosen(model: PreTrainedModel, tmp_path: Path) -> None:
    cache = QuantizedPagedCache(model.config, "auto:3.8")
    with torch.no_grad():
        model(prompt(length=70), **with_cache(cache))
    cache.save(tmp_path / "x.safetensors")
    assert QuantizedPagedCache.load(tmp_path / "x.safetensors", model.config).policy == POLICIES["kv3"]


# -- bytes -------------------------------------------------------------------------------------------------------------


def filled(model: PreTrainedModel, policy: Any, tokens: int, **options: Any) -> QuantizedPagedCache:
    """A cache that has read so many tokens, page by page."""
    cache = QuantizedPagedCache(model.config, policy, page_size=PAGE, **options)
    with torch.no_grad():
        for part in prompt(length=tokens).split(PAGE, dim=1):
            model(part, **with_cache(cache))
    return cache


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2], ids=["full", "windows"])
def test_kv_budget_holds_what_it_promises(make: Any) -> None:
    """What each policy's pages of 200 tokens really take decides which budget is enough for it."""
    model, tokens, options = make(), 200, {"max_length": 200}
    for name in LADDER:
        known = filled(model, name, tokens)  # pools live as long as their cache
        pages = known.pools.budget.pools
        held = sum(pool.used * pool.page_bytes for pool in pages)
        page = sum(pool.page_bytes for pool in pages)
        budget = held + 3 * page  # a full last page, and two more of a window
        cache = filled(model, "auto", tokens, kv_budget=budget, **options)
        chosen = cache.report().policy
        assert LADDER.index(chosen) <= LADDER.index(name), "a policy that fits was not taken"
        assert cache.pools.budget.max_bytes == budget and sum(p.nbytes for p in cache.pools.budget.pools) <= budget
    with pytest.raises(UnknownPolicyError) as caught:
        QuantizedPagedCache(model.config, "auto", kv_budget=1000, **options)
    message = str(caught.value)
    assert "200 tokens" in message and "1,000 bytes" in message and "'kv2.4'" in message
    least = int(message.partition("takes ")[2].partition(":")[0].replace(",", ""))
    assert QuantizedPagedCache(model.config, "auto", kv_budget=least, **options).policy.name == "kv2.4"
    with pytest.raises(UnknownPolicyError):
        QuantizedPagedCache(model.config, "auto", kv_budget=least - 1, **options)


def test_kv_budget_is_a_bound(model: PreTrainedModel) -> None:
    with pytest.raises(OutOfPages):
        filled(model, "auto", 400, kv_budget=20_000, max_length=100)


def test_tokens_of_a_budget(model: PreTrainedModel) -> None:
    """By default all that the model has positions for: fewer of them leave room for a finer policy."""
    positions = model.config.max_position_embeddings
    sizes = ("512 KiB", 2**19)
    every, half = ({policy_for_(model, size, length) for size in sizes} for length in (None, positions // 2))
    assert every == {policy_for_(model, 2**19, positions)} and len(half) == 1
    assert LADDER.index(half.pop()) < LADDER.index(every.pop())
    bloom = BloomConfig(n_layer=2, hidden_size=64, n_head=4)  # has no positions
    assert policy_for(bloom, "auto", kv_budget=2**30, max_length=100).name == "exact"
    with pytest.raises(UnknownPolicyError, match="give a positive integer as max_length"):
        policy_for(bloom, "auto", kv_budget=2**20)


def policy_for_(model: PreTrainedModel, size: int | str, length: int | None) -> str:
    return QuantizedPagedCache(model.config, "auto", kv_budget=size, max_length=length).policy.name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_budget": 0}, "positive integer"),
        ({"kv_budget": "2"}, "'2GiB'"),
        ({"kv_budget": 2.5}, "'2GiB'"),
        ({"kv_budget": True}, "'2GiB'"),
        ({"kv_budget": 10**6, "max_length": 0}, "positive integer as max_length"),
        ({"kv_budget": 10**6, "bits": 3.5}, "one of the two"),
        ({"kv_budget": 10**6, "policy": "int4"}, "max_bytes to bound another policy"),
        ({"kv_budget": 10**6, "policy": None}, "policy='auto'"),
        ({"kv_budget": 10**6, "max_bytes": 10**6}, "leave all but one of them out"),
        ({"kv_budget": 10**6, "static": True, "max_length": 100}, "leave kv_budget out"),
        ({"bits": 3.5, "max_length": 100}, "kv_budget"),
        ({"bits": 3.5, "policy": None}, "policy='auto'"),
        ({}, "auto:3.5"),
    ],
    ids=repr,
)
def test_what_does_not_go_together(options: dict[str, Any], words: str, model: PreTrainedModel) -> None:
    with pytest.raises(UnknownPolicyError) as caught:
        QuantizedPagedCache(model.config, **{"policy": "auto"} | options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_pools(model: PreTrainedModel) -> None:
    pools = PagePools(model.config, "auto", bits=3.8)
    assert pools.policy == POLICIES["kv3"] and pools.report().policy == "kv3"
    for options in ({}, {"policy": "kv3"}, {"policy": "auto", "bits": 3.8}, {"policy": "auto:3.9"}):
        assert QuantizedPagedCache(model.config, pool=pools, **options).policy == POLICIES["kv3"]
    for options, words in (
        ({"policy": "auto:5"}, "the cache asks for 'int4'"),
        ({"policy": "auto", "kv_budget": 10**6}, "kv_budget belongs to shared pools"),
        ({"bits": 3.5}, "bits belongs to shared pools"),
    ):
        with pytest.raises(PoolMismatchError, match=words):
            QuantizedPagedCache(model.config, pool=pools, **options)
    bounded = PagePools(model.config, "auto", kv_budget="1MiB", max_length=500)
    assert bounded.budget.max_bytes == 2**20
    with pytest.raises(UnknownPolicyError, match="leave it out"):
        PagePools(model.config, max_length=500)


# -- what configs say --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, row in ARCHITECTURES.items() if row.exists and row.kind != "speech"])
def test_configs_say_what_pages_hold(name: str) -> None:
    """Of every architecture: the head_dims of its config are those of its keys and values, or "auto" is refused."""
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    options: dict[str, Any] = {"cache_implementation": "kvquant", "cache_config": {"policy": "exact"}}
    output = model.generate(**architecture.inputs(), max_new_tokens=2, return_dict_in_generate=True, **options)
    cache = getattr(output.past_key_values, "self_attention_cache", output.past_key_values)
    held = {tuple(dim for _, dim in store.vectors) for store in cache.stores}
    if name == "DeepSeek-V3":
        with pytest.raises(UnsupportedModelError, match="latents"):
            policy_for(model.config, "auto:4")
        return
    assert held == set(head_dims(model.config))
    assert policy_for(model.config, "auto:10").name == "int8"
