"""A cache class for each policy that is usually wanted."""

from typing import Any

from transformers import PreTrainedConfig

from .cache import QuantizedPagedCache


class Int8PagedCache(QuantizedPagedCache):
    """``QuantizedPagedCache`` with policy ``"int8"``."""

    def __init__(self, config: PreTrainedConfig, **options: Any) -> None:
        super().__init__(config, "int8", **options)


class Int4PagedCache(QuantizedPagedCache):
    """``QuantizedPagedCache`` with policy ``"int4"``."""

    def __init__(self, config: PreTrainedConfig, **options: Any) -> None:
        super().__init__(config, "int4", **options)


class TurboQuantPagedCache(QuantizedPagedCache):
    """``QuantizedPagedCache`` with policy ``"turboquant"``."""

    def __init__(self, config: PreTrainedConfig, **options: Any) -> None:
        super().__init__(config, "turboquant", **options)
