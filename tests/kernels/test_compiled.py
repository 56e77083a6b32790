"""The kernels as Triton compiles them, run by the PTX machine: every codec pair against float64 and the reference.

The interpreter takes other paths than a compiled kernel (inline PTX, bf16 products, tensor cores, asynchronous copies),
and sees neither memory nor order.  Here every launch of the launchers is compiled for sm_75, sm_80 or sm_90 and run
thread by thread: results within the budgets of ``test_decode.py`` and ``test_append.py``, accesses in bounds, aligned,
of memory that was written, and in an order that barriers and waits ensure.

Cases are pairwise: for each pair of codecs and dtype, any two values of different factors are in one case together.
That is the full run (``-m full``); the usual one has a quick case of each pair of codecs, of attention in both dtypes,
and every value in one of them.
"""

import functools
import itertools
from typing import Any

import problems
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from kernels import compiled, planted
from kernels.compiler_process import call
from kernels.covering import pairwise
from kernels.test_compile_targets import PAIRS, RARER
from kernels.test_decode import Case

from kvquant_hf.triton_kernels.codecs import CODECS

PAGE = 64
ALL_PAIRS = PAIRS | {"int8-static": ("int8-static", "int8-static")} | RARER
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TARGETS = {"fp16": (75, 80, 90), "bf16": (80, 90)}  # Turing has no bf16

ATTENTION = {
    "dims": ((64, 64), (80, 96), (128, 128), (128, 64), (256, 256)),
    "group": (1, 4, 7),
    "queries": (1, 5, 70),
    "past": ((0, 63), (64, 369), (199, 65), (36, 383)),  # tokens of two sequences before the queries
    "mask": ("none", "bool", "causal", "float", "heads", "rows"),
    "feature": (
        {},
        {"softcap": 15.0},
        {"sinks": True},
        {"window": 100},
        {"softcap": 20.0, "sinks": True, "window": 48},
    ),
    "splits": (1, 3),
    "layout": ("", "fused", "odd"),
}
APPEND = {
    "dims": ((64, 64), (80, 96), (128, 64), (256, 256)),
    # (new tokens, tokens in the open pages)
    "call": ((1, (PAGE - 1, PAGE)), (3, (PAGE - 3, PAGE)), (PAGE + 1, (0, PAGE - 1)), (2 * PAGE + 5, (0, 17, PAGE))),
    "page": (PAGE, 16),
}
FACTORS = {"attention": ATTENTION, "append": APPEND}


QUICK = 70 * 4 * 64


def work(row: dict[str, Any]) -> int:
    """What a case of attention costs, about: rows times columns, of products without tensor cores four times."""
    return row.get("queries", 0) * row.get("group", 0) * row["dims"][1] * (4 if row["target"] == 75 else 1)


def attention_case(row: dict[str, Any], dtype: torch.dtype) -> Case:
    queries, mask = row["queries"], row["mask"]
    return Case(
        tokens=tuple(past + queries for past in row["past"]),
        key_dim=row["dims"][0],
        value_dim=row["dims"][1],
        group=row["group"],
        queries=queries,
        dtype=dtype,
        mask="bool" if mask == "rows" and queries == 1 else mask,  # its hidden row is the second one
        splits=row["splits"],
        heads=1 if queries > 5 else 2,
        **row["feature"],
    )


@functools.cache
def rows_of(kernel: str, dtype: str) -> list[dict[str, Any]]:
    """The cases of each pair of codecs."""
    return pairwise({"target": TARGETS[dtype]} | FACTORS[kernel])


def cases(kernel: str, usual: bool = False) -> list[Any]:
    """(policy, dtype, row), those marked ``full`` that are not in the usual run; with ``usual`` the others alone."""
    params = []
    for (i, policy), dtype in itertools.product(enumerate(ALL_PAIRS), DTYPES):
        rows = rows_of(kernel, dtype)
        quick = [number for number, row in enumerate(rows) if work(row) <= QUICK]
        chosen = quick[9 * i % len(quick)]  # neighbours are alike
        if kernel == "append" and (i + (dtype == "fp16")) % 2:
            chosen = -1
        if policy in RARER:
            chosen = None
        for number, row in enumerate(rows):
            if number == chosen or not usual:
                marks = [pytest.mark.full] * (number != chosen)
                params.append(pytest.param(policy, dtype, row, id=name_of(kernel, policy, dtype, row), marks=marks))
    return params


