"""What a codec tells the CPU kernels: which planes hold the parts of a tile, and what a code stands for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CpuCodec:
    """One codec as the CPU kernels see it.

    The first plane holds the codes, packed as in ``packing.py`` (``Codec.bits`` 1, 2, 4 or 8), or the vectors
    themselves in the model's dtype (16 bits).  The others are named here by their index, None where a codec lacks that
    part.

    Args:
        levels: what each code stands for, ``2 ** bits`` numbers; None for 8 bits, where a code stands for itself.
        slopes: as many numbers; the level of a code is ``levels[code] + residual * slopes[code]``.
        residual: plane of one number per token, see ``slopes``.
        token_scale, token_offset, channel_scale, channel_offset: planes of these parts of ``Tile``.
        zero_point: the plane ``token_offset`` holds a zero point z: the offset is ``-z * token_scale``.
        affine: pages are encoded by the rule of ``integer.py``: range rounded outwards to an fp16 step and offset.
        bucketed: ``Codec._encode`` takes the keyword ``bucket``, a function like ``lloyd_max.bucket``.
    """

    levels: tuple[float, ...] | None = None
    slopes: tuple[float, ...] | None = None
    residual: int | None = None
    token_scale: int | None = None
    token_offset: int | None = None
    channel_scale: int | None = None
    channel_offset: int | None = None
    zero_point: bool = False
    affine: bool = False
    bucketed: bool = False
