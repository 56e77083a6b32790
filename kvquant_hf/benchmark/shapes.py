"""Models of known shapes with random weights: nothing to download, and speed does not depend on what weights say.

The numbers are those of the models' published configs.  Two things differ, and neither changes the time of a step:
positions go up to 131,072 in all of them, and rotary embeddings have transformers' default base.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers

from ..errors import BenchmarkInputError

# Of the memory that is free, what embeddings may take before the vocabulary is cut.
EMBEDDINGS_SHARE = 0.2
SMALLEST_VOCABULARY = 1024


class Shape(NamedTuple):
    """A decoder.  ``kind`` is the prefix of transformers' classes; the other fields are named as in a config."""

    kind: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool

    def config_options(self) -> dict[str, Any]:
        """Arguments of the config's class."""
        options = self._asdict()
        del options["kind"]
        return options | {"max_position_embeddings": 131072, "bos_token_id": None, "eos_token_id": None}

    def embedding_elements(self) -> int:
        """Elements of the embedding and of the last layer, once where they are tied."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "llama-3-8b": Shape("Llama", 128256, 4096, 14336, 32, 32, 8, 128, False),
        "llama-3.2-1b": Shape("Llama", 128256, 2048, 8192, 16, 32, 8, 64, True),
        "mistral-7b": Shape("Mistral", 32768, 4096, 14336, 32, 32, 8, 128, False),
        "qwen2.5-7b": Shape("Qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False),
        "qwen2.5-0.5b": Shape("Qwen2", 151936, 896, 4864, 24, 14, 2, 64, True),
        "qwen3-8b": Shape("Qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False),
        "smollm2-135m": Shape("Llama", 49152, 576, 1536, 30, 9, 3, 64, True),
        "smollm2-1.7b": Shape("Llama", 49152, 2048, 8192, 24, 32, 32, 64, True),
    }
)


def find_shape(name: str) -> Shape:
    """The shape of that name.

    Raises:
        BenchmarkInputError: there is none.
    """
    if name not in SHAPES:
        raise BenchmarkInputError(f"unknown shape {name!r}; use one of {', '.join(SHAPES)}.")
    return SHAPES[name]


def affordable_vocabulary(shape: Shape, itemsize: int, available: int | None) -> int:
    """The shape's vocabulary, or halved until embeddings take at most a fifth of ``available`` bytes.

    Args:
        shape: the model.
        itemsize: bytes per element of all dtypes that are held at once.
        available: bytes that are free; None: unknown, nothing is cut.
    """
    vocabulary = shape.vocab_size
    if available is None:
        return vocabulary
    while (
        vocabulary // 2 >= SMALLEST_VOCABULARY
        and shape._replace(vocab_size=vocabulary).embedding_elements() * itemsize > EMBEDDINGS_SHARE * available
    ):
        vocabulary //= 2
    return vocabulary


def random_model(
    name: str, dtype: torch.dtype | str = torch.bfloat16, device: torch.device | str = "cpu", **changes: Any
) -> Any:
    """A model of a known shape, its random weights (always the same on one device) made on the device.

    Args:
        name: one of ``SHAPES``.
        dtype: of the weights.
        device: where to make them.
        changes: to its config, for instance ``num_hidden_layers=2``.

    Raises:
        BenchmarkInputError: no such shape.
    """
    shape = find_shape(name)
    config = getattr(transformers, f"{shape.kind}Config")(**shape.config_options() | changes)
    before = torch.get_default_dtype()
    device = torch.device(device)
    torch.set_default_dtype(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            torch.manual_seed(0)
            model = getattr(transformers, f"{shape.kind}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation("sdpa")
    return model.eval().requires_grad_(False)
