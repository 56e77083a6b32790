"""Weights in blocks by the compiled kernels; ``../blocks.py`` has their layouts."""

import torch

from ..blocks import BlockFormat, parts
from .native import DTYPES, MULTIPLY, UNPACK, library

# Rows of ``x`` up to which a row of weights is multiplied as soon as it is unpacked.  Beyond, torch's matrix product
# earns back that what is unpacked goes through memory once.
FUSED_ROWS = 16


def unpack_cpu(blocks: torch.Tensor, known: BlockFormat, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """``unpack_reference`` in float32, bfloat16 or float16.

    Args:
        blocks: ``[rows, bytes]`` uint8 on the CPU, each row's bytes together.
        known: their format.
        columns: of a row.
        dtype: what to round to, to nearest.

    Returns:
        ``[rows, columns]``.

    Raises:
        BuildError: the kernels cannot be compiled here.
    """
    compiled = library()
    out = torch.empty(blocks.shape[0], columns, dtype=dtype)
    matrix = (blocks.data_ptr(), known.code, blocks.shape[0], columns, blocks.stride(0))
    compiled.unpack(UNPACK.pack(*matrix, out.data_ptr(), DTYPES[dtype], torch.get_num_threads(), compiled.fork))
    return out


def multiply_cpu(x: torch.Tensor, blocks: torch.Tensor, known: BlockFormat) -> torch.Tensor:
    """``multiply_reference``; few rows of ``x`` are multiplied in float32, with weights that are not rounded.

    Args:
        x: ``[n, columns]``, float32, bfloat16 or float16, on the CPU.
        blocks: ``[rows, bytes]`` uint8 on the CPU, each row's bytes together.
        known: their format.

    Returns:
        ``[n, rows]`` in the dtype of ``x``.

    Raises:
        BuildError: the kernels cannot be compiled here.
    """
    n, columns = x.shape
    if n > FUSED_ROWS:
        out = x.new_empty(n, blocks.shape[0])
        for start, part in parts(blocks, columns):
            out[:, start : start + part.shape[0]] = x @ unpack_cpu(part, known, columns, x.dtype).T
        return out
    compiled = library()
    single = x.float().contiguous()
    product = torch.empty(n, blocks.shape[0])
    matrix = (blocks.data_ptr(), known.code, blocks.shape[0], columns, blocks.stride(0))
    where = (single.data_ptr(), n, product.data_ptr())
    compiled.multiply(MULTIPLY.pack(*matrix, *where, torch.get_num_threads(), compiled.fork))
    return product.to(x.dtype)
