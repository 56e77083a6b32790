"""What codecs declare of their kernels holds for the code that is compiled, which the interpreter does not take."""

from typing import Any

import pytest
import torch

from kvquant_hf.triton_kernels import target, unpack
from kvquant_hf.triton_kernels.codecs import CODECS


def called(function: Any) -> set[Any]:
    """The ``@triton.jit`` functions that ``function`` names, and those that these name."""
    names, found = set(function.fn.__code__.co_names), set()
    for name in names:
        other = function.fn.__globals__.get(name)
        if hasattr(other, "fn") and hasattr(other.fn, "__code__"):
            found |= {other, *called(other)}
    return found


@pytest.mark.parametrize("name", CODECS)
def test_subnormal_codes_are_declared(name: str) -> None:
    """Unpacking to integers gives code * 2^-24 in PTX; who does not say so would multiply by codes that are all but
    zero."""
    kernel = CODECS[name].kernel
    assert kernel is not None
    integers = {unpack.unpack_codes, unpack.unpack_ranked_4, unpack.unpack_ranked_3, unpack.unpack_ranked_2}
    assert bool(integers & called(kernel.tile)) == kernel.integer_codes


@pytest.mark.parametrize("bits", unpack.RANKED_UNITS)
def test_parts_without_bits_have_no_levels(bits: int) -> None:
    kernel = CODECS[f"int{bits}-ranked"].kernel
    assert kernel is not None and len(unpack.RANKED_UNITS[bits]) == kernel.levels
    assert (kernel.levels < kernel.parts) == (bits == 2)


@pytest.mark.parametrize("head_dim", [72, 24])
def test_orders_are_read_by_fours(head_dim: int) -> None:
    kernel = CODECS["int3-ranked"].kernel
    assert kernel is not None
    with pytest.raises(ValueError, match="multiple of 16"):
        kernel.constants("K", head_dim, torch.float16, ptx=True)


def test_the_check_sees_through_functions() -> None:
    assert unpack.unpack_codes in called(CODECS["int8-token"].kernel.tile)
    assert unpack.unpack_codes not in called(CODECS["lloyd2"].kernel.tile)


def test_each_gpu_is_asked_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the current one, under whose name the answer for another would be kept."""

    class Properties:
        def __init__(self, major: int, minor: int) -> None:
            self.major, self.minor = major, minor

    gpus = [Properties(9, 0), Properties(7, 5), Properties(12, 0)]
    monkeypatch.setattr(target, "_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    target._of_device.cache_clear()
    try:
        asked = [torch.device("cuda", 1), torch.device("cuda", 0), torch.device("cuda")]
        assert [target.architecture(device) for device in asked] == ["sm_75", "sm_90", "sm_120"]
    finally:
        target._of_device.cache_clear()
