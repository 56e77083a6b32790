"""Append new tokens: seal the pages that they complete, keep the rest in the open page.  One launch for both sides.

The open page is sealed by the first token that does not fit in it (*lazy* sealing), so it always ends with 1 to
``page_size`` tokens.  With ``held`` tokens in it, of which new token number ``s`` is the ``held + s``-th:

    sealed by this call    n = max(0, (held + tokens - 1) // page_size)
    page j of these        reads the old open page for its first held tokens (j = 0 only), new tokens otherwise
    new open page          n = 0: the new tokens go behind the old ones;  n > 0: the last of the new tokens alone

``held`` differs between sequences and is read on the device, so nothing waits for the host and a CUDA graph can hold
the call: the grid has as many page slots as any ``held`` could need, and those that seal nothing end at once.  Slot 0
alone reads the old open page and writes the new one, with a barrier in between.

Planes equal those of the torch codec bit for bit where no rotation is involved: the same IEEE operations in the same
order, which is why divisions and roots are the correctly rounded ones and the launch forbids the compiler to fuse a
multiplication with an addition.  The rotation sums in another order than a matrix product in torch, so a code that is a
float32 rounding away from a boundary may fall on the other side of it; therefore the Lloyd-Max codecs, always rotated,
take the GPU's own roots and divisions, right to two units in the last place.  Correctly rounded ones call subroutines,
for which the assembler keeps a hundred registers and a stack.

The rotation is a product with the Hadamard signs, made in registers, in slices of the head's channels: its operands are
signs and vectors as the model made them, so products are exact in the model's dtype and only the float32 sums round.
"""

import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch

from .codecs import likeness
from .codecs.base import Codec
from .codecs.jit import KernelCodec
from .hadamard import hadamard_block
from .launching import Launcher, Variant, aligned
from .pack import byte_columns
from .pages import PagedSide
from .target import compiled_for, interpreting, tl, triton
from .tile_math import hadamard_signs


@triton.jit
def _page_rows(
    new_ptr,
    tail_ptr,
    source,
    offs_n,
    offs_d,
    mask_d,
    stride_new_n,
    stride_new_d,
    stride_tail_n,
):
    """Channels ``offs_d``, in the model's dtype, of new token ``source`` or, where that is negative, of row ``offs_n``
    of the old open page; all in shapes that broadcast to that of the result."""
    is_new = source >= 0
    pointers = new_ptr + source.to(tl.int64) * stride_new_n + offs_d.to(tl.int64) * stride_new_d
    new = tl.load(pointers, mask=is_new & mask_d, other=0.0)  # [N, ..., channels]
    old = tl.load(tail_ptr + offs_n * stride_tail_n + offs_d, mask=(source < 0) & mask_d, other=0.0)
    return tl.where(is_new, new, old)


