"""Calls of the compiled kernels: tensors become pointers and strides in a packed struct.

The structs are those of attention.h, append.h, blocks.h and tile.h: every member is 64 bits wide, and their sizes are
compared when the library is loaded.
"""

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence

import torch

from ..codecs.base import Codec
from ..codecs.cpu import CpuCodec
from ..pages import PagedSide
from .build import BuildError, load

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}
_STEP = 4  # uint8, where a factor has it: an fp16 number of 8 bits
_FORMATS = {16: 0, 8: 1, 4: 2, 2: 3, 3: 3, 1: 4}  # 3 bits are 2 and a sign in another plane
_RANKED = {4: 5, 3: 6, 2: 7}
_FLOATS = {8: 8, 4: 2}

# format dim rotated codes dtype levels slopes signs middle octets block_scale; 5 x (data dtype heads); order;
# zero_point; tail, strides; first
_SIDE = struct.Struct("34q")
ATTENTION = struct.Struct("14q 2d 15q")  # and two sides
_COPY = "11q"
APPEND = struct.Struct("4q" + 2 * _COPY)
ENCODE = struct.Struct("16q")  # and a side
ROTATE = struct.Struct("14q")
BUCKET = struct.Struct("7q")
SEARCH = struct.Struct("8q")
UNPACK = struct.Struct("9q")
MULTIPLY = struct.Struct("10q")


class Library:
    """The compiled functions; each takes a packed struct.

    Raises:
        BuildError: there are none.
    """

    attend: Callable[[bytes], None]
    append: Callable[[bytes], None]
    encode: Callable[[bytes], None]
    rotate: Callable[[bytes], None]
    bucket: Callable[[bytes], None]
    search: Callable[[bytes], None]
    unpack: Callable[[bytes], None]
    multiply: Callable[[bytes], None]

    def __init__(self, flags: tuple[str, ...] | None = None) -> None:
        loaded = load() if flags is None else load(flags)
        if isinstance(loaded, BuildError):
            raise loaded
        size = {
            "attend": ATTENTION.size + 2 * _SIDE.size,
            "append": APPEND.size,
            "encode": ENCODE.size + _SIDE.size,
            "rotate": ROTATE.size,
            "bucket": BUCKET.size,
            "search": SEARCH.size,
            "unpack": UNPACK.size,
            "multiply": MULTIPLY.size,
        }
        sizes = (ctypes.c_int64 * len(size))()
        loaded.kvquant_sizes(sizes)
        assert list(sizes) == list(size.values()), "the structs differ from the sources'"
        for name in size:
            function = getattr(loaded, f"kvquant_{name}")
            function.argtypes, function.restype = [ctypes.c_char_p], None
            setattr(self, name, function)
        self.fork = _openmp_fork()


@functools.cache
def library() -> Library:
    """The library of this process.

    Raises:
        BuildError: it cannot be built.
    """
    return Library()


def _openmp_fork() -> int:
    """Address of the function that starts a parallel region in the OpenMP that torch uses, or 0.

    A second set of threads would compete with torch's, which spin for a while after each operator.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError, TypeError):
        return 0


def _table(levels: tuple[float, ...]) -> "ctypes.Array[ctypes.c_float]":
    """Sixteen floats that repeat ``levels``."""
    return (ctypes.c_float * 16)(*(levels * (16 // len(levels))))


@functools.lru_cache(maxsize=256)
def _described(codec: Codec, head_dim: int) -> tuple[CpuCodec, tuple[int, int, int], tuple[int, int], object]:
    """The codec's declaration, the first members of its struct, its tables' addresses, and what keeps these alive."""
    cpu = codec.cpu(head_dim)
    assert cpu is not None, "choose() lets no other codec through"
    tables = [None if levels is None else _table(levels) for levels in (cpu.levels, cpu.slopes)]
    addresses = tuple(0 if table is None else ctypes.addressof(table) for table in tables)
    formats = _FLOATS if cpu.floats else _FORMATS if cpu.order is None else _RANKED
    return cpu, (formats[codec.bits], head_dim, int(codec.rotated)), (addresses[0], addresses[1]), tables


def _factor(plane: torch.Tensor) -> tuple[int, int, int]:
    """Members of ``Factor``."""
    return plane.data_ptr(), DTYPES.get(plane.dtype, _STEP), 0 if plane.stride(0) else plane.shape[1]


def held_side(pages: PagedSide) -> bytes:
    """``Side`` of ``pages``, packed once in their life: a cache hands out the same ones in every step of a page."""
    packed: bytes | None = getattr(pages, "packed", None)
    if packed is None:
        packed = pages.packed = side(pages.codec, pages.planes, pages.tail, pages.first)
    return packed


def side(codec: Codec, planes: Sequence[torch.Tensor], tail: torch.Tensor, first: torch.Tensor | None = None) -> bytes:
    """``Side``, packed; its addresses are good as long as the tensors are."""
    cpu, head, addresses, _ = _described(codec, tail.shape[3])
    members = [*head, planes[0].data_ptr(), DTYPES.get(planes[0].dtype, 0), *addresses]
    members += (0 if cpu.signs is None else planes[cpu.signs].data_ptr(), cpu.middle, cpu.octets)
    members.append(0 if cpu.block_scale is None else planes[cpu.block_scale].data_ptr())
    for index in (cpu.token_scale, cpu.token_offset, cpu.residual, cpu.channel_scale, cpu.channel_offset):
        members += (0, 0, 0) if index is None else _factor(planes[index])
    batch, head_stride, token, _ = tail.stride()
    members += (0 if cpu.order is None else planes[cpu.order].data_ptr(),)
    members += (cpu.zero_point, tail.data_ptr(), DTYPES[tail.dtype], batch, head_stride, token)
    members.append(0 if first is None else first.data_ptr())
    return _SIDE.pack(*members)
