"""What codecs declare of their kernels holds for the code that is compiled, which the interpreter does not take."""

from typing import Any

import pytest

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
    """``unpack_codes`` gives code * 2^-24 in PTX; who does not say so would multiply by codes that are all but zero."""
    kernel = CODECS[name].kernel
    assert kernel is not None
    assert (unpack.unpack_codes in called(kernel.tile)) == kernel.integer_codes


def test_the_check_sees_through_functions() -> None:
    assert unpack.unpack_codes in called(CODECS["int8-token"].kernel.tile)
    assert unpack.unpack_codes not in called(CODECS["lloyd2"].kernel.tile)


def test_each_gpu_is_asked_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the current one, under whose name the answer for another would be kept."""
    import torch

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
