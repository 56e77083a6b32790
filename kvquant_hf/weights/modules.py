"""A linear layer and an embedding whose matrix stays in the blocks of a GGUF file.

A matrix is ``[rows, bytes]`` uint8 (``triton_kernels/blocks.py`` has the layouts) and is never held in another form:
on a CPU the compiled kernels unpack a row when it is multiplied, elsewhere plain torch unpacks some rows at a time.
"""

import torch
from torch import nn

from ..errors import GradientError
from ..triton_kernels.blocks import BlockFormat, multiply_reference, unpack_reference
from ..triton_kernels.cpu.blocks import multiply_cpu, unpack_cpu


class PackedLinear(nn.Module):
    """``nn.Linear`` over packed rows.

    Args:
        weight: ``[out_features, bytes]`` uint8.
        known: its format.
        in_features: columns of the matrix.
        bias: ``[out_features]`` or None.
        compiled: whether the compiled kernels may be used on a CPU.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        known: BlockFormat,
        in_features: int,
        bias: nn.Parameter | None = None,
        *,
        compiled: bool = True,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.known, self.compiled = known, compiled
        self.in_features, self.out_features = in_features, weight.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in the dtype of ``x``.

        Raises:
            GradientError: a gradient would have to flow through.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise GradientError(
                "packed weights pass no gradients on; call the model under torch.no_grad(), or load plain weights"
            )
        multiply = multiply_cpu if self.compiled and x.device.type == "cpu" else multiply_reference
        out = multiply(x.reshape(-1, self.in_features), self.weight, self.known)
        if self.bias is not None:
            out += self.bias
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As ``nn.Linear`` has it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.known.name}"


class PackedEmbedding(nn.Module):
    """``nn.Embedding`` over packed rows.

    Args:
        weight: ``[num_embeddings, bytes]`` uint8.
        known: its format.
        embedding_dim: columns of the matrix.
        dtype: of what comes out; ``module.to(dtype)`` changes it.
        compiled: whether the compiled kernels may be used on a CPU.
    """

    like: torch.Tensor

    def __init__(
        self, weight: nn.Parameter, known: BlockFormat, embedding_dim: int, dtype: torch.dtype, *, compiled: bool = True
    ) -> None:
        super().__init__()
        self.weight = weight
        self.known, self.compiled = known, compiled
        self.num_embeddings, self.embedding_dim = weight.shape[0], embedding_dim
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``[...]`` token ids to ``[..., embedding_dim]``."""
        rows = self.weight.index_select(0, ids.reshape(-1))
        if self.compiled and rows.device.type == "cpu":
            out = unpack_cpu(rows, self.known, self.embedding_dim, self.like.dtype)
        else:
            out = unpack_reference(rows, self.known).to(self.like.dtype)
        return out.reshape(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """As ``nn.Embedding`` has it."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.known.name}"
