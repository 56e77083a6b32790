"""Triton where it is installed, and what the device is; the one place that knows whether a kernel can run.

Codecs and kernels import ``triton`` and ``tl`` from here, so that everything in plain torch works without Triton.
"""

import contextlib
import functools
import os
from collections.abc import Hashable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:

    class _Absent:
        """Stands for ``triton`` and ``tl`` where kernels are defined and never run."""

        def __getattr__(self, name: str) -> Any:
            return _Absent()

        def __call__(self, function: Any = None, *args: Any, **kwargs: Any) -> Any:
            return function

    triton = tl = _Absent()
    HAS_TRITON = False

__all__ = [
    "HAS_TRITON",
    "architecture",
    "compiled_for",
    "current",
    "has_ptx",
    "interpreting",
    "processors",
    "tl",
    "triton",
    "why_not",
]


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (environment variable ``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


# What kernels are is decided where they are defined; a change of the environment comes too late for them.
_INTERPRETED = interpreting()


def why_not(device: torch.device) -> str | None:
    """Why kernels cannot run on tensors of ``device``, as the end of a sentence with its remedy; None if they can."""
    if not HAS_TRITON:
        return "Triton is not installed; run: pip install triton"
    if device.type != "cuda" and not interpreting():
        return (
            f"the tensors are on {device.type!r}; move the model to a GPU, or set TRITON_INTERPRET=1 to try it slowly"
        )
    return None


@functools.lru_cache(maxsize=8)
def _of_driver(driver: Any) -> str:
    """What ``driver`` compiles for now."""
    target = driver.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


@functools.lru_cache(maxsize=64)
def _of_device(index: int) -> str:
    """Of the GPU ``index``, which need not be the current one; kept, because asking takes longer than a launch."""
    found = torch.cuda.get_device_properties(index)
    return found.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{found.major}{found.minor}"


def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``, or ``"cpu"`` under the interpreter: what Triton compiles for, on ``device``."""
    if _INTERPRETED:
        return "cpu"
    if device.type == "cuda":
        return _of_device(torch.cuda.current_device() if device.index is None else device.index)
    return _of_driver(triton.runtime.driver.active)


def compiled_for(tensor: torch.Tensor) -> Hashable:
    """What tells compiled kernels for ``tensor``'s device apart from others: the device, or for what is no GPU what
    Triton is told to compile for."""
    return tensor.device if tensor.is_cuda else architecture(tensor.device)


def has_ptx(device: torch.device) -> bool:
    """Whether kernels for ``device`` are compiled for an NVIDIA GPU, so that they may contain PTX."""
    return architecture(device).startswith("sm_")


_HERE = contextlib.nullcontext()


def current(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which the device of ``tensor`` is the current one, on which Triton launches."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


@functools.lru_cache(maxsize=8)
def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of ``device``; 1 under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
