"""Cached keys and values are packed: what would write into them, through any view, is refused and never lost."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import prompt, tiny_llama
from transformers import DynamicCache, PreTrainedModel

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.errors import CacheMismatchError, KVQuantError, KVQuantFallbackWarning, StaleCarrierError
from kvquant_hf.transformers_api.names import with_cache

LAYOUTS: dict[str, dict[str, Any]] = {"paged": {}, "static": {"static": True, "max_length": 120}}
TOKENS = 70

# Each takes [batch, heads, tokens, head_dim] and gives something that shares its memory.
VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "itself": lambda x: x,
    "slice": lambda x: x[:, :, :50],
    "several indices": lambda x: x[:, 0, 3:9],
    "ellipsis and None": lambda x: x[..., None, 0],
    "select": lambda x: x.select(1, 0),
    "narrow": lambda x: x.narrow(2, 3, 5),
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(3, 0, 1, 2),
    "mT": lambda x: x.mT,
    "movedim": lambda x: x.movedim(1, 2),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "squeeze": lambda x: x[:1].squeeze(0),
    "expand": lambda x: x[:, :, :1].expand(-1, -1, 7, -1),
    "view": lambda x: x.view(-1),
    "view of a dtype": lambda x: x.view(torch.int32),
    "reshape": lambda x: x.reshape(x.shape[0], -1, x.shape[-1]),
    "flatten": lambda x: x.flatten(2),
    "unflatten": lambda x: x.unflatten(3, (2, -1)),
    "chunk": lambda x: x.chunk(2, -1)[1],
    "split": lambda x: x.split(30, 2)[0],
    "tensor_split": lambda x: x.tensor_split(3, 2)[2],
    "unbind": lambda x: x.unbind(1)[0],
    "iteration": lambda x: next(iter(x)),
    "diagonal": lambda x: x.diagonal(dim1=2, dim2=3),
    "unfold": lambda x: x.unfold(2, 4, 2),
    "as_strided": lambda x: x.as_strided((3, 2), (2, 1)),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "data of a view": lambda x: x[:, 0].data,
    "contiguous": lambda x: x[:, :1].contiguous(),
    "to": lambda x: x[:, 0].to("cpu"),
    "type_as": lambda x: x[:, 0].type_as(x),
    "einsum": lambda x: torch.einsum("bhtd->htdb", x),
    "view of a view of a view": lambda x: x.transpose(1, 2)[:, 4:].unsqueeze(0).mT,
}

# Each writes into its argument.
WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "setitem": lambda x: x.__setitem__(..., 0),
    "setitem of a mask": lambda x: x.__setitem__(x == x, 0),
    "setitem of an index": lambda x: x.__setitem__((torch.tensor([0]),), 1),
    "zero_": lambda x: x.zero_(),
    "mul_": lambda x: x.mul_(3),
    "+=": lambda x: x.__iadd__(1),
    "*=": lambda x: x.__imul__(2),
    "copy_": lambda x: x.copy_(torch.zeros(x.shape, dtype=x.dtype)),
    "unbound copy_": lambda x: torch.Tensor.copy_(x[...], torch.ones((), dtype=x.dtype)),
    "fill_": lambda x: torch.fill_(x, 1),
    "index_put_": lambda x: x.index_put_((torch.tensor([0]),), torch.ones((), dtype=x.dtype)),
    "index_fill_": lambda x: x.index_fill_(0, torch.tensor([0]), 0),
    "scatter_": lambda x: x.scatter_(0, torch.zeros((1,) * x.dim(), dtype=torch.long), 1),
    "masked_fill_": lambda x: x.masked_fill_(x == x, 0),
    "clamp_": lambda x: torch.clamp_(x, 0, 1),
    "relu": lambda x: torch.nn.functional.relu(x, inplace=True),
    "out=": lambda x: torch.add(torch.zeros(x.shape, dtype=x.dtype), 1, out=x),
    "foreach": lambda x: torch._foreach_zero_([x]),
    "init": lambda x: torch.nn.init.ones_(x),
    "data.zero_": lambda x: x.data.zero_(),
    "data=": lambda x: setattr(x, "data", torch.zeros(x.shape, dtype=x.dtype)),
    "set_": lambda x: x.set_(torch.zeros(x.shape, dtype=x.dtype)),
    "resize_": lambda x: x.resize_(1),
    "numpy": lambda x: x.numpy().fill(0),
    "asarray": lambda x: __import__("numpy").asarray(x).fill(0),
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama()


@pytest.fixture(params=LAYOUTS)
def cache(request: pytest.FixtureRequest, model: PreTrainedModel) -> QuantizedPagedCache:
    return filled(QuantizedPagedCache(model.config, "exact", page_size=16, **LAYOUTS[request.param]), model)


def filled(cache: Any, model: PreTrainedModel) -> Any:
    with torch.no_grad():
        model(prompt(1, TOKENS), **with_cache(cache))
    return cache


@pytest.fixture(autouse=True)
def no_fallback_warning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KVQuantFallbackWarning)
        yield


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("view", VIEWS)
def test_every_write_through_every_view_is_refused(view: str, mode: Any, cache: QuantizedPagedCache) -> None:
    layer = cache.layers[1]
    before = layer.values.clone()
    for name, write in WRITES.items():
        with mode(), pytest.raises((CacheMismatchError, ValueError), match=r"clone\(\)|read-only") as caught:
            write(VIEWS[view](layer.values))
            raise AssertionError(f"{name} was lost")
        assert isinstance(caught.value, KVQuantError) or name in ("numpy", "asarray"), name
    assert torch.equal(layer.values, before)


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_what_a_plain_tensor_gives(view: str, cache: QuantizedPagedCache) -> None:
    plain = cache.layers[1].values.clone()
    assert type(plain) is torch.Tensor
    mine, theirs = (VIEWS[view](x) for x in (cache.layers[1].values, plain))
    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
    assert torch.equal(mine, theirs)
    if view != "itself":
        assert mine.stride() == theirs.stride()


def test_what_does_not_share_memory_is_plain(cache: QuantizedPagedCache) -> None:
    """The first operation that is no view ends the detour through Python, and its result may be written."""
    for x in (cache.layers[0].keys, cache.layers[0].keys[:, :, :50], cache.layers[0].keys.mT):
        results = (x + 1, x.clone(), x @ x.mT, x.double(), torch.cat([x, x]), torch.softmax(x, -1), x.sum(), x == x)
        for result in results:
            assert type(result) is torch.Tensor
            result.zero_()


def test_reading_into_ones_own_memory_is_no_write(cache: QuantizedPagedCache) -> None:
    keys = cache.layers[0].keys
    for source in (keys, keys[:]):
        mine = torch.zeros(keys.shape)
        mine.copy_(source)
        assert torch.equal(mine, keys.clone())
        mine[:] = source
        mine += source
        torch.add(mine, source, out=mine)
        assert torch.equal(mine, 3 * keys.clone())


def test_what_a_write_that_is_refused_would_have_done(model: PreTrainedModel) -> None:
    """A write that is lost shows in the next logits, where ``DynamicCache`` is written."""
    theirs = filled(DynamicCache(config=model.config), model)
    mine = filled(QuantizedPagedCache(model.config, "exact"), model)
    with torch.no_grad():
        before = model(prompt(1, 5, seed=1), **with_cache(copy.deepcopy(theirs))).logits
    theirs.layers[1].values[:, :, :50] = 0
    with pytest.raises(CacheMismatchError, match=r"clone\(\).*crop\(\).*new cache"):
        mine.layers[1].values[:, :, :50] = 0
    edited = QuantizedPagedCache(model.config, "exact")  # as the message says
    for i, layer in enumerate(mine.layers):
        keys, values = layer.keys.clone(), layer.values.clone()
        if i == 1:
            values[:, :, :50] = 0
        edited.update(keys, values, i)
    with torch.no_grad():
        logits = [model(prompt(1, 5, seed=1), **with_cache(cache)).logits for cache in (theirs, edited)]
    # Torch's attention and ours round in another order on every processor; a lost write is a hundred times that.
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    assert (logits[0] - before).abs().max() > 0.01


# -- assignment --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["keys", "values"])
def test_setting_a_layers_keys_or_values(side: str, cache: QuantizedPagedCache) -> None:
    layer, other = cache.layers[0], "values" if side == "keys" else "keys"
    before = getattr(layer, side).clone()
    for value in (
        None,
        before,
        torch.zeros(1),
        getattr(layer, other),
        getattr(cache.layers[1], side),
        getattr(layer, side)[:, :, 10:],
        getattr(layer, side).half(),
        getattr(layer, side).to("meta"),
    ):
        with pytest.raises(CacheMismatchError, match=rf"{side} .* cannot be set; .*crop\(\).*offload=True.*new cache"):
            setattr(layer, side, value)
    for operator in ("+=", "-=", "*=", "/=", "//=", "%=", "**="):
        with pytest.raises(CacheMismatchError, match=r"clone\(\)"):
            exec(f"layer.{side} {operator} 2", {"layer": layer})
    assert torch.equal(getattr(layer, side), before)


@pytest.mark.parametrize("side", ["keys", "values"])
def test_setting_them_to_themselves(side: str, cache: QuantizedPagedCache, model: PreTrainedModel) -> None:
    layer = cache.layers[0]
    setattr(layer, side, getattr(layer, side))
    setattr(layer, side, getattr(layer, side).to("cpu"))
    setattr(layer, side, getattr(layer, side).to(torch.device("cpu")))
    empty = QuantizedPagedCache(model.config).layers[0]
    setattr(empty, side, None)
    assert getattr(empty, side) is None


def test_setting_them_to_what_they_were(model: PreTrainedModel) -> None:
    cache = filled(QuantizedPagedCache(model.config, "int4"), model)
    kept = cache.layers[0].keys
    cache.crop(-1)
    with pytest.raises(StaleCarrierError):
        cache.layers[0].keys = kept
