"""What is kept once per layer and not in pages: where it lies, and how pages appear to have it."""

import functools

import torch

from ..errors import WrongModelError
from ..triton_kernels.codecs import Codec, Plane
from .moments import Moments


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
        _check_shape(parameter, like, f"the parameters of {codec.name!r}")
    return codec.given(*(parameter.to(like.device) for parameter in codec.parameters))


def placed_prior(prior: Moments | None, like: torch.Tensor) -> Moments | None:
    """Moments of queries where the keys ``like`` are, which see above.

    Raises:
        WrongModelError: they are of another shape.
    """
    if prior is None:
        return None
    _check_shape(prior.diagonal, like, "the moments of queries")
    return prior.to(like.device)


def _check_shape(parameter: torch.Tensor, like: torch.Tensor, what: str) -> None:
    if parameter.shape != (like.shape[1], like.shape[3]):
        raise WrongModelError(
            f"{what} are for heads x head_dim {list(parameter.shape)}, this layer has "
            f"{[like.shape[1], like.shape[3]]}; calibrate this model with kvquant calibrate and kvquant qparams."
        )


def on_every_page(codec: Codec, pages: int) -> tuple[torch.Tensor, ...]:
    """Planes per layer as planes of ``pages`` pages, ``[pages, heads, head_dim]``; the memory is that of one."""
    return tuple(parameter.expand(pages, *parameter.shape) for parameter in codec.parameters)
