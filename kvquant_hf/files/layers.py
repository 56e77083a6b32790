"""What one layer of a cache holds, as JSON and tensors, and back.

Paged layers hand over their store's planes as they are; layers of transformers' own hand over all their attributes.  A
layer says its kind (the name of its class) and a version; ``PagedStore.SAVED`` names the integers that a store keeps.
"""

import json
from importlib.metadata import version
from typing import Any

import torch

from ..errors import SavedCacheError, WrongModelError
from ..layers.paged import PagedLayer
from ..layers.sliding import SlidingPagedLayer
from ..layers.static import StaticPagedLayer
from ..pages.parameters import in_pages
from ..pages.queries import SAVED
from ..pages.store import PagedStore
from ..triton_kernels.codecs import Plane
from .checked import Tensors

_LAYER_VERSION = 1
_FROM_CONFIG = ("sliding_window", "number_of_states")  # what transformers' layers have from the model's config


def save_layer(layer: Any) -> tuple[dict[str, Any], Tensors]:
    """JSON and tensors of one layer.

    Raises:
        SavedCacheError: it holds something that the file format does not have, or is static.
    """
    if isinstance(layer, StaticPagedLayer):
        raise SavedCacheError(
            "a static cache is not saved, because its memory belongs to graphs; fill one without static=True to save."
        )
    state, tensors = _paged_state(layer) if isinstance(layer, PagedLayer) else _other_state(layer)
    described = {"kind": type(layer).__name__, "version": _LAYER_VERSION, "window": _window(layer), "state": state}
    return described, tensors


def _window(layer: Any) -> int | None:
    """Window of a sliding layer that is paged."""
    return layer.window if isinstance(layer, SlidingPagedLayer) else None


def _paged_state(layer: PagedLayer) -> tuple[dict[str, Any] | None, Tensors]:
    """JSON and tensors of a paged layer; None before its first tokens."""
    if layer.store is None:
        return None, {}
    integers = {name: getattr(layer.store, name) for name in layer.store.SAVED}
    return {"integers": integers, "codecs": _declarations(layer.store)}, snapshot(layer.store)


def snapshot(store: PagedStore) -> Tensors:
    """The content of a store, for ``PagedStore.restore``; views of its own tensors where that saves a copy.

    Returns:
        ``table``: int32 ``[batch, sealed_pages]`` on the CPU, rows of the planes.  ``<side>.<plane>``: pages in use,
        ``[pages, *plane]``, each once however many sequences share it.  ``<side>.open``: the used part of the open
        page, ``[batch, heads, tokens, head_dim]``.  ``first_at`` and ``<side>.first``: as of ``FirstTokens.saved``.
        ``keys.moments``, ``keys.correlations``: second moments of queries, where some were seen.
    """
    view = store.view()
    pages, table = view.page_table.unique(return_inverse=True)
    count = len(pages)
    gapless = count == 0 or int(pages[-1]) == count - 1
    tensors: Tensors = Tensors({"table": table.to("cpu", torch.int32)} | store.first.saved())
    for name, side in zip(("keys", "values"), view[:2], strict=True):
        for plane, rows in zip(in_pages(side.codec, side.head_dim), side.planes, strict=False):
            tensors[f"{name}.{plane.name}"] = rows[:count] if gapless else rows[pages]
        tensors[f"{name}.open"] = side.tail[:, :, : view.tail_length]
    return tensors if store.seen is None else tensors | store.seen.tensors()


def _declarations(store: PagedStore) -> list[Any]:
    """What the bytes of a page mean, for keys and for values: a codec that declares something else cannot read them."""
    return [
        [side.codec.name, side.codec.bits, side.codec.rotated, [_plane(p) for p in side.codec.planes(side.head_dim)]]
        for side in store.view()[:2]
    ]


def _plane(plane: Plane) -> list[Any]:
    return [plane.name, str(plane.dtype), plane.per, plane.width]


def _other_state(layer: Any) -> tuple[dict[str, Any], Tensors]:
    """JSON and tensors of a layer of transformers' own: all its attributes."""
    tensors = Tensors()

    def describe(value: Any, name: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, torch.Tensor):
            tensors[name] = value.clone()  # attributes may be views of one memory, which safetensors refuses
            return {"tensor": name}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": None}  # chosen when it is loaded
        if isinstance(value, dict) and all(isinstance(key, int | str) for key in value):
            return {"dict": [[key, describe(item, f"{name}.{key}")] for key, item in value.items()]}
        raise SavedCacheError(
            f"{type(layer).__name__}.{name} holds a {type(value).__name__}, which the file format does not have; keep "
            "this cache in memory (copy.deepcopy(cache)) instead."
        )

    return {name: describe(value, name) for name, value in vars(layer).items()}, tensors


