"""Weights that stay as packed as their GGUF file has them: ``load_packed`` makes the model, ``weight_bytes`` counts."""

from .count import weight_bytes
from .load import load_packed

__all__ = ["load_packed", "weight_bytes"]
