"""Every public name of transformers' cache classes on ours, with ``DynamicCache`` as the oracle.

Both caches are driven by the same calls and then asked everything that can be asked of a cache (``observe``).  Policy
``exact`` in pages of 8 tokens, so that what is compared is the bookkeeping, to the bit.  A name that is new in
transformers makes ``test_every_public_name_is_covered`` fail until it is listed here.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.architectures import ARCHITECTURES
from support.features import model_of
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.layers.paged import PagedLayer

# Comparing multiplies the pages out, and our cache says so.
pytestmark = pytest.mark.filterwarnings("ignore::kvquant_hf.errors.KVQuantFallbackWarning")

HEADS, DIM, PAGE = 2, 16, 8
MODELS = {"full": "Llama", "sliding": "Gemma3, text", "linear": "Qwen3-Next"}

# Asked of both caches after every call, without arguments or per layer.
PROPERTIES = (
    "is_compileable",
    "is_croppable",
    "is_dummy",
    "is_initialized",
    "is_linear",
    "is_sliding",
    "max_cache_len",
)
PER_LAYER = {
    "get_seq_length": (),
    "get_query_offset": (),
    "get_max_length": (),
    "get_max_cache_shape": (),
    "is_recording_past": (),
    "has_previous_state": (),
    "get_conv_state": (),
    "get_recurrent_state": (),
    "get_mask_sizes": (3,),
}
# Ours says how many sequences it holds, which ``DynamicCache`` does not know; see test_batch_size.
BATCH = ("batch_size", "max_batch_size")


def caches(kind: str) -> tuple[DynamicCache, QuantizedPagedCache]:
    """The oracle and ours, empty."""
    config = model_of(MODELS[kind]).config
    return DynamicCache(config=config), QuantizedPagedCache(config, "exact", page_size=PAGE)


def feed(cache: Cache, tokens: int, batch: int = 3, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Write random keys and values (or states) to every layer; what ``update`` returned, dense."""
    generator = torch.Generator().manual_seed(seed)
    read = []
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            cache.update_conv_state(torch.randn(batch, 8, 4, generator=generator), i)
            cache.update_recurrent_state(torch.randn(batch, 2, 4, 4, generator=generator), i)
        else:
            keys, values = (torch.randn(batch, HEADS, tokens, DIM, generator=generator) for _ in range(2))
            read.append(tuple(x + 0 for x in cache.update(keys, values, i)))
    return read


def answer(function: Callable[[], Any]) -> Any:
    """What it returns, tensors as lists, or the type of what it raises."""
    try:
        result = function()
    except Exception as error:
        return type(error)
    return result.tolist() if isinstance(result, torch.Tensor) else result


def observe(cache: Cache) -> dict[str, Any]:
    """Everything that can be asked of a cache, and the tokens it holds."""
    seen = {name: answer(lambda name=name: getattr(cache, name)) for name in PROPERTIES if hasattr(Cache, name)}
    for name, arguments in PER_LAYER.items():
        if hasattr(Cache, name):
            method = getattr(cache, name)
            for i in range(len(cache) + 1):  # one past the end is asked for, too
                seen[f"{name}({i})"] = answer(lambda method=method, i=i, a=arguments: method(*a, layer_idx=i))
    seen["len"] = len(cache)
    for i, (keys, values, *window) in enumerate(cache if seen["is_linear"].count(True) == 0 else ()):
        # An empty layer is None, or a tensor of nothing.
        windows = [None if w is None else w.item() for w in window]
        # Ours hold whole pages, so that a window may begin within the first of them.
        last = slice(None if windows[0] is None else 1 - windows[0], None)
        held = [[] if x is None or x.numel() == 0 else (x + 0)[:, :, last].tolist() for x in (keys, values)]
        seen[f"tokens({i})"] = held, windows
        if windows[0] is not None:
            sizes = seen[f"get_mask_sizes({i})"]
            seen[f"get_mask_sizes({i})"] = sum(sizes) if isinstance(sizes, tuple) else sizes
    return seen


