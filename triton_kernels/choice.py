"""Kernels or plain torch: what ``impl`` means for given pages, and why."""

import functools
from typing import Literal, NamedTuple, get_args

import torch

from ..errors import ImplementationError
from .codecs import CODECS, Codec
from .cpu.build import BuildError
from .cpu.native import library
from .pages import PagedSide
from .target import architecture, interpreting, why_not

Implementation = Literal["auto", "triton", "cpu", "reference"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

# A page of keys in registers and shared memory; twice the default page at the largest head_dim does not fit.
_MAX_PAGE_ELEMENTS = 64 * 256
# Keys and values that are not packed pass through shared memory beside each other, and these have 64 KiB of it.
_MAX_EXACT_ELEMENTS = dict.fromkeys(("sm_75", "gfx90a", "gfx942"), 2 * 64 * 128)


class Choice(NamedTuple):
    """What runs, and why it is not the kernels (empty if it is, or if it was asked for)."""

    name: Implementation
    reason: str = ""


@functools.lru_cache(maxsize=256)
def _choose(
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    stored: torch.dtype,
    page_size: int,
    head_dims: tuple[int, ...],
    codec_names: tuple[str, ...],
    interpreted: bool,
    latent: bool = False,
) -> Choice:
    """:func:`choose`, kept: it is asked at every step of every layer."""
    if impl == "reference":
        return Choice("reference")
    codecs = tuple(CODECS[name] for name in codec_names)
    kernels: Implementation = "triton" if impl == "auto" and device.type == "cuda" else "cpu"
    if impl != "auto":
        kernels = "triton" if impl == "triton" else "cpu"
    if kernels == "cpu":
        obstacle = _cpu_obstacle(device, dtype, stored, head_dims, codecs)
    else:
        obstacle = _obstacle(device, dtype, page_size, head_dims, codecs, latent)
        if impl == "auto" and interpreted and obstacle is None:
            obstacle = "Triton's interpreter is for tests; unset TRITON_INTERPRET"
    if obstacle is None:
        return Choice(kernels)
    if impl != "auto":
        raise ImplementationError(f"impl={impl!r} cannot run here: {obstacle}, or use impl='auto'.")
    return Choice("reference", obstacle)


def _cpu_obstacle(
    device: torch.device,
    dtype: torch.dtype,
    stored: torch.dtype,
    head_dims: tuple[int, ...],
    codecs: tuple[Codec, ...],
) -> str | None:
    """Why the CPU kernels cannot take such pages, ending with a remedy; None if they can.  Compiles them if need be."""
    if device.type != "cpu":
        return f"the tensors are on {device.type!r}, the CPU kernels need them on 'cpu'; use another impl"
    for wanted in (dtype, stored):
        if wanted not in (torch.float16, torch.bfloat16, torch.float32):
            return (
                "the CPU kernels take float16, bfloat16 and float32, not "
                f"{str(wanted).removeprefix('torch.')}; cast the model"
            )
    for head_dim, codec in zip(head_dims, codecs, strict=True):
        if codec.cpu(head_dim) is None:
            return f"codec {codec.name!r} does not say how the CPU kernels read it; use another policy"
    try:
        library()
    except BuildError as error:
        return str(error)
    return None


def _obstacle(
    device: torch.device,
    dtype: torch.dtype,
    page_size: int,
    head_dims: tuple[int, ...],
    codecs: tuple[Codec, ...],
    latent: bool = False,
) -> str | None:
    """Why the kernels cannot take such pages, ending with a remedy; None if they can.  The one for latents takes part
    of a page at a time, and every codec for either side."""
    cannot = why_not(device)
    if cannot is not None:
        return cannot
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return (
            f"the kernels take float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}; cast the model"
        )
    if page_size < 16 or page_size & (page_size - 1):
        return f"pages of {page_size} tokens are no power of two from 16 on; use page_size=64"
    gpu, exact = architecture(device), 0
    if latent and dtype == torch.float32 and gpu == "sm_75":
        return "latents in float32 need more shared memory than sm_75 has; use a model in float16"
    for head_dim, codec in zip(head_dims, codecs, strict=True):
        if codec.kernel is None:
            return f"codec {codec.name!r} has no Triton kernels; use another policy"
        padded = 1 << (head_dim - 1).bit_length()
        exact += 0 if codec.kernel.byte_codes else padded * page_size
        if padded * page_size > _MAX_PAGE_ELEMENTS and not latent:
            return f"pages of {page_size} x {head_dim} elements are too large for the kernels; use a smaller page_size"
        if exact > _MAX_EXACT_ELEMENTS.get(gpu, exact) and not latent:
            return (
                f"exact pages of {page_size} x {head_dim} elements are too large for the shared memory of {gpu}; use a "
                "smaller page_size"
            )
        multiple = codec.kernel.multiple
        if head_dim % multiple:
            return f"codec {codec.name!r} reads {multiple} elements at a time, head_dim is {head_dim}; use int8"
    for codec in () if latent else codecs[1:]:
        if codec.kernel is not None and codec.kernel.channel_of is not None:
            return f"the Triton kernels take codec {codec.name!r} for keys only; use another one for values"
    return None


def choose(
    impl: str, dtype: torch.dtype, keys: PagedSide, values: PagedSide | None = None, latent: bool = False
) -> Choice:
    """What ``impl`` means for these pages; kept with them, because every step of every layer asks.

    Args:
        impl: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"reference"``.
        dtype: of the queries (attention) or of the new keys (append).
        keys, values: the pages; without values, what is done to keys alone.
        latent: whether attention is meant, of keys that are latents and values that are rotary keys.

    Raises:
        ImplementationError: ``"triton"`` or ``"cpu"`` was asked for and cannot run; unknown ``impl``.
    """
    place = "chosen_for_latents" if latent else "chosen"
    kept = keys.__dict__.get(place)
    if kept is not None and kept[0] is values and kept[1] is dtype and kept[2] == impl:
        answer: Choice = kept[3]
        return answer
    if impl not in IMPLEMENTATIONS:
        raise ImplementationError(f"unknown impl {impl!r}; use {', '.join(map(repr, IMPLEMENTATIONS))}.")
    tail, sides = keys.tail, (keys,) if values is None else (keys, values)
    answer = _choose(
        impl,
        tail.device,
        dtype,
        tail.dtype,
        keys.page_size,
        tuple([side.tail.shape[3] for side in sides]),
        tuple([side.codec.name for side in sides]),  # not the codecs, whose hash is that of all their fields
        (tail.is_cuda or impl == "triton") and interpreting(),
        latent,
    )
    keys.__dict__[place] = (values, dtype, impl, answer)
    return answer
