"""Decode steps on a GPU that is not there; a script, because Triton decides on its interpreter for a whole process.

Prints one JSON object, by policy: kernels compiled after each context, and Python functions called per layer and step.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import host_cost

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.triton_kernels.append import _append_kernel
from kvquant_hf.triton_kernels.combine import _combine_kernel, _combine_rows_kernel
from kvquant_hf.triton_kernels.decode import _decode_kernel
from kvquant_hf.triton_kernels.rotate import _rotate_kernel

# Page tables and splits of which Triton could assume something, were it let: 1, a multiple of 16, neither.
CONTEXTS = (100, 16 * 64 + 5, 5000)
OFFSETS = (0, 1, 4)  # elements of 2 bytes: aligned to 16 bytes or not
KERNELS = (_append_kernel, _decode_kernel, _combine_kernel, _combine_rows_kernel, _rotate_kernel)
LAYERS, HEADS, GROUP, DIM = 2, host_cost.HEADS, host_cost.GROUP, host_cost.DIM


def compiled() -> int:
    """Kernels that Triton has compiled so far."""
    return sum(len(kernel.device_caches[0][0]) for kernel in KERNELS)


def shifted(heads: int, offset: int) -> torch.Tensor:
    """One token of one sequence, ``offset`` elements behind an aligned address."""
    return torch.zeros(heads * DIM + offset, dtype=torch.bfloat16)[offset:].view(1, heads, 1, DIM)


def steps(cache: Any, context: int) -> None:
    """A step at each alignment, without a mask and with one as wide as the cache says."""
    for offset in OFFSETS:
        for masked in (False, True):
            for layer in range(LAYERS):
                keys, values = cache.update(shifted(HEADS, offset), shifted(HEADS, offset), layer)
                mask = torch.ones(1, 1, 1, keys.shape[2], dtype=torch.bool) if masked else None
                attend = host_cost.ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", host_cost.sdpa_attention_forward)
                attend(host_cost._Attention(), shifted(HEADS * GROUP, offset), keys, values, mask, scaling=0.1)


def variants(policy: str, static: bool) -> list[int]:
    """Kernels compiled after each of ``CONTEXTS``."""
    counts = []
    for context in CONTEXTS:
        width = context // 64 + 16
        options: dict[str, Any] = {"static": True, "max_length": width * 64 + 1} if static else {}
        cache = QuantizedPagedCache(host_cost.config(), policy, impl="triton", **options)
        cache._log.out_of_range = True
        host_cost.filled(cache, context)
        steps(cache, context)
        counts.append(compiled())
    return counts


def main() -> None:
    host_cost.pretend()
    host_cost.LAYERS = LAYERS
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with torch.no_grad():
        for policy in sys.argv[1:]:
            found[policy] = {
                "static": variants(policy, static=True),
                "growing": variants(policy, static=False),
                "calls": {
                    "static": host_cost.calls(host_cost.step_of(host_cost.ours(policy, static=True))),
                    "growing": host_cost.calls(host_cost.step_of(host_cost.ours(policy, static=False))),
                },
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
