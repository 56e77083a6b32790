"""StaticStore: the bytes of PagedStore, in memory that never moves."""

import random

import numpy as np
import pytest
import torch
from calibrated import with_range
from stores import chunks, logical_planes, make_store, raw, vectors
from torch.library import opcheck

from kvquant_hf.errors import BatchSizeError, CacheFullError, ImplementationError, StaticCacheError
from kvquant_hf.pages.parameters import in_pages
from kvquant_hf.pages.static_store import StaticStore
from kvquant_hf.pages.store import PagedStore
from kvquant_hf.policies.table import POLICIES
from kvquant_hf.triton_kernels.codecs import CODECS

PAGE = 16
policies = pytest.mark.parametrize("policy", list(POLICIES))


def make_static(policy: str, like: torch.Tensor, max_length: int, impl: str = "auto") -> StaticStore:
    heads, dim = like.shape[1], like.shape[3]
    codecs = (with_range(CODECS[name], heads, dim) for name in (POLICIES[policy].keys, POLICIES[policy].values))
    return StaticStore(*codecs, PAGE, like, like, impl, max_length)


def bytes_of(store: StaticStore) -> list[torch.Tensor]:
    """As ``logical_planes`` of a ``PagedStore``."""
    view, sealed = store.view(), store.sealed_pages
    held = store.length - sealed * PAGE
    table = view.page_table[:, :sealed]
    sides = [(side, len(in_pages(side.codec, side.head_dim))) for side in view[:2]]
    planes = [raw(plane[table]) for side, count in sides for plane in side.planes[:count]]
    return planes + [raw(side.tail[:, :, :held]) for side in view[:2]]


def same(static: StaticStore, paged: PagedStore) -> bool:
    return static.length == paged.length and all(map(torch.equal, bytes_of(static), logical_planes(paged)))


def addresses(store: StaticStore) -> list[int]:
    view = store.view()
    tensors = [x for side in view[:2] for x in (*side.planes, side.tail)]
    return [x.data_ptr() for x in (*tensors, view.page_table, view.lengths)]


@policies
@pytest.mark.parametrize("chunk", [1, 23, 200])
def test_same_bytes_as_a_store_that_grows(policy: str, chunk: int) -> None:
    tokens = 5 * PAGE + 3
    x = vectors(2, 2, tokens, 32)
    static, paged = make_static(policy, x, tokens), make_store(policy, x, x, PAGE)
    before = addresses(static)
    for part in chunks(tokens, chunk):
        for store in (static, paged):
            store.append(x[:, :, part], 2 * x[:, :, part])
    assert paged.sealed_pages == 5 and same(static, paged) and addresses(static) == before


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_to_them(seed: int) -> None:
    """Random tokens, crops, selections and resets: after each the bytes are those of a store that grows."""
    generator = random.Random(seed)
    x = vectors(3, 2, 400, 32, seed=seed)
    static, paged = make_static("int4", x, 150), make_store("int4", x, x, PAGE)
    before, position = addresses(static), 0
    happened = set()
    for _ in range(80):
        room = 150 - paged.length
        what = generator.choice(["append", "append", "append", "append", "crop", "select", "clear"])
        if what == "append" and room:
            count = generator.choice([1, generator.randint(1, min(room, 40))])
            position = (position + 1) % 300
            new = x[:, :, position : position + count]
            operations = [lambda store, new=new: store.append(new, -new)]
        elif what == "crop":
            count = generator.randint(0, paged.length)
            operations = [lambda store, count=count: store.crop(count)]
        elif what == "select":
            rows = torch.tensor([generator.randrange(3) for _ in range(3)])
            operations = [lambda store, rows=rows: store.select(rows)]
        elif what == "clear" and generator.random() < 0.5:
            operations = [lambda store: store.clear()]
        else:
            continue
        happened.add(what)
        for store in (static, paged):
            operations[0](store)
        assert same(static, paged), what
    assert happened == {"append", "crop", "select", "clear"} and addresses(static) == before
    assert static.reopened_pages > 0 or seed


