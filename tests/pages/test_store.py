"""PagedStore: what is stored does not depend on how it came in, and every page is counted exactly once per holder."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from stores import fill, live_pages, logical_planes, make_store, raw, same_bytes, vectors

from kvquant_hf.errors import BatchSizeError, CacheMismatchError, UnsupportedModelError
from kvquant_hf.pages import pool as pool_module
from kvquant_hf.pages.parameters import in_pages
from kvquant_hf.pages.store import PagedStore
from kvquant_hf.policies.table import POLICIES, parse_policy
from kvquant_hf.triton_kernels.codecs import CODECS

PAGE = 64
LENGTHS = (1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 1, 1000)
PAIRS = (
    *POLICIES,
    "int4-channel/lloyd2",
    "lloyd4-centred/lloyd3",
    "lloyd3-channel/lloyd2",
    "int2-ranked/lloyd2",
)
policies = pytest.mark.parametrize("policy", PAIRS)


def filled(policy: str = "int4", tokens: int = 150, batch: int = 2, chunk: int = 1 << 30, seed: int = 0) -> PagedStore:
    keys, values = vectors(batch, 2, tokens, 32, seed=seed), vectors(batch, 2, tokens, 32, seed=seed + 100)
    return fill(make_store(policy, keys, values), keys, values, chunk)


def content(store: PagedStore) -> tuple[torch.Tensor, torch.Tensor]:
    return store.view().dense("keys"), store.view().dense("values")


def state(store: PagedStore) -> tuple[object, ...]:
    """Everything that an error must not change."""
    return (
        *(store.length, store.version, store.tail_length, store.batch_size, store.pool.used),
        store.page_table.tolist(),
        [plane.tolist() for plane in logical_planes(store)],
    )


# -- appending ---------------------------------------------------------------------------------------------------------


@policies
@pytest.mark.parametrize("tokens", LENGTHS)
def test_stored_bytes_do_not_depend_on_chunking(policy: str, tokens: int) -> None:
    keys, values = vectors(2, 2, tokens, 32), vectors(2, 2, tokens, 48, seed=1)
    bulk = fill(make_store(policy, keys, values), keys, values)
    assert bulk.length == tokens and bulk.sealed_pages == (tokens - 1) // PAGE  # the last page stays open, full or not
    assert bulk.tail_length == tokens - bulk.sealed_pages * PAGE
    for chunk in (1, 3, PAGE - 1, PAGE, PAGE + 1):
        assert same_bytes(fill(make_store(policy, keys, values), keys, values, chunk), bulk), chunk


@policies
def test_each_page_is_the_codec_on_that_page(policy: str) -> None:
    keys, values = vectors(2, 2, 3 * PAGE, 32, dtype=torch.bfloat16), vectors(2, 2, 3 * PAGE, 64, seed=1).bfloat16()
    store = fill(make_store(policy, keys, values), keys, values, 50)
    assert store.sealed_pages == 2 and store.tail_length == PAGE
    planes = iter(store.pool.planes)
    for codec, x in zip(store.codecs, (keys, values), strict=True):
        stored_planes = len(in_pages(codec, x.shape[3]))
        for i, encoded in enumerate(
            zip(*(codec.encode(x[:, :, p * PAGE : (p + 1) * PAGE])[:stored_planes] for p in range(2)), strict=True)
        ):
            stored = next(planes)[store.page_table.long()]  # [batch, pages, heads, ...]
            assert torch.equal(raw(stored), raw(torch.stack(encoded, 1))), (codec.name, i)
    assert torch.equal(store.view().keys.tail[:, :, : store.tail_length], keys[:, :, 2 * PAGE :])
    assert torch.equal(store.view().values.tail[:, :, : store.tail_length], values[:, :, 2 * PAGE :])


def test_nothing_appended() -> None:
    keys = vectors(2, 2, 0, 32)
    store = fill(make_store("int4", keys, keys), keys, keys)
    assert (store.length, store.sealed_pages, store.pool.nbytes) == (0, 0, 0)
    store.append(keys, keys)
    assert store.length == 0
    assert content(store)[0].shape == (2, 2, 0, 32)
    full = filled(tokens=PAGE)
    full.append(keys, keys)
    assert (full.sealed_pages, full.tail_length) == (0, PAGE)  # no token, so no reason to seal


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tokens before heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "head_dim first": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "slice of a wider tensor": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every other token": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "part of a packed projection": lambda x: torch.stack([x, x + 1], 0)[0],
}


@policies
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_stored_bytes_do_not_depend_on_strides(policy: str, layout: str) -> None:
    keys, values = vectors(2, 3, 200, 32), vectors(2, 3, 200, 64, seed=1)
    ragged = tuple(LAYOUTS[layout](x) for x in (keys, values))
    assert torch.equal(ragged[0], keys)
    plain = fill(make_store(policy, keys, values), keys, values)
    for chunk in (1 << 30, 90):
        assert same_bytes(fill(make_store(policy, *ragged), *ragged, chunk), plain)


@policies
def test_expanded_heads_and_batch(policy: str) -> None:
    one = vectors(1, 1, 130, 32)
    wide, real = one.expand(3, 2, 130, 32), one.expand(3, 2, 130, 32).contiguous()
    assert same_bytes(
        fill(make_store(policy, wide, wide), wide, wide), fill(make_store(policy, real, real), real, real)
    )


def test_appended_tensors_are_copied() -> None:
    keys, values = vectors(1, 2, 70, 32), vectors(1, 2, 70, 32, seed=1)
    store = fill(make_store("exact", keys, values), keys, values)
    expected = keys.clone(), values.clone()
    keys.zero_()
    values.zero_()
    assert all(map(torch.equal, content(store), expected))


@policies
def test_dense_is_within_the_codecs_bounds(policy: str) -> None:
    keys, values = vectors(2, 2, 150, 64), vectors(2, 2, 150, 32, seed=1)
    store = fill(make_store(policy, keys, values), keys, values)
    for codec, x, dense in zip(store.codecs, (keys, values), content(store), strict=True):
        assert dense.shape == x.shape and dense.is_contiguous()
        assert torch.equal(dense[:, :, 128:], x[:, :, 128:])  # the open page is exact
        pages, decoded = (y[:, :, :128].unflatten(2, (2, PAGE)).transpose(1, 2) for y in (x, dense))
        error = (decoded - pages).norm(dim=-1)
        assert (error <= codec.error_bound(pages)).all()
        assert policy == "exact" or error.max() > 0


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda k, v: (k[:1], v[:1]), BatchSizeError, "holds a batch of 2, the call has 1"),
        (lambda k, v: (k[:, :1], v), CacheMismatchError, "holds keys of shape"),
        (lambda k, v: (k, v[:, :1]), CacheMismatchError, "holds values of shape"),
        (lambda k, v: (k[..., :16], v), CacheMismatchError, "another model"),
        (lambda k, v: (k, v[:, :, :2]), CacheMismatchError, "holds values of shape"),
        (lambda k, v: (k.long(), v), CacheMismatchError, r"int64 on cpu; was it filled by another model\?"),
        (lambda k, v: (k.to("meta"), v.to("meta")), CacheMismatchError, "on meta"),
    ],
    ids=["batch", "key-heads", "value-heads", "head_dim", "tokens", "dtype", "device"],
)
def test_tensors_that_do_not_fit_change_nothing(change, error: type[Exception], message: str) -> None:
    store = filled()
    before = state(store)
    x = vectors(2, 2, 70, 32)
    with pytest.raises(error, match=message):
        store.append(*change(x, x))
    assert state(store) == before


@pytest.mark.parametrize("call", [0, 1, 2])
def test_failing_codec_changes_nothing_and_leaks_no_page(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder runs out of memory on the ``call``-th of four calls: two rounds of 64 pages, keys and values."""
    store = filled("lloyd4-centred/lloyd2", tokens=100, batch=1)
    store.impl = "reference"  # where the codec itself encodes
    twin = store.fork()
    before, kept = state(store), content(store)
    calls, encode = [], type(store.codecs[0])._encode

    def failing(self, x: torch.Tensor, *args: object, **options: object) -> tuple[torch.Tensor, ...]:
        calls.append(x)
        if len(calls) > call:
            raise torch.OutOfMemoryError("no memory")
        return encode(self, x, *args, **options)

    monkeypatch.setattr(type(store.codecs[0]), "_encode", failing)
    x = vectors(1, 2, 80 * PAGE, 32, seed=5)
    with pytest.raises(torch.OutOfMemoryError):
        store.append(x, x)
    monkeypatch.undo()
    assert len(calls) == call + 1
    assert state(store) == before and all(map(torch.equal, content(store), kept))
    assert store.pool.used == len(live_pages(store)) == 1 and same_bytes(store, twin)
    store.append(x[:, :, :50], x[:, :, :50])
    twin.append(x[:, :, :50], x[:, :, :50])
    assert same_bytes(store, twin)