@triton.jit
def _append_side(
    planes,
    new_ptr,
    tail_ptr,
    table_ptr,
    lengths_ptr,
    heads,
    tokens,
    stride_new_b,
    stride_new_h,
    stride_new_n,
    stride_new_d,
    stride_tail_b,
    stride_tail_h,
    stride_tail_n,
    stride_table_b,
    ENCODE: tl.constexpr,
    FIELDS: tl.constexpr,
    BYTES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ORDER: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PAGE: tl.constexpr,
    TAIL_ROWS: tl.constexpr,
):
    """Keys or values of one page slot of one head of one sequence.  ``ORDER``: blocks of the rotation, 0 for none."""
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    slot = tl.program_id(1)
    sealed = tl.load(lengths_ptr + batch * 2)
    held = tl.load(lengths_ptr + batch * 2 + 1)
    new_ptr += batch * stride_new_b + head * stride_new_h
    tail_ptr += batch * stride_tail_b + head * stride_tail_h

    if held + tokens > (slot + 1) * PAGE:
        page = tl.load(table_ptr + batch * stride_table_b + sealed + slot)
        page_head = page.to(tl.int64) * heads + head
        offs_n = tl.arange(0, PAGE)
        source = slot * PAGE + offs_n - held  # [PAGE]
        if ORDER > 0:
            channel, exists = byte_columns(HEAD_DIM, FIELDS, BYTES)
            SLICE: tl.constexpr = 16 if HEAD_DIM <= 16 else 32
            x = tl.zeros([PAGE, FIELDS * BYTES], tl.float32)
            for first in range(0, HEAD_DIM, SLICE):
                offs_d = first + tl.arange(0, SLICE)
                rows = _page_rows(
                    new_ptr,
                    tail_ptr,
                    source[:, None],
                    offs_n[:, None],
                    offs_d[None, :],
                    (offs_d < HEAD_DIM)[None, :],
                    stride_new_n,
                    stride_new_d,
                    stride_tail_n,
                )
                signs = hadamard_signs(offs_d, tl.where(exists, channel, 1 << 24), ORDER)  # [SLICE, columns]
                x = tl.dot(rows.to(DOT_DTYPE), signs.to(DOT_DTYPE), x, input_precision="ieee")  # [PAGE, columns]
            x = x * (ORDER**-0.5)
        else:
            # Read as it lies in memory and brought into byte order here: an address for each element would take twice
            # the registers of the elements themselves.
            offs_f, offs_b = tl.arange(0, FIELDS), tl.arange(0, BYTES)
            WIDTH: tl.constexpr = HEAD_DIM // FIELDS
            x = _page_rows(
                new_ptr,
                tail_ptr,
                source[:, None, None],
                offs_n[:, None, None],
                (offs_f[:, None] * WIDTH + offs_b[None, :])[None, :, :],
                (offs_b < WIDTH)[None, None, :],
                stride_new_n,
                stride_new_d,
                stride_tail_n,
            )  # [PAGE, FIELDS, BYTES]
            x = tl.permute(x, (0, 2, 1)).reshape(PAGE, BYTES * FIELDS)
        ENCODE(planes, page_head, x, offs_n, HEAD_DIM, PAGE, FIELDS, BYTES)

    if slot == 0:
        # Every thread has read the old open page before any of them overwrites it.
        tl.debug_barrier()
        first_token = tl.maximum((held + tokens - 1) // PAGE, 0) * PAGE
        row = tl.maximum(held - first_token, 0) + tl.arange(0, TAIL_ROWS)
        source = first_token + row - held
        offs_d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
        mask = (source < tokens)[:, None] & (offs_d < HEAD_DIM)[None, :]  # bounds row, too: at most PAGE tokens stay
        pointers = new_ptr + source.to(tl.int64)[:, None] * stride_new_n + offs_d.to(tl.int64)[None, :] * stride_new_d
        rows = tl.load(pointers, mask=mask, other=0.0)  # [TAIL_ROWS, HEAD_DIM]
        tl.store(tail_ptr + row[:, None] * stride_tail_n + offs_d[None, :], rows, mask=mask)


# Numbers that change while a cache grows must not make new kernels, least of all while a CUDA graph is captured.
@triton.jit(do_not_specialize=["tokens", "stride_table_b"])
def _append_kernel(
    k_planes,
    v_planes,
    k_new_ptr,
    v_new_ptr,
    k_tail_ptr,
    v_tail_ptr,
    table_ptr,
    lengths_ptr,
    new_lengths_ptr,
    heads,
    tokens,
    stride_k_new_b,
    stride_k_new_h,
    stride_k_new_n,
    stride_k_new_d,
    stride_v_new_b,
    stride_v_new_h,
    stride_v_new_n,
    stride_v_new_d,
    stride_k_tail_b,
    stride_k_tail_h,
    stride_k_tail_n,
    stride_v_tail_b,
    stride_v_tail_h,
    stride_v_tail_n,
    stride_table_b,
    K_ENCODE: tl.constexpr,
    K_FIELDS: tl.constexpr,
    K_BYTES: tl.constexpr,
    K_ORDER: tl.constexpr,
    V_ENCODE: tl.constexpr,
    V_FIELDS: tl.constexpr,
    V_BYTES: tl.constexpr,
    V_ORDER: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PAGE: tl.constexpr,
    TAIL_ROWS: tl.constexpr,
):
    """Grid: (batch * heads, page slots, 2 sides)."""
    if tl.program_id(2) == 0:
        _append_side(
            k_planes,
            k_new_ptr,
            k_tail_ptr,
            table_ptr,
            lengths_ptr,
            heads,
            tokens,
            stride_k_new_b,
            stride_k_new_h,
            stride_k_new_n,
            stride_k_new_d,
            stride_k_tail_b,
            stride_k_tail_h,
            stride_k_tail_n,
            stride_table_b,
            K_ENCODE,
            K_FIELDS,
            K_BYTES,
            KEY_DIM,
            K_ORDER,
            DOT_DTYPE,
            PAGE,
            TAIL_ROWS,
        )
        if (tl.program_id(0) % heads == 0) & (tl.program_id(1) == 0):
            at = (tl.program_id(0) // heads).to(tl.int64) * 2
            sealed = tl.load(lengths_ptr + at)
            held = tl.load(lengths_ptr + at + 1)
            count = tl.maximum((held + tokens - 1) // PAGE, 0)
            tl.store(new_lengths_ptr + at, sealed + count)
            tl.store(new_lengths_ptr + at + 1, held + tokens - count * PAGE)
    else:
        _append_side(
            v_planes,
            v_new_ptr,
            v_tail_ptr,
            table_ptr,
            lengths_ptr,
            heads,
            tokens,
            stride_v_new_b,
            stride_v_new_h,
            stride_v_new_n,
            stride_v_new_d,
            stride_v_tail_b,
            stride_v_tail_h,
            stride_v_tail_n,
            stride_table_b,
            V_ENCODE,
            V_FIELDS,
            V_BYTES,
            VALUE_DIM,
            V_ORDER,
            DOT_DTYPE,
            PAGE,
            TAIL_ROWS,
        )


def padded_bytes(codec: KernelCodec, head_dim: int) -> int:
    """Bytes (elements of whole vectors) of one token, padded to a power of two and to 16 columns of a product."""
    fields = max(1, codec.fields)
    return max(triton.next_power_of_2(head_dim // fields), 16 // fields)


def append_constants(
    key_codec: Codec, value_codec: Codec, dims: tuple[int, int], dtype: torch.dtype, page_size: int, one: bool
) -> dict[str, Any]:
    """The constants of ``_append_kernel``, and how it is launched.

    Args:
        key_codec, value_codec: storage formats.
        dims: head_dim of keys and of values.
        dtype: the model's.
        page_size: tokens of a page.
        one: whether there is one new token.
    """
    k, v = key_codec.kernel, value_codec.kernel
    assert k is not None and v is not None, "choose() lets no other codec through"
    return {
        "K_ENCODE": k.encode,
        "K_FIELDS": max(1, k.fields),
        "K_BYTES": padded_bytes(k, dims[0]),
        "K_ORDER": hadamard_block(dims[0]) if key_codec.rotated else 0,
        "V_ENCODE": v.encode,
        "V_FIELDS": max(1, v.fields),
        "V_BYTES": padded_bytes(v, dims[1]),
        "V_ORDER": hadamard_block(dims[1]) if value_codec.rotated else 0,
        "KEY_DIM": dims[0],
        "VALUE_DIM": dims[1],
        "DOT_DTYPE": _dot_dtype(dtype),
        "PAGE": page_size,
        "TAIL_ROWS": 1 if one else page_size,
        "num_warps": 8,
        "num_stages": 1,
        "enable_fp_fusion": False,
    }


class _Plan(NamedTuple):
    """What calls for the same codecs, dims, dtypes and device have in common."""

    launcher: Launcher
    keys: KernelCodec
    values: KernelCodec


@functools.lru_cache(maxsize=512)
def _plan(
    key_codec: Codec,
    value_codec: Codec,
    dims: tuple[int, int],
    dtypes: tuple[torch.dtype, ...],
    page_size: int,
    one: bool,
    where: Hashable,
) -> _Plan:
    keys, values = key_codec.kernel, value_codec.kernel
    assert keys is not None and values is not None, "choose() lets no other codec through"
    constants = append_constants(key_codec, value_codec, dims, dtypes[0], page_size, one)
    return _Plan(Launcher(_append_kernel, constants), keys, values)


class AppendCall:
    """A call of append to given pages: what stays from step to step is put together once.

    Args:
        keys, values: of a first call; those of later ones have its shapes, dtypes and strides.
        key_side, value_side: the pages.
        page_table: where they are.
    """

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        key_side: PagedSide,
        value_side: PagedSide,
        page_table: torch.Tensor,
    ) -> None:
        self.values, self.page_table = value_side, page_table
        batch, heads, tokens, key_dim = keys.shape
        k, v, page_size = key_side, value_side, key_side.page_size
        plan = _plan(
            likeness(k.codec),
            likeness(v.codec),
            (key_dim, values.shape[3]),
            (keys.dtype, values.dtype, k.tail.dtype, v.tail.dtype),
            page_size,
            tokens == 1,
            compiled_for(keys),
        )
        self._launcher = plan.launcher
        self._variant: Variant | None = None
        slots = max(1, -(-tokens // page_size))  # held <= page_size: never more pages are completed
        self._grid = (batch * heads, slots, 2)
        self._planes = (plan.keys.arguments(k.planes, heads), plan.values.arguments(v.planes, heads))
        self._tails = (k.tail, v.tail, page_table)
        self._numbers = (
            heads,
            tokens,
            *keys.stride(),
            *values.stride(),
            *k.tail.stride()[:3],
            *v.tail.stride()[:3],
            page_table.stride(0),
        )

    def __call__(
        self, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor, new_lengths: torch.Tensor
    ) -> None:
        """Append; arguments as of ``append``."""
        args = (*self._planes, keys, values, *self._tails, lengths, new_lengths, *self._numbers)
        if aligned(keys, values, lengths, new_lengths):
            self._variant = self._launcher(self._grid, args, self._variant)
        else:
            self._launcher(self._grid, args)


def append(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_codec: Codec,
    value_codec: Codec,
    key_planes: Sequence[torch.Tensor],
    value_planes: Sequence[torch.Tensor],
    key_tail: torch.Tensor,
    value_tail: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    new_lengths: torch.Tensor,
) -> None:
    """Store new tokens behind those held: pages that they complete go to the planes, the rest to the open pages.

    Args:
        keys, values: new tokens ``[batch, heads, tokens, dim]`` in the model's dtype, any strides.
        key_codec, value_codec: storage formats.
        key_planes, value_planes: planes of all pages, ``[pages, heads, *Plane.shape(page_size)]`` contiguous; written.
        key_tail, value_tail: open pages ``[batch, heads, page_size, dim]``, last dimension contiguous; written.
        page_table: int32 ``[batch, pages]``; holds a page of its own for each logical page that may be sealed.
        lengths: int32 ``[batch, 2]``: sealed pages and tokens in the open page of each sequence before this call.
        new_lengths: int32 ``[batch, 2]``, another tensor: the same after this call; written.
    """
    page_size = key_tail.shape[2]
    key_side = PagedSide(key_codec, key_planes, key_tail, page_size)
    value_side = PagedSide(value_codec, value_planes, value_tail, page_size)
    AppendCall(keys, values, key_side, value_side, page_table)(keys, values, lengths, new_lengths)


def _dot_dtype(model_dtype: torch.dtype) -> "tl.dtype":
    """Dtype of the rotation's operands; vectors and signs are exact in the model's own."""
    if model_dtype == torch.float32 or interpreting():  # the interpreter multiplies bf16 as if it were integers
        return tl.float32
    return tl.float16 if model_dtype == torch.float16 else tl.bfloat16