def check(*pair: Cache) -> None:
    """Assert that both answer alike."""
    theirs, ours = map(observe, pair)
    assert theirs.keys() == ours.keys()
    different = {name: (theirs[name], ours[name]) for name in theirs if theirs[name] != ours[name]}
    assert not different, different


# One call each, after 20 tokens of three sequences: two sealed pages and an open one.
CALLS: dict[str, list[Callable[[Cache], Any]]] = {
    "update": [lambda cache: feed(cache, 1, seed=1), lambda cache: feed(cache, 13, seed=1)],
    "update_conv_state": [lambda cache: feed(cache, 1, seed=1)],
    "update_recurrent_state": [lambda cache: feed(cache, 1, seed=1)],
    "update_indexer": [lambda cache: cache.update_indexer(torch.randn(3, 1, 4), 0)],
    "crop": [
        *(lambda cache, n=n: cache.crop(-n) for n in (0, 1, 4, 5, 12, 20, 99)),
        lambda cache: cache.crop(torch.tensor(-3)),
    ],
    "reorder_cache": [
        lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
        lambda cache: cache.reorder_cache(torch.tensor([1])),
    ],
    "batch_repeat_interleave": [*(lambda cache, n=n: cache.batch_repeat_interleave(n) for n in (1, 2))],
    "batch_select_indices": [
        lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([2, 1, 1, 0])),
    ],
    "offload": [*(lambda cache, i=i: cache.offload(i, only_non_sliding=False) for i in range(2))],
    "prefetch": [lambda cache: cache.prefetch(0)],  # both raise: they were not made with offloading
    "early_initialization": [lambda cache: cache.early_initialization(3, HEADS, DIM, torch.float32, "cpu")],
    "activate_past_recording": [lambda cache: (cache.activate_past_recording(), feed(cache, 9, seed=2))],
}
# What is covered by a test of its own below.
ALONE = {"reset", *BATCH}


def public(cls: type) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")}


def test_every_public_name_is_covered() -> None:
    known = {*PROPERTIES, *PER_LAYER, *CALLS, *ALONE}
    names = public(Cache) | public(DynamicCache)
    assert names <= known, f"transformers has new names of caches: list and compare {sorted(names - known)}"
    special = {name for cls in (Cache, DynamicCache) for name in vars(cls) if name.startswith("__")}
    assert special <= {
        *("__init__", "__len__", "__iter__", "__repr__"),  # compared, but for the text
        *("__dict__", "__doc__", "__module__", "__weakref__", "__firstlineno__", "__static_attributes__"),
        "__slotnames__",  # which copying one leaves
    }


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("name", [name for name in CALLS if name not in ALONE and hasattr(Cache, name)])
def test_method(name: str, kind: str) -> None:
    for call in CALLS[name]:
        pair = caches(kind)
        check(*pair)
        for cache in pair:
            feed(cache, 20)
        check(*pair)
        theirs, ours = (answer(lambda call=call, cache=cache: call(cache)) for cache in pair)
        if name.startswith("update") and isinstance(theirs, list):
            assert len(theirs) == len(ours)
            for pairs in zip(theirs, ours, strict=True):
                for x, y in zip(*pairs, strict=True):
                    # Of a window, whole pages; the mask knows where they begin.
                    assert torch.equal(x, y[:, :, -x.shape[2] :]) and (kind == "sliding" or x.shape == y.shape)
        elif isinstance(theirs, type):
            if kind == "sliding" and name == "crop" and ours is None:
                continue  # ours has kept what the last step might want back
            assert (issubclass(ours, theirs) and kind != "full") or name in ("prefetch", "update_indexer")
            continue  # after an error the oracle itself is in an odd state
        check(*pair)


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_a_life(kind: str) -> None:
    """Calls one after the other, as decoding makes them."""
    pair = caches(kind)
    for cache in pair:
        cache.early_initialization(2, HEADS, DIM, torch.float32, torch.device("cpu"))
        cache.activate_past_recording()
    check(*pair)
    steps: list[Callable[[Cache], Any]] = [
        lambda cache: feed(cache, 11, batch=2),
        lambda cache: cache.batch_repeat_interleave(3),
        lambda cache: feed(cache, 6, batch=6, seed=1),
        lambda cache: cache.crop(-2),
        lambda cache: cache.reorder_cache(torch.tensor([5, 5, 0, 1, 2, 3])),
        lambda cache: feed(cache, 1, batch=6, seed=2),
        lambda cache: cache.crop(0),
        lambda cache: cache.batch_select_indices(torch.tensor([4, 1])),
        lambda cache: feed(cache, 30, batch=2, seed=3),
        lambda cache: cache.crop(-9),
        lambda cache: feed(cache, 1, batch=2, seed=4),
    ]
    for step in steps:
        for cache in pair:
            step(cache)
        check(*pair)


