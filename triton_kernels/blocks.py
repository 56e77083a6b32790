"""Weights of 4 to 8 bits in the blocks of GGUF files: their layouts, and how they are read, in plain torch.

A row of a matrix is a whole number of blocks.  A block is what follows, byte after byte, little endian; ``d``, ``m``
are fp16, ``q`` are codes, and an element is ``d * q`` or ``d * q + m``:

======  ========  =====  ===========================================================================================
type    elements  bytes  layout
======  ========  =====  ===========================================================================================
Q4_0          32     18  d, 16 bytes: element i in the low 4 bits of byte i, i + 16 in the high ones; q - 8
Q4_1          32     20  d, m, 16 bytes as in Q4_0
Q5_0          32     22  d, 4 bytes of fifth bits, element i's in bit i, 16 bytes as in Q4_0; q - 16
Q5_1          32     24  d, m, 4 bytes, 16 bytes as in Q5_0
Q8_0          32     34  d, 32 signed bytes
Q4_K         256    144  d, dm, 12 bytes of scales, 128 bytes: of 64 elements the first 32 in the low 4 bits
Q5_K         256    176  d, dm, 12 bytes of scales, 32 bytes of fifth bits, 128 bytes as in Q4_K
Q6_K         256    210  128 bytes of low 4 bits, 64 of high 2 bits, 16 signed bytes of scales, d; q - 32
======  ========  =====  ===========================================================================================

Q4_K and Q5_K have for each 32 elements a scale ``s`` and a minimum ``n`` of 6 bits: ``(d * s) * q - dm * n``; Q6_K has
a scale for each 16: ``(d * s) * q``.  All of it is computed in float32, in this order.

Source: ggml's ``ggml-quants.c`` defines the formats; the numbers are those of llama.cpp.
"""

from typing import NamedTuple

import torch


class BlockFormat(NamedTuple):
    """``elements`` of a row lie in ``size`` bytes; ``code`` is the type's number in a file."""

    name: str
    code: int
    elements: int
    size: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of ``columns`` elements, a multiple of ``elements``."""
        return columns // self.elements * self.size


FORMATS = {
    known.name: known
    for known in (
        BlockFormat("Q4_0", 2, 32, 18),
        BlockFormat("Q4_1", 3, 32, 20),
        BlockFormat("Q5_0", 6, 32, 22),
        BlockFormat("Q5_1", 7, 32, 24),
        BlockFormat("Q8_0", 8, 32, 34),
        BlockFormat("Q4_K", 12, 256, 144),
        BlockFormat("Q5_K", 13, 256, 176),
        BlockFormat("Q6_K", 14, 256, 210),
    )
}


def unpack_reference(blocks: torch.Tensor, known: BlockFormat) -> torch.Tensor:
    """The numbers that ``blocks`` stand for.

    Args:
        blocks: ``[rows, bytes]`` uint8, ``known.row_bytes(columns)`` bytes.
        known: their format.

    Returns:
        ``[rows, columns]`` float32, on the same device.
    """
    rows = blocks.shape[0]
    data = blocks.reshape(-1, known.size)
    elements = _long(data, known.name) if known.elements == 256 else _short(data, known.name)
    return elements.reshape(rows, -1)


def _halves(data: torch.Tensor, start: int) -> torch.Tensor:
    """The fp16 number at byte ``start`` of each block, ``[blocks, 1]`` float32."""
    return data[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """Low 4 bits of all bytes, then the high ones: ``[..., n]`` uint8 to ``[..., 2 n]``."""
    return torch.cat((data & 15, data >> 4), dim=-1)


def _short(data: torch.Tensor, name: str) -> torch.Tensor:
    """Blocks of 32, ``[blocks, bytes]`` to ``[blocks, 32]``."""
    scale = _halves(data, 0)
    if name == "Q8_0":
        return scale * data[:, 2:].contiguous().view(torch.int8).float()
    at = 4 if name.endswith("1") else 2
    middle = 0
    if name.startswith("Q5"):
        places = torch.arange(32, device=data.device, dtype=torch.uint8)
        fifth = data[:, at : at + 4].repeat_interleave(8, dim=1) >> (places % 8) & 1
        codes, middle = _nibbles(data[:, at + 4 :]) | fifth << 4, 16
    else:
        codes, middle = _nibbles(data[:, at:]), 8
    if name.endswith("1"):
        return scale * codes.float() + _halves(data, 2)
    return scale * (codes.float() - middle)


def _six_bits(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of 6 bits out of 12 bytes: two ``[blocks, 8]`` float32."""
    first, second, third = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat((first & 63, (third & 15) | (first >> 6) << 4), dim=1)
    minima = torch.cat((second & 63, (third >> 4) | (second >> 6) << 4), dim=1)
    return scales.float(), minima.float()


def _long(data: torch.Tensor, name: str) -> torch.Tensor:
    """Blocks of 256, ``[blocks, bytes]`` to ``[blocks, 256]``."""
    blocks = data.shape[0]
    if name == "Q6_K":
        low = _nibbles(data[:, :128].reshape(blocks, 2, 64))  # of 128 elements: 64 low nibbles, 64 high ones
        shifts = torch.tensor([0, 2, 4, 6], device=data.device, dtype=torch.uint8)[:, None]
        high = data[:, 128:192].reshape(blocks, 2, 1, 32) >> shifts & 3
        codes = (low | high.reshape(blocks, 2, 128) << 4).float() - 32
        scales = data[:, 192:208].contiguous().view(torch.int8).float()
        steps = _halves(data, 208) * scales
        return (steps[..., None] * codes.reshape(blocks, 16, 16)).reshape(blocks, 256)
    scales, minima = _six_bits(data[:, 4:16])
    codes = _nibbles(data[:, -128:].reshape(blocks, 4, 32)).reshape(blocks, 8, 32)
    if name == "Q5_K":
        places = torch.arange(8, device=data.device, dtype=torch.uint8)[:, None]
        codes = codes | (data[:, None, 16:48] >> places & 1) << 4
    steps, offsets = _halves(data, 0) * scales, _halves(data, 2) * minima
    return (steps[..., None] * codes.float() - offsets[..., None]).reshape(blocks, 256)


def multiply_reference(x: torch.Tensor, blocks: torch.Tensor, known: BlockFormat) -> torch.Tensor:
    """``x`` times the transposed matrix, in the dtype of ``x``, some rows of the matrix unpacked at a time.

    Args:
        x: ``[n, columns]``, float32, bfloat16 or float16.
        blocks: ``[rows, bytes]`` uint8.
        known: their format.

    Returns:
        ``[n, rows]`` in the dtype of ``x``.
    """
    out = x.new_empty(x.shape[0], blocks.shape[0])
    for start, part in parts(blocks, x.shape[1]):
        out[:, start : start + part.shape[0]] = x @ unpack_reference(part, known).to(x.dtype).T
    return out


def parts(blocks: torch.Tensor, columns: int) -> "list[tuple[int, torch.Tensor]]":
    """First rows and slices of ``blocks`` that unpack to at most a million elements each, but at least one row."""
    step = max(1, (1 << 20) // columns)
    return [(start, blocks[start : start + step]) for start in range(0, blocks.shape[0], step)]
