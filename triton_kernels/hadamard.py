"""The orthonormal Hadamard rotation, for any head_dim.

Sylvester's Walsh-Hadamard matrix divided by sqrt(n), symmetric and its own inverse.  A head_dim that is no power of two
is rotated in blocks of its largest power-of-two divisor (80 = 5 x 16, 96 = 3 x 32, 192 = 3 x 64).  The package
fast_hadamard_transform does the work on CUDA tensors where it is installed.
"""

import functools

import torch

try:
    from fast_hadamard_transform import hadamard_transform as _fast_transform
except ImportError:  # the extra "fht" is optional
    _fast_transform = None


def hadamard_block(head_dim: int) -> int:
    """Order of the rotation's blocks: the largest power of two that divides ``head_dim``."""
    return head_dim & -head_dim


@functools.lru_cache(maxsize=32)
def hadamard_signs(order: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Sylvester's Hadamard matrix ``[order, order]``, entries +-1; ``order`` is a power of two."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while matrix.shape[0] < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Rotate the last dimension of ``x`` ``[..., head_dim]``; dtype and shape stay, and twice is the identity."""
    head_dim = x.shape[-1]
    order = hadamard_block(head_dim)
    blocks = x.reshape(*x.shape[:-1], head_dim // order, order)
    if _fast_transform is not None and x.is_cuda and x.dtype != torch.float64:
        rotated = _fast_transform(blocks, order**-0.5)
    else:
        # One matrix product: at order <= 256 faster than log2(order) butterfly passes over memory.  The factor comes
        # after it: products with +-1 are exact, even in TF32 for vectors that were fp16 or bf16.
        rotated = (blocks @ hadamard_signs(order, x.dtype, x.device)) * order**-0.5
    return rotated.reshape(x.shape)
