"""Bit fields in bytes, and fp16 numbers rounded to the safe side.

Fields narrower than a byte are packed as *fractions of the head*: with n = 8 / bits fields in a byte, byte j holds
channels j, j + D/n, j + 2 D/n, ... from the low bits up.  Each byte is then loaded once and each field meets a whole
fraction of the query (LMDeploy packs the same way).
"""

import functools

import torch

# What a 4-bit code of an integer codec stands for.
INTEGERS = tuple(map(float, range(16)))


def pack_fields(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes ``[..., D]``, each below ``2**bits``, into uint8 ``[..., D * bits / 8]``; ``bits`` divides 8."""
    parts = codes.chunk(8 // bits, dim=-1)
    packed = parts[0].clone()
    for i, part in enumerate(parts[1:], start=1):
        packed |= part << (i * bits)
    return packed


def unpack_fields(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`pack_fields`: uint8 ``[..., D * bits / 8]`` to uint8 codes ``[..., D]``."""
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    return torch.cat([(packed >> (i * bits)) & mask for i in range(8 // bits)], dim=-1)


def round_saturating(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` (float32) rounded to ``dtype``; values outside its range become its ends instead of infinity."""
    limit = min(torch.finfo(dtype).max, torch.finfo(x.dtype).max)
    return x.clamp(-limit, limit).to(dtype)


_FP16_MAX = torch.finfo(torch.float16).max


def _neighbour(h: torch.Tensor, upwards: bool) -> torch.Tensor:
    """The fp16 number next to finite ``h``; fp16 has no ``nextafter`` on every device, so step through its bits."""
    bits = h.view(torch.int16)
    away_from_zero = (bits >= 0) if upwards else (bits < 0)
    stepped = torch.where(away_from_zero, bits + 1, bits - 1)
    smallest = torch.tensor(1 if upwards else -32767, dtype=torch.int16, device=h.device)  # +-2^-24
    return torch.where(h == 0, smallest, stepped).view(torch.float16)


def fp16_at_most(x: torch.Tensor) -> torch.Tensor:
    """Largest fp16 number <= ``x`` (float32).  Values outside the fp16 range saturate to its ends."""
    h = round_saturating(x, torch.float16)
    return torch.where((h.float() > x) & (h > -_FP16_MAX), _neighbour(h, upwards=False), h)


def fp16_at_least(x: torch.Tensor) -> torch.Tensor:
    """Smallest fp16 number >= ``x`` (float32).  Values outside the fp16 range saturate to its ends."""
    h = round_saturating(x, torch.float16)
    return torch.where((h.float() < x) & (h < _FP16_MAX), _neighbour(h, upwards=True), h)


@functools.lru_cache(maxsize=64)
def _byte_table(levels: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """What each byte stands for, field by field, float32 ``[256, fields]``; kept, because copies to a GPU stall it."""
    bits = len(levels).bit_length() - 1
    fields = [[levels[byte >> (i * bits) & (len(levels) - 1)] for i in range(8 // bits)] for byte in range(256)]
    return torch.tensor(fields, dtype=torch.float32, device=device)


def expand_levels(packed: torch.Tensor, levels: tuple[float, ...]) -> torch.Tensor:
    """``levels[code]`` for each packed code, float32 ``[..., D]`` from uint8 ``[..., D * bits / 8]``.

    ``levels`` has 2, 4 or 16 entries.  One look-up per byte instead of one per code, and no shifting and masking.
    """
    table = _byte_table(levels, packed.device)
    return torch.nn.functional.embedding(packed.int(), table).transpose(-1, -2).flatten(-2)