def restore_layer(
    layer: Any, saved: dict[str, Any], tensors: Tensors, device: torch.device, where: str, transformers: str
) -> None:
    """Fill one empty layer with what :func:`save_layer` gave.

    Args:
        layer: as a cache for the same config makes it.
        saved: the JSON.
        tensors: the tensors, copied here.
        device: where they are to live.
        where: what an error names.
        transformers: the version that saved them.

    Raises:
        SavedCacheError: another kind of layer, other codecs, another transformers, or tensors that do not fit together.
        WrongModelError: the layer belongs to a model with other sliding windows.
        KeyError, TypeError: JSON of another structure.
    """
    kind, state = type(layer).__name__, saved["state"]
    if (saved["kind"], saved["version"]) != (kind, _LAYER_VERSION):
        raise SavedCacheError(
            f"{where} is a {saved['kind']} (version {saved['version']}), here it would be a {kind} (version "
            f"{_LAYER_VERSION}); load it with the versions that wrote it, or make the cache again."
        )
    if isinstance(layer, PagedLayer):
        _check_window(_window(layer), saved["window"], "window", where)
        if state is not None:
            _restore_paged(layer, state, tensors, device, where)
        return
    installed = version("transformers")
    if transformers.split(".")[:2] != installed.split(".")[:2]:
        raise SavedCacheError(
            f"{where} is a {kind} as transformers {transformers} keeps it, this is transformers {installed}; install "
            "that version, or make the cache again."
        )
    values = {name: _value(described, tensors, device) for name, described in state.items()}
    for name in _FROM_CONFIG:
        _check_window(getattr(layer, name, None), values.get(name), name, where)
    vars(layer).update(values)


def _check_window(own: int | None, saved: int | None, name: str, where: str) -> None:
    """Refuse the layer of a model with another window, which the fingerprint does not tell apart."""
    if own != saved:
        raise WrongModelError(
            f"{where} has {name} {saved}, the config given has {own}; load it with the config of the model that filled "
            "it."
        )


def _value(described: Any, tensors: Tensors, device: torch.device) -> Any:
    """The inverse of ``describe`` in :func:`_other_state`."""
    if not isinstance(described, dict):
        return described
    ((what, content),) = described.items()
    if what == "tensor":
        return tensors[content].clone().to(device)
    if what == "dtype":
        return getattr(torch, content)
    if what == "dict":
        return {key: _value(item, tensors, device) for key, item in content}
    return device


def _restore_paged(
    layer: PagedLayer, state: dict[str, Any], tensors: Tensors, device: torch.device, where: str
) -> None:
    """Fill one empty paged layer, after checking that every tensor is what its store would have saved."""
    like = tensors["keys.open"], tensors["values.open"]
    expect(all(x.ndim == 4 and x.is_floating_point() for x in like), where)
    layer.initialize(like[0].to(device), like[1].to(device))
    store = layer.store
    assert store is not None
    if json.loads(json.dumps(_declarations(store))) != state["codecs"]:
        raise SavedCacheError(
            f"{where} was written with the codecs {state['codecs']}, which this version stores as "
            f"{_declarations(store)}; load it with the version of kvquant-hf that wrote it, or make the cache again."
        )
    empty, integers = {name: x for name, x in snapshot(store).items() if name not in SAVED}, state["integers"]
    if moments := {name: tensor.to(device) for name, tensor in tensors.items() if name in SAVED}:
        expect(store.seen is not None and store.seen.fits(moments, store.batch_size), where)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in moments}
    first = {"keys.first", "values.first"} & tensors.keys() if store.first.count else set()
    expect(tensors.keys() - first == empty.keys() and set(integers) <= set(store.SAVED), where)
    for name in empty:
        tensor = tensors[name]
        # The dimensions that are 0 in an empty store are those that vary.
        fits = [held in (0, new) for held, new in zip(empty[name].shape, tensor.shape, strict=False)]
        expect(tensor.ndim == empty[name].ndim and tensor.dtype == empty[name].dtype and all(fits), where)
    rows = set(empty) - {"table", "first_at", "keys.open", "values.open"}
    pages = {tensors[name].shape[0] for name in rows}
    tokens = {x.shape[2] for x in like}
    expect(len(pages) == len(tokens) == 1 and tokens <= set(range(store.page_size + 1)), where)
    # Every page is somebody's, and nobody points elsewhere.
    expect(torch.equal(tensors["table"].unique(), torch.arange(*pages, dtype=torch.int32)), where)
    expect(all(type(x) is int and x >= 0 for x in integers.values()), where)
    if store.first.count:
        _check_first(store, tensors, where)
    store.restore(tensors, integers)
    if store.seen is not None and moments:
        store.seen.restore(moments)


def _check_first(store: PagedStore, tensors: Tensors, where: str) -> None:
    """Refuse first tokens that lie in no sealed page, are of another shape than the ``store``'s, or are missing."""
    at = tensors["first_at"]
    sealed = tensors["table"].shape[1] * store.page_size
    held = bool((at >= 0).any())
    expect(bool(((at >= -2) & (at < sealed)).all()) and held == ("keys.first" in tensors), where)
    for side in ("keys", "values") if held else ():
        rows, like = tensors[f"{side}.first"], tensors[f"{side}.open"]
        shape = (*like.shape[:2], store.first.count, like.shape[3])
        expect(rows.dtype == like.dtype and rows.shape == shape, where)


def inconsistent(where: str) -> SavedCacheError:
    """The error for content that contradicts itself."""
    return SavedCacheError(f"{where} is inconsistent; save the cache again.")


def expect(condition: bool, where: str) -> None:
    """Raise :func:`inconsistent` unless ``condition``."""
    if not condition:
        raise inconsistent(where)