@pytest.mark.parametrize("failing", range(8))
def test_running_out_of_memory_changes_nothing(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ``failing``-th of eight allocations fails: two copied open pages, then six planes of the pool that grow."""
    store = filled("int4", tokens=150)
    twin = store.fork()
    before, calls = state(store), []

    def limited(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: object) -> torch.Tensor:
            calls.append(args)
            if len(calls) > failing:
                raise torch.OutOfMemoryError("no memory")
            return allocate(*args)

        return call

    x = vectors(2, 2, 100, 32, seed=5)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch.Tensor, "clone", limited(torch.Tensor.clone))
        patch.setattr(pool_module, "new_plane", limited(pool_module.new_plane))
        store.append(x, x)
    assert len(calls) == failing + 1 and state(store) == before
    store.append(x, x)
    twin.append(x, x)
    assert same_bytes(store, twin) and store.length == 250


def test_head_dim_that_a_codec_cannot_store() -> None:
    keys, values = vectors(1, 1, 1, 30), vectors(1, 1, 1, 30)
    with pytest.raises(UnsupportedModelError, match=r"'lloyd2' needs a head_dim that is a multiple of 4.*has 30"):
        make_store("int4-channel/lloyd2", keys, values)
    gc.collect()  # a store whose constructor failed must not complain when it goes
    assert make_store("int4-channel/int4-hadamard", keys, values).length == 0


# -- crop --------------------------------------------------------------------------------------------------------------


@policies
@pytest.mark.parametrize("count", [0, 1, 21, 22])
def test_crop_inside_the_open_page_is_exact(policy: str, count: int) -> None:
    store, untouched = filled(policy, 150), filled(policy, 150)
    store.crop(count)
    assert store.length == 150 - count and store.reopened_pages == 0 and store.sealed_pages == 2
    expected = [x[:, :, : 150 - count] for x in content(untouched)]
    assert all(map(torch.equal, content(store), expected))
    more = vectors(2, 2, 150, 32, seed=9)
    store.append(more, more)
    assert torch.equal(content(store)[0][:, :, :128], expected[0][:, :, :128])
    assert store.length == 300 - count


@policies
@pytest.mark.parametrize("kept", [1, 63, 64, 65, 127, 128])
def test_crop_beyond_the_open_page_decodes_one_page_once(policy: str, kept: int) -> None:
    store = filled(policy, 3 * PAGE + 5)
    dense = content(store)
    store.crop(store.length - kept)
    pages, rest = divmod(kept, PAGE)
    assert (store.length, store.sealed_pages, store.tail_length) == (kept, pages, rest)
    assert all(torch.equal(now, then[:, :, :kept]) for now, then in zip(content(store), dense, strict=True))
    assert store.reopened_pages == (2 if rest else 0)  # one page of each of two sequences
    assert store.pool.used == len(live_pages(store)) == 2 * pages


@pytest.mark.parametrize("count", [150, 151, 10**9])
def test_crop_of_everything_and_more(count: int) -> None:
    store = filled(tokens=150)
    store.crop(count)
    assert (store.length, store.sealed_pages, store.pool.used, store.pool.nbytes) == (0, 0, 0, 0)
    assert store.reopened_pages == 0
    keys = vectors(2, 2, 70, 32, seed=3)
    store.append(keys, keys)
    assert same_bytes(store, fill(make_store("int4", keys, keys), keys, keys))


def test_version_moves_with_every_change() -> None:
    store = filled()
    seen = [store.version]
    x = vectors(2, 2, 1, 32)
    for change in (
        lambda: store.append(x, x),
        lambda: store.crop(1),
        lambda: store.crop(100),
        lambda: store.select(torch.tensor([1, 0])),
        lambda: store.clear(),
    ):
        change()
        seen.append(store.version)
    assert seen == sorted(set(seen))


# -- sharing -----------------------------------------------------------------------------------------------------------


@policies
@pytest.mark.parametrize("indices", [[0, 1, 2], [2, 0, 1], [1, 1, 1], [2], [0, 0, 1, 1, 2, 2]], ids=str)
def test_select_moves_sequences_and_counts_pages(policy: str, indices: list[int]) -> None:
    store = filled(policy, 2 * PAGE + 9, batch=3)
    expected = [x[indices] for x in content(store)]
    store.select(torch.tensor(indices))
    assert all(map(torch.equal, content(store), expected)) and store.batch_size == len(indices)
    assert store.pool.used == len(live_pages(store)) == 2 * len(set(indices))
    pages = store.page_table.numpy()
    assert (store.pool.references(pages) == [[indices.count(i)] * 2 for i in indices]).all()
    # Sequences that share pages go their own ways from here.
    new = vectors(len(indices), 2, 70, 32, seed=7)
    store.append(new, new)
    assert all(
        torch.equal(now[:, :, :128], then[:, :, :128]) for now, then in zip(content(store), expected, strict=True)
    )
    assert store.pool.used == 2 * len(set(indices)) + len(indices)
    store.clear()
    assert store.pool.used == store.pool.nbytes == 0


def test_select_of_a_sequence_that_is_not_there_changes_nothing() -> None:
    store = filled()
    before = state(store)
    with pytest.raises(IndexError):
        store.select(torch.tensor([0, 2]))
    assert state(store) == before and (store.pool.references(store.page_table.numpy()) == 1).all()


@policies
def test_fork_shares_pages_and_copies_the_open_page_on_write(policy: str) -> None:
    store = filled(policy, 150)
    twin = store.fork()
    assert twin.pool is store.pool and store.pool.used == 4 and same_bytes(store, twin)
    assert twin.view().keys.tail.data_ptr() == store.view().keys.tail.data_ptr()
    before = content(store)
    a, b = vectors(2, 2, 3, 32, seed=8), vectors(2, 2, 3, 32, seed=9)
    twin.append(a, a)
    assert all(map(torch.equal, content(store), before)), "the fork wrote into the original's open page"
    store.append(b, b)
    for now, new in ((content(store), b), (content(twin), a)):
        assert all(torch.equal(x[:, :, :150], old) for x, old in zip(now, before, strict=True))
        assert all(torch.equal(x[:, :, 150:], new) for x in now)
    more = vectors(2, 2, 2 * PAGE, 32, seed=10)
    twin.append(more, more)
    assert store.pool.used == len(live_pages(store, twin)) == 4 + 4
    del twin
    assert store.pool.used == len(live_pages(store)) == 4


def test_fork_after_fork_and_crop() -> None:
    store = filled("int4", 2 * PAGE + 9)
    first = store.fork()
    second = first.fork()
    first.crop(40)  # reopens the second page, of its own copy
    second.crop(3)
    assert store.pool.used == 4 and (store.pool.references(store.page_table.numpy()) == [[3, 2]] * 2).all()
    x = vectors(2, 2, 1, 32, seed=4)
    kept = content(store)
    first.append(x, x)
    second.append(x, x)
    assert all(map(torch.equal, content(store), kept))
    store.clear()
    assert first.pool.used == len(live_pages(first, second)) == 4
    del second
    assert first.pool.used == len(live_pages(first)) == 2
    del first
    assert store.pool.used == store.pool.nbytes == 0


@pytest.mark.parametrize("policy", ["int4", "exact"])
def test_planes_that_were_outgrown_are_gone(policy: str) -> None:
    """Nothing that a store has made of them keeps them, in no fork."""
    store = filled(policy)
    twin = store.fork()
    views = store.view(), twin.view()
    outgrown = [weakref.ref(plane) for plane in store.pool.planes]
    more = vectors(2, 2, 10 * PAGE, 32)
    fill(twin, more, more)
    assert views[0].keys.planes[0].shape[0] < store.view().keys.planes[0].shape[0]
    del views
    assert [plane() for plane in outgrown] == [None] * len(outgrown)


@pytest.mark.parametrize("tokens", [0, 1, 64, 65, 1000])
@policies
def test_footprint_is_what_the_tensors_hold(policy: str, tokens: int) -> None:
    store = filled(policy, tokens, chunk=100)
    _ = store.page_table
    held = store.footprint()
    pages = 2 * store.sealed_pages
    page_bytes = sum(plane[:1].numel() * plane.element_size() for plane in store.pool.planes)
    assert held.packed == pages * page_bytes
    assert held.packed + held.unused == sum(plane.numel() * plane.element_size() for plane in store.pool.planes)
    assert held.unused <= held.packed / 32
    assert held.open_page == 2 * 2 * 2 * PAGE * 32 * 4  # sides, batch, heads: whole pages from the start
    # int32: the table once on the host and once on the device, and two lengths per sequence
    parameters = [parameter for codec in store.codecs for parameter in codec.parameters]
    assert len(parameters) == (4 if parse_policy(policy).calibrated else 0)
    assert store.seen is None or store.seen.nbytes == 0  # no query came by
    assert held.tables == 2 * pages * 4 + 2 * 2 * 4 + len(parameters) * 2 * 32 * 4  # heads, channels, float32
    assert held.total == held.packed + held.open_page + held.unused + held.tables
    assert store.dense_bytes() == 2 * 2 * 2 * tokens * 32 * 4 and store.elements_per_token() == 2 * 2 * 32


def test_footprint_counts_own_pages_only() -> None:
    """A fork that goes on alone does not make its origin look bigger, and shared pages count once."""
    store = filled("int4", 2 * PAGE + 1)
    alone = store.footprint()
    twin = store.fork()
    x = vectors(2, 2, 5 * PAGE, 32)
    twin.append(x, x)
    assert store.footprint().packed == alone.packed == 4 * store.pool.page_bytes
    assert twin.footprint().packed == 14 * store.pool.page_bytes
    store.select(torch.tensor([1, 1, 1]))
    assert store.footprint().packed == 2 * store.pool.page_bytes


def test_unused_codec_table_is_complete() -> None:
    """The policies of these tests store every codec there is."""
    assert {name for pair in map(parse_policy, PAIRS) for name in (pair.keys, pair.values)} == set(CODECS)
