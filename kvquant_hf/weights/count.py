"""How many bytes the weights of a model take, whoever packed them."""

from collections.abc import Iterator

import torch
from torch import nn


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of ``model``, what several share counted once.

    Tensors that are made of others (torchao) count as these, and with a parameter what bitsandbytes keeps beside it.
    """
    held = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for part in _parts(tensor):
            storage = part.untyped_storage()
            held[storage.device, storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors of which ``tensor`` is made."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
        return
    yield tensor
    state = getattr(tensor, "quant_state", None)  # bitsandbytes: scales of blocks, themselves packed or not
    while state is not None:
        yield from (value for value in vars(state).values() if isinstance(value, torch.Tensor))
        state = getattr(state, "state2", None)