@pytest.mark.parametrize(
    "indices",
    [
        [True, False, True],
        [-1, 0],
        [0, 2],
    ],
    ids=str,
)
def test_what_indexes_a_tensor_selects_sequences(indices: list[int] | list[bool]) -> None:
    pair = caches("full")
    for cache in pair:
        feed(cache, 20)
        cache.batch_select_indices(torch.tensor(indices))
    check(*pair)


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("kind", list(MODELS))
def test_reset(kind: str, batch: int) -> None:
    """Reset is as good as new, with any batch size; so the oracle is a new cache."""
    fresh, cache = caches(kind)
    feed(cache, 20)
    cache.reset()
    for each in (fresh, cache):
        feed(each, 10, batch=batch, seed=1)
    check(fresh, cache)


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("name", [name for name in BATCH if hasattr(Cache, name)])
def test_batch_size(name: str, kind: str) -> None:
    theirs, ours = caches(kind)
    for cache in (theirs, ours):
        feed(cache, 20)
    assert getattr(ours, name) == 3 and getattr(theirs, name) in (-1, 3)
    ours.reorder_cache(torch.tensor([1, 2]))
    assert {layer.batch_size for layer in ours.layers if isinstance(layer, PagedLayer)} == {2}


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_copies_and_conversions(kind: str) -> None:
    """A deep copy goes its own way, a shallow one does not, and a ``DynamicCache`` can be made of ours."""
    pair = caches(kind)
    for cache in pair:
        feed(cache, 20)
    twins, shallow = [copy.deepcopy(cache) for cache in pair], [copy.copy(cache) for cache in pair]
    for each in (*pair, *twins):
        feed(each, 3, seed=1 if each in pair else 2)
    check(*pair)
    check(*twins)
    check(*shallow)
    assert observe(twins[1]) != observe(pair[1]) == observe(shallow[1])
    if kind == "full":  # of a window, a cache made of a cache forgets the positions
        check(DynamicCache(pair[0]), DynamicCache(pair[1]))


def test_inside_an_encoder_decoder_cache() -> None:
    """Its methods are about two caches; ours in both places."""
    pairs = [EncoderDecoderCache(*(caches("full")[side] for _ in range(2))) for side in range(2)]
    for cache in pairs:
        feed(cache.self_attention_cache, 20)
        feed(cache.cross_attention_cache, 17, seed=1)
    for call in (
        lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])),
        lambda cache: cache.crop(-6),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([5, 0])),
        copy.deepcopy,
    ):
        for cache in pairs:
            call(cache)
        for name in ("self_attention_cache", "cross_attention_cache"):
            check(*(getattr(cache, name) for cache in pairs))
    assert pairs[0].get_seq_length() == pairs[1].get_seq_length() == 14


def test_every_kind_of_layer_is_there() -> None:
    """The three models have what their names say."""
    found = {kind: {type(layer).__name__ for layer in caches(kind)[1].layers} for kind in MODELS}
    assert found["full"] == {"QuantizedPagedLayer"} and all(name in ARCHITECTURES for name in MODELS.values())
    assert found["sliding"] > found["full"] and found["linear"] > found["full"] and len(found["linear"]) == 2