def name_of(kernel: str, policy: str, dtype: str, row: dict[str, Any]) -> str:
    target = f"sm_{row['target']}"
    if kernel == "attention":
        return "-".join(
            [policy, target, str(attention_case(row, DTYPES[dtype])), *[row["layout"]] * bool(row["layout"])]
        )
    (tokens, held), dims = row["call"], row["dims"]
    return f"{policy}-{target}-D{dims[0]}.{dims[1]}-T{tokens}-H{'.'.join(map(str, held))}-P{row['page']}-{dtype}"


@pytest.mark.parametrize("kernel", FACTORS)
def test_every_value_is_in_the_usual_run(kernel: str) -> None:
    rows = [case.values[2] for case in cases(kernel, usual=True)]
    for factor, values in FACTORS[kernel].items():
        for value in values:
            assert any(row[factor] == value for row in rows), f"{factor} {value}"
    assert {row["target"] for row in rows} == set(TARGETS["fp16"])


@pytest.mark.parametrize(("policy", "dtype", "row"), cases("attention"))
def test_attention(policy: str, dtype: str, row: dict[str, Any]) -> None:
    """Rotation, ``decode`` and ``combine``."""
    case = attention_case(row, DTYPES[dtype])
    launches = call(compiled.check_attention, ALL_PAIRS[policy], case, row["target"], row["layout"])
    assert all(sum(launch.opcodes.values()) and launch.global_written for launch in launches)


@pytest.mark.parametrize(("policy", "dtype", "row"), cases("append"))
def test_append(policy: str, dtype: str, row: dict[str, Any]) -> None:
    tokens, held = row["call"]
    held = tuple(min(count, row["page"]) for count in held)
    (launch,) = call(
        compiled.check_append, ALL_PAIRS[policy], tokens, held, row["dims"], DTYPES[dtype], row["target"], row["page"]
    )
    assert sum(launch.opcodes.values()) and launch.global_written


def every_pair(*usual: str) -> pytest.MarkDecorator:
    """All pairs of codecs in both dtypes; in the usual run those of ``usual``, in bf16."""
    return pytest.mark.parametrize(
        ("policy", "dtype"),
        [
            pytest.param(
                policy,
                dtype,
                id=f"{policy}-{dtype}",
                marks=[pytest.mark.full] * (policy not in usual or dtype != "bf16"),
            )
            for policy, dtype in itertools.product(ALL_PAIRS, DTYPES)
        ],
    )


@every_pair("turboquant")
def test_empty_and_hidden_sequences(policy: str, dtype: str) -> None:
    call(compiled.check_empty, ALL_PAIRS[policy], DTYPES[dtype], 80)


@every_pair("exact", "int4", "turboquant-qjl")
def test_hard_pages(policy: str, dtype: str) -> None:
    call(compiled.check_hard_pages, ALL_PAIRS[policy], DTYPES[dtype], 80)


@every_pair("int8")
def test_large_queries_and_keys(policy: str, dtype: str) -> None:
    """A query times a channel's scale may pass the end of fp16."""
    gain = (256.0, 2048.0) if dtype == "bf16" else (64.0, 256.0)
    case = Case((130, 70), dtype=DTYPES[dtype], gain=gain)
    call(compiled.check_attention, ALL_PAIRS[policy], case, 90)


@every_pair("int4", "int8")
@pytest.mark.parametrize("target", [80, pytest.param(90, marks=pytest.mark.full)])
def test_many_rows_are_merged(policy: str, dtype: str, target: int) -> None:
    """As few queries of many heads have them: by products with signs, for all rows of a program."""
    case = Case((230, 150), 64, 64, 16, 5, dtype=DTYPES[dtype], heads=1)
    launches = call(compiled.check_attention, ALL_PAIRS[policy], case, target)
    assert any(launch.name == "_combine_rows_kernel" for launch in launches)


@every_pair("int4")
@pytest.mark.parametrize("queries", [1, 66])
def test_first_tokens(policy: str, dtype: str, queries: int) -> None:
    """Read as they came beside the pages, by few queries and by many."""
    case = Case((200, 66), 64, 64, 2, queries, DTYPES[dtype], "bool", first=(2, (63, -1)), heads=1)
    call(compiled.check_attention, ALL_PAIRS[policy], case, 80)


