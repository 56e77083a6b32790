"""Scales, zero points, raw files and codes, to the bit, against numpy written down from LMDeploy's formulae alone."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from stores import fill

from kvquant_hf.calibration import Statistics, compute, write_turbomind
from kvquant_hf.errors import QParamsError
from kvquant_hf.pages.store import PagedStore
from kvquant_hf.triton_kernels.codecs import CODECS

F = np.float32
HEADS, DIM, LAYERS = 4, 6, 3


def statistics(seed: int = 0) -> tuple[Statistics, dict[tuple[int, str], np.ndarray]]:
    """Statistics of random keys and values ``[heads, tokens, head_dim]``, and these."""
    rng = np.random.default_rng(seed)
    data, tensors = {}, {}
    for layer in (0, 1, 3)[:LAYERS]:  # a layer between them has no cache of keys and values
        for side, dim in (("keys", DIM), ("values", DIM + 2)):
            x = (rng.normal(size=(HEADS, 50, dim)) * 3 + rng.normal(size=(HEADS, 1, dim)) * 9).astype(F)
            data[layer, side] = x
            for name, reduced in (("min", x.min(1)), ("max", x.max(1)), ("absmax", np.abs(x).max(1))):
                tensors[f"layers.{layer}.{side}.{name}"] = torch.from_numpy(reduced)
    return Statistics(tensors, ["a model"], {"text": "none"}), data


def naive_range(x: np.ndarray, symmetric: bool) -> tuple[F, F]:
    """Scale and zero point of all numbers of ``x``, one float32 operation at a time."""
    numbers = [F(value) for value in x.reshape(-1)]
    if symmetric:
        return F(max(F(abs(value)) for value in numbers) / F(127)), F(0)
    low, high = min(numbers), max(numbers)
    return F(F(high - low) / F(255)), F(F(low + high) / F(2))


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_scale_and_zero_point(per: str, symmetric: bool) -> None:
    found, data = statistics()
    qparams = compute(found, per=per, symmetric=symmetric)
    assert qparams.layers == [0, 1, 3] and qparams.model == ["a model"]
    assert qparams.facts == {"per": per, "symmetric": symmetric, "calibration": {"text": "none"}}
    for (layer, side), x in data.items():
        scale, zero = (parameter.numpy() for parameter in qparams.of(layer, side))
        assert scale.shape == zero.shape == (HEADS, x.shape[2]) and scale.dtype == zero.dtype == F
        for head in range(HEADS):
            for channel in range(x.shape[2]):
                part = x if per == "tensor" else x[head, :, channel]
                s, z = naive_range(part, symmetric)
                assert (scale[head, channel].tobytes(), zero[head, channel].tobytes()) == (s.tobytes(), z.tobytes())


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_turbomind_files(tp: int, symmetric: bool, tmp_path: Path) -> None:
    found, data = statistics()
    paths = write_turbomind(found, tmp_path, tp=tp, symmetric=symmetric)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}
    assert len(paths) == 3 * tp
    for layer in (0, 1, 3):
        for rank in range(tp):
            numbers = []
            for side in ("keys", "values"):
                mine = np.split(data[layer, side], tp)[rank]
                s, z = naive_range(mine, symmetric)
                numbers += [s] if symmetric else [s, z]
            content = (tmp_path / f"layers.{layer}.past_kv_scale.{rank}.weight").read_bytes()
            assert content == struct.pack(f"<{len(numbers)}f", *numbers)
            assert len(content) == (8 if symmetric else 16)


def test_one_rank_is_per_tensor(tmp_path: Path) -> None:
    found, _ = statistics()
    write_turbomind(found, tmp_path)
    qparams = compute(found)
    for layer in found.layers:
        file = np.fromfile(tmp_path / f"layers.{layer}.past_kv_scale.0.weight", dtype="<f4")
        sides = [parameter[0, 0] for side in ("keys", "values") for parameter in qparams.of(layer, side)]
        assert file.tolist() == torch.stack(sides).tolist()


def test_ranks_that_do_not_divide_the_heads(tmp_path: Path) -> None:
    with pytest.raises(QParamsError, match=r"4 heads, which 3 ranks cannot share; use another --tp"):
        write_turbomind(statistics()[0], tmp_path, tp=3)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(QParamsError, match="'tensor' or 'channel'"):
        compute(statistics()[0], per="head")


def naive_code(x: F, scale: F, zero: F) -> int:
    """Round half to even, saturate to int8."""
    quotient = F(F(x - zero) / scale) if scale > 0 else F(x - zero)
    return int(np.rint(np.clip(quotient, F(-128), F(127))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("per", "symmetric"), [("tensor", False), ("channel", False), ("channel", True)])
def test_codes_of_a_store(per: str, symmetric: bool, dtype: torch.dtype) -> None:
    """Every stored byte of every page, and every number read back; many are clipped, as two tokens were calibrated."""
    page = 8
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(2, HEADS, 2 * page + 1, DIM, generator=generator) for _ in range(2))
    sides = {"keys": (keys * 4).to(dtype), "values": (values + 1).to(dtype)}
    tensors = {}
    for side, x in sides.items():
        seen = x[:1, :, :2].float()
        tensors[f"layers.0.{side}.min"], tensors[f"layers.0.{side}.max"] = seen.amin((0, 2)), seen.amax((0, 2))
        tensors[f"layers.0.{side}.absmax"] = seen.abs().amax((0, 2))
    qparams = compute(Statistics(tensors, []), per=per, symmetric=symmetric)
    codecs = [CODECS["int8-static"].given(*qparams.of(0, side)) for side in sides]
    store = fill(PagedStore(codecs[0], codecs[1], page, *sides.values()), *sides.values(), chunk=5)
    assert len(store.pool.planes) == 2  # the parameters are in no page
    clipped = 0
    for name, plane in zip(sides, store.pool.planes, strict=True):
        scale, zero = (parameter.numpy() for parameter in qparams.of(0, name))
        stored, dense = plane[store.page_table.long()].numpy(), store.view().dense(name).float()
        for b, t, h, c in np.ndindex(2, 2 * page, HEADS, DIM):
            x = F(sides[name][b, h, t, c].item())
            code = naive_code(x, scale[h, c], zero[h, c])
            assert stored[b, t // page, h, t % page, c] == code + 128
            expected = torch.tensor(F(F(F(code) * scale[h, c]) + zero[h, c])).to(dtype)
            assert dense[b, h, t, c] == expected
            clipped += code in (-128, 127)
    assert clipped > 20


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(
    x=hnp.arrays("float32", 6, elements=st.floats(-(2.0**60), 2.0**60, width=32)),
    scale=st.sampled_from([0.0, 2.0**-30, 0.01, 1.0, 3.7, 2.0**40]) | st.floats(2.0**-20, 2.0**20, width=32),
    zero=st.floats(-(2.0**20), 2.0**20, width=32),
)
def test_codes_of_any_number(x: np.ndarray, scale: float, zero: float) -> None:
    halves = F(zero) + (np.arange(-140, 140, dtype=F) / 2) * F(scale)  # between two codes, and past both ends
    x = np.concatenate([x, halves])
    pair = torch.full((len(x),), scale), torch.full((len(x),), zero)
    codec = CODECS["int8-static"].given(*pair)
    codes = codec.encode(torch.from_numpy(x)[None])[0][0]
    assert codes.tolist() == [naive_code(value, F(scale), F(zero)) + 128 for value in x]


def test_a_codec_that_was_given_nothing() -> None:
    with pytest.raises(ValueError, match="no calibrated range yet; call given"):
        CODECS["int8-static"].encode(torch.zeros(8, 16))
    with pytest.raises(ValueError, match="'int8-token' has no planes per layer; give it none"):
        CODECS["int8-token"].given(torch.ones(2, 4), torch.ones(2, 4))
    assert CODECS["int8-token"].given() is CODECS["int8-token"]