def test_pages_shared_by_a_selection_are_not_written() -> None:
    """Three beams of one prompt, taken back into the prompt and continued differently."""
    x = vectors(3, 2, 4 * PAGE, 32)
    static = make_static("int8", x, 8 * PAGE)
    static.append(x, x)
    static.select(torch.tensor([1, 1, 1]))
    footprint = static.footprint()
    assert footprint.holders == 3 and footprint.packed == footprint.shared > 0
    static.crop(2 * PAGE + 5)
    table = static.view().page_table
    assert len(table[:, 2:].unique()) == table[:, 2:].numel(), "reserved pages belong to one sequence each"
    assert not set(table[:, 2:].flatten().tolist()) & set(table[:, :2].flatten().tolist())
    kept = [raw(plane[table[:, :1]]) for plane in static.view().keys.planes]
    static.append(x[:, :, : 2 * PAGE], x[:, :, : 2 * PAGE])
    assert all(map(torch.equal, kept, [raw(plane[table[:, :1]]) for plane in static.view().keys.planes]))


def test_room_for_exactly_as_many_tokens_as_asked_for() -> None:
    for tokens in (1, PAGE, PAGE + 1, 3 * PAGE):
        x = vectors(1, 2, tokens, 32)
        store = make_static("int4", x, tokens)
        store.append(x, x)
        held = bytes_of(store)
        with pytest.raises(CacheFullError, match=rf"takes {tokens} tokens and is to hold {tokens + 1};.*max_length"):
            store.append(x[:, :, :1], x[:, :, :1])
        assert store.length == tokens and all(map(torch.equal, held, bytes_of(store)))


@policies
def test_multiplied_out_is_what_pages_hold_and_zeros(policy: str) -> None:
    operator = torch.ops.kvquant_hf.multiply_out
    for tokens in (0, 7, PAGE, 2 * PAGE, 3 * PAGE + 5):
        x = vectors(2, 2, 4 * PAGE, 32)
        static, paged = make_static(policy, x, 4 * PAGE), make_store(policy, x, x, PAGE)
        for store in (static, paged):
            store.append(x[:, :, :tokens], x[:, :, :tokens])
        view = static.view()
        for side, name in zip(view[:2], ("keys", "values"), strict=True):
            planes = (side.codec.name, list(side.planes), side.tail, None, None, view.page_table, view.lengths)
            dense = operator(*planes, 4 * PAGE)
            assert dense.is_contiguous() and torch.equal(dense[:, :, :tokens], paged.view().dense(name))
            assert not dense[:, :, tokens:].any()


def test_operators_are_what_they_say() -> None:
    """torch's own checks: schemas, fake implementations, what is written."""
    x = vectors(2, 2, 20, 32)
    store = make_static("int4", x, 40)
    store.append(x, x)
    view = store.view()
    before = torch.empty_like(view.lengths)
    operators = torch.ops.kvquant_hf
    opcheck(operators.begin_step, (before, view.lengths, 3, PAGE, 40, True))
    planes = (view.keys.codec.name, list(view.keys.planes), view.keys.tail)
    first = x[:, :, :1].contiguous(), torch.tensor([0, -1], dtype=torch.int32)
    for held in ((None, None), first):
        opcheck(operators.multiply_out, (*planes, *held, view.page_table, view.lengths, 40))
    opcheck(operators.dense_attention, (x, x, x, 0.2, True, None, 5.0, None))


def test_bytes_are_counted_and_reserved_ones_are_unused() -> None:
    x = vectors(2, 2, 40, 32)
    store = make_static("int8", x, 100)
    reserved = store.footprint()
    store.append(x, x)
    held = store.footprint()
    page_bytes = held.packed // 4
    assert (reserved.packed, reserved.unused) == (0, 12 * page_bytes)
    assert held.packed + held.unused == reserved.unused and held.total == reserved.total
    assert held.total == sum(store.devices().values()) + held.tables
    assert store.dense_bytes() == 2 * 40 * (2 * 32 + 2 * 32) * 4


def test_what_does_not_fit_is_refused() -> None:
    x = vectors(2, 2, 8, 32)
    store = make_static("int8", x, 20)
    with pytest.raises(BatchSizeError):
        store.check(x[:1], x[:1])
    for rows in (torch.tensor([0]), torch.tensor([0, 0, 1, 1])):
        with pytest.raises(StaticCacheError, match=r"keeps its batch size, 2, and \d sequences"):
            store.select(rows)
    with pytest.raises(ImplementationError):
        make_static("int8", x.double(), 20, "triton")
    assert np.array_equal(store.lengths.numpy(), [[0, 0], [0, 0]])
