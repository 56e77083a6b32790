"""Quantized pages of keys and values, and attention over them: tensors and pages only, no models."""
