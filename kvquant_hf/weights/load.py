"""A model out of a GGUF file, its matrices left in the file's blocks.

transformers makes the config and an empty model; the file's tensors go into it one by one, so that no matrix is ever
multiplied out, neither now nor later.  (transformers itself can keep blocks for few architectures, and only where it
finds a kernel for the device, which for a CPU it does not: elsewhere it multiplies them out when it loads.)
"""

import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ImplementationError, KVQuantFallbackWarning, MissingPackageError, UnsupportedModelError
from ..triton_kernels.blocks import FORMATS, BlockFormat, unpack_reference
from ..triton_kernels.cpu.native import library
from .gguf_once import parsed_once
from .modules import PackedEmbedding, PackedLinear
from .names import ARCHITECTURES, PAIRED, halves_order, parameter_name

_PLAIN = ("F32", "F16", "BF16")
_LEFT_OUT = ("rope_freqs.weight",)  # transformers makes it from the config
_REMEDY = "load it with plain weights (--weights full)"


@parsed_once()
def load_packed(path: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a GGUF file with its matrices as they are in the file.

    Args:
        path: the file.
        dtype: of activations, norms and biases, and so of the keys and values.

    Returns:
        transformers' model for it, on the CPU, in eval mode, without gradients; ``packed_formats`` counts the file's
        tensors by their format.

    Raises:
        FileNotFoundError: there is no such file.
        MissingPackageError: gguf or accelerate, with which transformers reads such files, is not installed.
        UnsupportedModelError: its architecture or one of its tensors is not known here.
    """
    path = Path(path)
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise MissingPackageError(f"packed weights need {package}; pip install {package}")
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; give a .gguf file")
    from accelerate import init_empty_weights
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        file = GGUFReader(path)
    except ValueError as error:
        raise UnsupportedModelError(f"{path.name} is no GGUF file ({error}); give one") from error
    architecture = str(file.fields["general.architecture"].contents())
    _check(path.name, architecture, file.tensors)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    filler = _Filler(model, dtype)
    for tensor in file.tensors:
        place = parameter_name(tensor.name)
        if place is None:
            continue
        order = None
        if architecture in PAIRED and (parted := heads.get(tensor.name.split(".")[-2])) is not None:
            order = halves_order(int(tensor.shape[-1]), parted)
        filler.fill(place, tensor, order)
    filler.finish(path.name)
    model.packed_formats = dict(Counter(tensor.tensor_type.name for tensor in file.tensors))
    return model.requires_grad_(False).eval()


def _check(name: str, architecture: str, tensors: Any) -> None:
    """Refuse a file with something unknown in it, before anything is made of it.

    Raises:
        UnsupportedModelError: there is.
    """
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{name} is of the architecture {architecture!r}, whose weights cannot stay packed (those of "
            f"{', '.join(ARCHITECTURES)} can); {_REMEDY}"
        )
    for tensor in tensors:
        kind = tensor.tensor_type.name
        if parameter_name(tensor.name) is None and tensor.name not in _LEFT_OUT:
            raise UnsupportedModelError(f"{name} has a tensor {tensor.name!r} that is not known here; {_REMEDY}")
        if kind not in FORMATS and kind not in _PLAIN:
            raise UnsupportedModelError(
                f"{name} has weights in {kind}, which cannot stay packed (those in {', '.join(FORMATS)} can); {_REMEDY}"
            )


class _Filler:
    """Puts the tensors of a file into an empty model."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.compiled = True
        try:
            library()
        except ImplementationError as error:
            self.compiled = False
            warnings.warn(f"packed weights are unpacked by plain torch: {error}", KVQuantFallbackWarning, stacklevel=4)

    def fill(self, place: str, tensor: Any, order: torch.Tensor | None) -> None:
        """Put a tensor of the file at ``place``, its rows in ``order``.

        Raises:
            UnsupportedModelError: the model has no such place, or one of another shape.
        """
        data = torch.from_numpy(tensor.data.copy())  # the file's memory map is given back
        data = data if order is None else data[order]
        name, _, kind = place.rpartition(".")
        known = FORMATS.get(tensor.tensor_type.name)
        shape = [int(size) for size in reversed(tensor.shape)]
        try:
            module = self.model.get_submodule(name)
            fits = list(getattr(module, kind).shape) == shape
        except AttributeError:
            fits = False
        if not fits:
            raise UnsupportedModelError(f"the model has no {place} of shape {shape}, which the file has; {_REMEDY}")
        if known is not None and type(module) in (nn.Linear, nn.Embedding):
            self._pack(name, module, nn.Parameter(data, requires_grad=False), known)
        else:
            setattr(module, kind, nn.Parameter(self._plain(data, tensor.tensor_type.name), requires_grad=False))

    def _plain(self, data: torch.Tensor, kind: str) -> torch.Tensor:
        if kind in FORMATS:
            return unpack_reference(data.reshape(-1, data.shape[-1]), FORMATS[kind]).to(self.dtype)
        if kind == "BF16":  # gguf gives its bytes
            data = data.contiguous().view(torch.bfloat16)
        return data.to(self.dtype)

    def _pack(self, name: str, module: Any, weight: nn.Parameter, known: BlockFormat) -> None:
        made: nn.Module
        if isinstance(module, nn.Embedding):
            made = PackedEmbedding(weight, known, module.embedding_dim, self.dtype, compiled=self.compiled)
        else:
            made = PackedLinear(weight, known, module.in_features, module.bias, compiled=self.compiled)
        self.model.set_submodule(name, made)

    def finish(self, file: str) -> None:
        """Let the head share the embedding's matrix if it has none of its own, and see to it that nothing is empty.

        Raises:
            UnsupportedModelError: the file lacks a tensor.
        """
        head, embedding = self.model.lm_head, self.model.get_input_embeddings()
        if head.weight.is_meta and self.model.config.tie_word_embeddings:
            if isinstance(embedding, PackedEmbedding):
                self._pack("lm_head", head, embedding.weight, embedding.known)
            else:
                head.weight = embedding.weight
        for place, parameter in self.model.named_parameters():
            if parameter.is_meta:
                raise UnsupportedModelError(f"{file} has no weights for {place}; {_REMEDY}")
