"""What a codec tells the kernels: the functions that read and write its planes, and which parts of a tile it has.

These are ``@triton.jit`` functions that kernels receive as ``tl.constexpr``:

    tile(planes, page_head, offs_n, HEAD_DIM, PAGE, FIELDS, WORDS, DTYPE, TRANSPOSED, PTX)
        -> levels, token_scale, token_offset: a tuple of parts (``unpack.py``), each [N, WORDS] of DTYPE or, TRANSPOSED,
        [WORDS, N]; and two [N], float32.  PTX: the target is an NVIDIA GPU and DTYPE is fp16
    channels(planes, page_head, HEAD_DIM, FIELDS, WORDS)
        -> channel_scale, channel_offset: tuples of parts, each [WORDS], float32
    channel_of(planes, page_head, HEAD_DIM, FIELDS, WORDS)
        -> of a page whose channels are in an order of its own, the channel at each place: a tuple of parts, each
        [WORDS], int32
    order(planes, page_head, HEAD_DIM, FIELDS, WORDS)
        -> the same as a tuple of fields, each int32 [2 * WORDS], the two parts of a field one after the other
    narrow_channels(planes, page_head, HEAD_DIM, FIELDS, WORDS, DTYPE, PTX)
        -> what ``channels`` gives, in DTYPE
    encode(planes, page_head, x, offs_n, HEAD_DIM, PAGE, FIELDS, BYTES)
        stores every plane of one full page, given as x [PAGE, BYTES * FIELDS] in byte order (``pack.py``): float32 and
        rotated where the codec is, else in the model's dtype; padded columns are zero

``planes`` is the tuple of plane pointers, ``page_head`` = page * heads + head as int64; for a codec with planes per
layer the tuple ends with ``heads``, so that ``page_head % heads`` is their row.  A part that the codec does not have
(see the flags) may be anything; kernels never use it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..target import tl, triton


@dataclass(frozen=True)
class KernelCodec:
    """One codec as kernels see it.

    Args:
        tile: reads levels and token vectors of one page.
        channels: reads channel vectors of one page.
        encode: writes one page.
        fields: codes per byte.
        code_planes: planes that hold parts of one code, each read and unpacked beside the others.
        byte_codes: whether levels are unpacked from bytes; otherwise they are vectors in the model's dtype.
        token_scale, token_offset, channel_scale, channel_offset: which parts of ``Tile`` exist.
        integer_codes: whether levels are the codes themselves, as ``unpack_codes`` gives them: subnormal in PTX.
        unit: what levels are to be multiplied by.
        layer_planes: whether the codec has planes per layer.
        channel_of: reads the order of the channels of one page, where each has its own: for keys only, whose query can
            be read in that order.  What values add up has one order for all pages.
        order: reads the same for a query, with ``narrow_channels``; all three, or none.
        empty_parts: parts at the end that have no bits: ``tile`` and the scales of ``channels`` leave them out.
    """

    tile: Any
    channels: Any
    encode: Any
    fields: int = 1
    code_planes: int = 1
    byte_codes: bool = True
    token_scale: bool = False
    token_offset: bool = False
    channel_scale: bool = False
    channel_offset: bool = False
    integer_codes: bool = False
    unit: float = 1.0
    layer_planes: bool = False
    channel_of: Any = None
    order: Any = None
    narrow_channels: Any = None
    empty_parts: int = 0

    @property
    def multiple(self) -> int:
        """What head_dim must be a multiple of: two bytes are read at a time, orders as four."""
        return 2 * self.parts if self.channel_of is not None else self.parts

    @property
    def levels(self) -> int:
        """Parts that ``tile`` gives."""
        return self.parts - self.empty_parts

    @property
    def parts(self) -> int:
        """Tiles of levels that a tile of 16-bit words becomes; 1 for vectors."""
        return 2 * self.fields if self.byte_codes else 1

    def constants(self, side: str, head_dim: int, dtype: torch.dtype, ptx: bool, least: int = 1) -> dict[str, Any]:
        """Constants of a kernel that reads pages of this codec: ``K_TILE`` and so on for ``side`` ``"K"``.

        Args:
            head_dim: elements of a vector.
            dtype: the model's.
            ptx: whether the kernel is compiled for an NVIDIA GPU, for a model in 16 bits.
            least: of the words of a part.

        Raises:
            ValueError: head_dim is no multiple of the codes of a word.
        """
        if head_dim % self.multiple:
            raise ValueError(
                f"the kernels read two bytes at a time: head_dim {head_dim} must be a multiple of {self.multiple}"
            )
        # fp16 holds every code exactly and leaves the query three more bits than bf16; exact vectors stay as they are.
        level = {torch.float16: tl.float16, torch.bfloat16: tl.float16 if self.byte_codes else tl.bfloat16}
        return {
            f"{side}_TILE": self.tile,
            f"{side}_CHANNELS": self.channels,
            f"{side}_HAS": (self.token_scale, self.token_offset, self.channel_scale, self.channel_offset),
            f"{side}_PARTS": self.parts,
            f"{side}_FIELDS": self.fields if self.byte_codes else 0,
            f"{side}_WORDS": max(least, triton.next_power_of_2(head_dim // self.parts)),
            f"{side}_DTYPE": level.get(dtype, tl.float32),
            # Integer codes from PTX are subnormal (``ptx.py``).
            f"{side}_UNIT": 2.0**24 if ptx and self.integer_codes else self.unit,
        }

    def arguments(self, planes: Sequence[Any], heads: int) -> tuple[Any, ...]:
        """What kernels receive as ``planes``."""
        return (*planes, heads) if self.layer_planes else tuple(planes)


@triton.jit
def no_channels(planes, page_head, HEAD_DIM: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr):
    """``channels`` of a codec that has none."""
    return (), ()
