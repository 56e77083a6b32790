"""How the key/value heads of a model are spread over processes: tensor parallel, by transformers' ``tp_plan``.

A process has some of the heads, or all of them where the plan gathers what it has split (models that normalize keys
over all heads).  A cache stores what it is given, so it holds the heads of its own process; blocks are made before, and
have to be told.
"""

from collections.abc import Mapping
from typing import Any

from ..errors import UnsupportedModelError

_PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "query_key_value")  # what makes keys or values
_SPLIT = "colwise"  # by heads, and left so; "colwise_gather_output" puts them together again


def shards_of_heads(plan: Mapping[str, str] | None, heads: int, processes: int) -> int:
    """Into how many shards the key/value heads of a layer are divided; 1: each process has all of them.

    Args:
        plan: the style of each layer, by its name.
        heads: key/value heads of the whole model.
        processes: over how many the model is spread.

    Raises:
        UnsupportedModelError: they cannot be divided evenly.
    """
    styles = {style for name, style in (plan or {}).items() if name.rpartition(".")[2] in _PROJECTIONS}
    if processes == 1 or _SPLIT not in styles:
        return 1
    if heads % processes:
        raise UnsupportedModelError(
            f"{heads} key/value heads cannot be shared evenly by {processes} processes; start as many as divide them, "
            "or spread the model with device_map in one process."
        )
    return processes


def check_shards(model: Any) -> None:
    """Refuse a model of which a process would have half a head: its own ``view`` fails there, with any cache.

    Raises:
        UnsupportedModelError: it is such a model.
    """
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    if isinstance(heads, int):
        shards_of_heads(model.tp_plan, heads, model.tp_size or 1)
