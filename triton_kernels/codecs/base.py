"""What a storage format must say, and nothing else.

A *codec* turns one page of keys or values into *planes* (the bytes that are stored) and back.  It is one side of a
cache: keys and values each have their own.  Everything else in the product follows from what is declared here:

* pages are allocated from ``planes()``, and bytes per token are summed from ``planes()`` and from nowhere else;
* attention never asks for a dense page.  It asks for the *tile*: small-integer or codebook ``levels`` and up to four
  vectors that stand outside of them,

    x_hat[t, c] = levels[t, c] * token_scale[t] * channel_scale[c] + token_offset[t] + channel_offset[c]

  so that the scales fold into the query and the probabilities instead of multiplying every element:

    q . k_hat[t]    = token_scale[t] * ((q * channel_scale) . levels[t]) + token_offset[t] * sum(q) + q . channel_offset
    sum_t p_t v_hat = channel_scale * ((p * token_scale) @ levels) + sum(p * token_offset) + sum(p) * channel_offset

A codec that works on rotated vectors sets ``rotated``; ``tile`` is then in the rotated domain, and the caller rotates
the query (keys) or rotates the output back (values) once per step.  The rotation is its own inverse.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from ..hadamard import hadamard
from .cpu import CpuCodec
from .jit import KernelCodec


@dataclass(frozen=True)
class Plane:
    """One stored tensor of a codec.

    Args:
        name: what it holds, for instance ``"codes"``.
        dtype: element type as stored; ``None`` stands for the model's own dtype.
        per: ``"token"``: ``width`` elements for every token and head; ``"page"``: ``width`` for every page and head;
            ``"layer"``: ``width`` for every head, the same in all pages, so that no page stores them.
        width: number of elements.
        largest: of scales, or of numbers without one, that are stored as bytes, the largest of these; what is beyond it
            is cut off.  Below 128 the highest bit is a sign.
    """

    name: str
    dtype: torch.dtype | None
    per: Literal["token", "page", "layer"]
    width: int
    largest: int | None = None

    def shape(self, page_size: int) -> tuple[int, ...]:
        """Shape of this plane for one page of one head."""
        return (page_size, self.width) if self.per == "token" else (self.width,)

    def bytes_per_page(self, page_size: int, model_dtype: torch.dtype) -> int:
        """Bytes of this plane for one page of one head."""
        rows = {"token": page_size, "page": 1, "layer": 0}[self.per]
        return rows * self.width * (self.dtype or model_dtype).itemsize


class Tile(NamedTuple):
    """Pages as attention wants them; every tensor float32.  ``...`` are any leading dimensions (pages, heads)."""

    levels: torch.Tensor  # [..., page_size, head_dim]
    token_scale: torch.Tensor | None = None  # [..., page_size]
    token_offset: torch.Tensor | None = None  # [..., page_size]
    channel_scale: torch.Tensor | None = None  # [..., head_dim]
    channel_offset: torch.Tensor | None = None  # [..., head_dim]

    def dense(self) -> torch.Tensor:
        """The page multiplied out, ``[..., page_size, head_dim]`` float32, still in the codec's own domain."""
        x = self.levels
        if self.channel_scale is not None:
            x = x * self.channel_scale.unsqueeze(-2)
        if self.token_scale is not None:
            x = x * self.token_scale.unsqueeze(-1)
        if self.token_offset is not None:
            x = x + self.token_offset.unsqueeze(-1)
        if self.channel_offset is not None:
            x = x + self.channel_offset.unsqueeze(-2)
        return x


