"""What a codec tells the CPU kernels: which planes hold the parts of a tile, and what a code stands for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CpuCodec:
    """One codec as the CPU kernels see it.

    The first plane holds the codes, packed as in ``packing.py`` (``Codec.bits`` 1, 2, 4 or 8; 3 bits are 2 of them, and
    a sign in another plane), or the vectors themselves in the model's dtype (16 bits).  The others are named here by
    their index, None where a codec lacks that part.

    Args:
        levels: what each code stands for, ``2 ** bits`` numbers; None for 8 bits, where a code stands for itself.
        middle: what is subtracted from an 8-bit code to get what it stands for: 0 or 128.
        signs: plane of signs, packed as in ``three_bit.py``.
        octets: codes are those of ``octet.py``: ``levels`` ends with its negatives, ``signs`` is a plane of third bits.
        slopes: as many numbers; the level of a code is ``levels[code] + residual * slopes[code]``.
        residual: plane of one number per token, see ``slopes``.
        token_scale, token_offset, channel_scale, channel_offset: planes of these parts of ``Tile``.
        zero_point: the plane ``token_offset`` holds a zero point z: the offset is ``-z * token_scale``.
        affine: pages are encoded by the rule of ``integer.py``: range rounded outwards to an fp16 step and offset.
        given: pages are encoded by the rule of ``static.py``, in a range that is there already.
        order: plane of the channel of each rank, where channels are ranked.
        covered: of ranked channels, how much of a range the grids of each quarter cover (``ranked.py``).
        floats: codes are those of ``small_float.py``, and pages are encoded by its rule.
        block_scale: plane of a scale for every 16 channels.
        bucketed: ``Codec._encode`` takes the keyword ``bucket``, a function like ``lloyd_max.bucket``, or,
            with ``octets``, like ``octet.search``.
    """

    levels: tuple[float, ...] | None = None
    slopes: tuple[float, ...] | None = None
    middle: int = 0
    signs: int | None = None
    octets: bool = False
    residual: int | None = None
    token_scale: int | None = None
    token_offset: int | None = None
    channel_scale: int | None = None
    channel_offset: int | None = None
    order: int | None = None
    covered: tuple[float, float, float, float] | None = None
    zero_point: bool = False
    affine: bool = False
    given: bool = False
    floats: bool = False
    block_scale: int | None = None
    bucketed: bool = False
