"""What a codec keeps once per layer and not in pages: where it lies, and how pages appear to have it."""

import functools

import torch

from ..errors import WrongModelError
from ..triton_kernels.codecs import Codec, Plane


def in_pages(codec: Codec, head_dim: int) -> tuple[Plane, ...]:
    """The planes that a page stores; those per layer come after them."""
    return _in_pages(codec, head_dim) if torch.compiler.is_compiling() else _kept(codec, head_dim)


def _in_pages(codec: Codec, head_dim: int) -> tuple[Plane, ...]:
    return tuple(plane for plane in codec.planes(head_dim) if plane.per != "layer")


_kept = functools.lru_cache(maxsize=256)(_in_pages)  # every layer asks for the same


def placed(codec: Codec, like: torch.Tensor) -> Codec:
    """``codec`` with its parameters where the keys or values ``like`` ``[batch, heads, any, head_dim]`` are.

    Raises:
        WrongModelError: the parameters are of another shape.
    """
    for parameter in codec.parameters:
        if parameter.shape != (like.shape[1], like.shape[3]):
            raise WrongModelError(
                f"the parameters of {codec.name!r} are for heads x head_dim {list(parameter.shape)}, this layer has "
                f"{[like.shape[1], like.shape[3]]}; calibrate this model with kvquant calibrate and kvquant qparams."
            )
    return codec.given(*(parameter.to(like.device) for parameter in codec.parameters))


def on_every_page(codec: Codec, pages: int) -> tuple[torch.Tensor, ...]:
    """Planes per layer as planes of ``pages`` pages, ``[pages, heads, head_dim]``; the memory is that of one."""
    return tuple(parameter.expand(pages, *parameter.shape) for parameter in codec.parameters)