@dataclass(frozen=True)
class Codec(ABC):
    """One storage format for one side (keys or values) of a page.

    Args:
        name: the name it has in ``CODECS`` and in a ``KVPolicy``.
        bits: bits of one code, scales not counted.
        summary: one clause for tables.
        source: paper, equation or document that it comes from.
        rotated: whether codes describe Hadamard-rotated vectors.
        head_dim_multiple: head_dim must be a multiple of this (codes per byte).
        reproduces: whether it is the formula of others to the bit, for comparison, and no recipe of ours.
        calibrated: whether it has planes per layer, which are measured beforehand and handed over by ``given``.
        uses_queries: whether ``encode`` takes second moments of the queries, ``metric``.
    """

    name: str
    bits: int
    summary: str
    source: str
    rotated: bool = False
    head_dim_multiple: int = 1
    reproduces: bool = False
    calibrated: bool = False
    uses_queries: bool = False

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        """The planes per layer, each ``[heads, head_dim]``; none for most codecs, and before ``given``."""
        return ()

    def given(self, *parameters: torch.Tensor) -> "Codec":
        """This codec with the planes per layer ``parameters``; codecs that are not ``calibrated`` take none."""
        if parameters:
            raise ValueError(f"codec {self.name!r} has no planes per layer; give it none")
        return self

    @abstractmethod
    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        """The planes of a page, in the order in which ``encode`` returns and ``tile`` takes them; those per layer are
        the last."""

    @abstractmethod
    def _encode(self, x: torch.Tensor, model_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Encode float32 pages ``[..., page_size, head_dim]`` that are already in the codec's domain.

        Planes of dtype ``None`` are returned in ``model_dtype``.
        """

    @abstractmethod
    def tile(self, planes: Sequence[torch.Tensor]) -> Tile:
        """Unpack stored planes (each ``[..., *Plane.shape(page_size)]``) without multiplying scales in."""

    @property
    def kernel(self) -> KernelCodec | None:
        """How the Triton kernels read the planes; None: they cannot."""
        return None

    def cpu(self, head_dim: int) -> CpuCodec | None:
        """How the CPU kernels read the planes of vectors of ``head_dim``; None: they cannot."""
        return None

    @abstractmethod
    def error_bound(self, x: torch.Tensor) -> torch.Tensor:
        """Upper bound on ``|x_hat[t] - x[t]|_2`` for each token of pages ``x``; ``[..., page_size]`` float32.

        ``x`` is in the model's dtype, as for ``encode``: planes stored in that dtype are rounded to it.
        """

    def encode(self, x: torch.Tensor, metric: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Encode full pages.

        Args:
            x: ``[..., page_size, head_dim]``, any floating dtype, finite.  Pages are encoded independently.
            metric: second moments of the queries, float32, broadcasts to ``[..., head_dim, head_dim]``; for codecs with
                ``uses_queries``, others take no notice.

        Returns:
            One tensor per plane, ``[..., *Plane.shape(page_size)]``, in the plane's dtype; those per layer as given.
        """
        # Rotated in float64, where the sums of a rotation are all but always exact: codes must not depend on the order
        # in which a matrix product adds, which changes with the shape of the call and with the machine.
        domain = self.to_domain(x.double()).float() if self.rotated else x.float()
        options = {"metric": metric} if self.uses_queries else {}
        return self._encode(domain, x.dtype, **options)

    def decode(self, planes: Sequence[torch.Tensor]) -> torch.Tensor:
        """Dense pages back in the model's domain, ``[..., page_size, head_dim]`` float32."""
        return self.from_domain(self.tile(planes).dense())

    def to_domain(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate vectors ``[..., head_dim]`` into the codec's domain (identity unless ``rotated``)."""
        return hadamard(x) if self.rotated else x

    def from_domain(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate vectors ``[..., head_dim]`` back.  The rotation is symmetric and orthonormal: its own inverse."""
        return hadamard(x) if self.rotated else x

    def bytes_per_token(self, head_dim: int, page_size: int, model_dtype: torch.dtype) -> float:
        """Stored bytes per token and head in a full page, scales and codebooks included; planes per layer are none."""
        return sum(p.bytes_per_page(page_size, model_dtype) for p in self.planes(head_dim)) / page_size

    def __deepcopy__(self, memo: dict[int, object]) -> "Codec":
        return self  # immutable: forks share the planes per layer