@pytest.mark.parametrize(
    ("policy", "target", "dtype"),
    [
        ("int4", 80, "bf16"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (("int8", 90, "bf16"), ("exact", 75, "fp16"), ("lloyd3-sign/lloyd2-plain", 80, "fp16"))
        ),
    ],
)
def test_latents(policy: str, target: int, dtype: str) -> None:
    """Two splits, a page in two blocks, rows that do not fill a program; in scratch memory nobody reads what was not
    written, nor writes what others have yet to read."""
    case = problems.Case(140, 64, 32, group=5, batch=1)
    launches = call(compiled.check_latents, policy, case, DTYPES[dtype], target)
    assert [launch.name for launch in launches if "rotate" not in launch.name] == [
        "_latent_decode_kernel",
        "_combine_kernel",
    ]


@every_pair("int4")
def test_blocks_go_on_where_others_ended(policy: str, dtype: str) -> None:
    """Many queries, of which and of whose pages little is taken at a time."""
    case = Case((230, 150), 64, 64, 1, 70, dtype=DTYPES[dtype], heads=1)
    assert call(compiled.check_blocks, ALL_PAIRS[policy], case, 80) == 8, "four pages for each of two parts"


@pytest.mark.parametrize(
    "policy", [p if p == "int4" else pytest.param(p, marks=pytest.mark.full) for p in (*PAIRS, *RARER)]
)
def test_every_packed_byte_is_loaded_once(policy: str) -> None:
    """A page more costs ``decode`` its stored bytes, and the entry of the page table in each thread.

    Where each page has an order of its channels, the query of eight rows is read in it, that order four times, and
    the steps twice, a byte each."""
    pair = ALL_PAIRS[policy]
    stored = sum(CODECS[name].bytes_per_token(128, PAGE, torch.bfloat16) * PAGE for name in pair)
    ordered = CODECS[pair[0]].kernel.channel_of is not None
    loaded = []
    for pages in (4, 12):
        case = Case((pages * PAGE + 5,) * 2, 128, 128, dtype=torch.bfloat16, splits=1)
        launches = call(compiled.check_attention, pair, case, 80)
        (decode,) = (launch for launch in launches if launch.name == "_decode_kernel")
        loaded.append(decode.global_read / len(case.tokens) / case.heads)
    more = (8 * 2 + 3 + 1) * 128 if ordered else 0
    assert 0 <= (loaded[1] - loaded[0]) / 8 - stored <= 4 * decode.threads + more


PLANTED = Case((65, 400), dtype=torch.bfloat16, splits=1)


def test_a_codec_without_its_flag_is_noticed() -> None:
    """The interpreter does not unpack by PTX, so it never asks whether levels are integers."""
    with pytest.raises(AssertionError, match=r"error .* budget"):
        call(planted.without_integer_codes, PLANTED, 80)


@pytest.mark.parametrize("policy", ["int4", pytest.param("turboquant-qjl", marks=pytest.mark.full)])
def test_a_removed_wait_is_noticed(policy: str) -> None:
    found = call(planted.found_without, planted.WAIT, "_decode_kernel", planted.attend, ALL_PAIRS[policy], PLANTED, 80)
    assert found and all(any("asynchronous copy" in kind for kind in kinds) for kinds in found)


@pytest.mark.parametrize("target", [80, pytest.param(90, marks=pytest.mark.full)])
def test_a_removed_barrier_is_noticed(target: int) -> None:
    found = call(planted.found_without, planted.BARRIER, "_append_kernel", planted.append, ALL_PAIRS["int8"], target)
    assert found and all(any("race" in kind for kind in kinds) for kinds in found)


@pytest.mark.parametrize("target", [80, pytest.param(90, marks=pytest.mark.full)])
def test_an_offset_one_page_too_far_is_noticed(target: int) -> None:
    """The page behind the last one belongs to nobody."""
    kinds = call(planted.found_one_page_too_far, ALL_PAIRS["int4"], PLANTED, target)
    assert kinds & {"read of what nobody wrote", "read out of bounds"}
