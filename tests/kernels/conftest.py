"""Kernels run compiled on a GPU, and in Triton's interpreter on the CPU without one.

Triton decides between the two when it is imported, for the whole process.  So the interpreter is switched on here if
nothing has imported Triton before; otherwise set ``TRITON_INTERPRET=1`` in the environment of a run of these tests.
"""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    """Where kernels run in this process; skips where they cannot."""
    tl = pytest.importorskip("triton.language", reason="Triton is not installed")
    # A function of Triton's own library, made when Triton was imported.
    interpreted = type(tl.max).__name__ == "InterpretedFunction"
    if torch.cuda.is_available():
        return torch.device("cpu" if interpreted else "cuda")
    if not interpreted:
        pytest.skip(
            "no GPU, and Triton was imported without its interpreter; run: TRITON_INTERPRET=1 pytest tests/kernels"
        )
    return torch.device("cpu")
