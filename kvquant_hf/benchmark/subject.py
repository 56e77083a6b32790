"""The model that is timed, and the tokens that it reads."""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers

from ..errors import BenchmarkInputError
from .machine import available_memory
from .shapes import affordable_vocabulary, find_shape, random_model

Load = Callable[[str], Any]


class Subject(NamedTuple):
    """A model to be timed.

    Args:
        description: what tables call it.
        load: ``load("bfloat16")`` returns the model in that dtype, in evaluation mode, on its device.
        ids: token ids of a text to read, at least as many as the longest context.
        limit: the most positions that the model takes, or None.
        random_weights: whether agreement says nothing about accuracy.
        apart: the same for processes of their own, so it must be possible to pickle it: a function of a module, or a
            ``partial`` of one.  Default: ``load``.
        model: the model where it is already in memory; it is saved to a temporary folder for processes of their own.
    """

    description: str
    load: Load
    ids: Sequence[int]
    limit: int | None = None
    random_weights: bool = False
    apart: Load | None = None
    model: Any = None

    @contextmanager
    def load_apart(self) -> Iterator[Load]:
        """``load`` for another process."""
        if self.model is None:
            yield self.apart or self.load
            return
        with tempfile.TemporaryDirectory(prefix="kvquant-bench-") as folder:
            self.model.save_pretrained(folder)
            yield partial(_from_folder, folder, str(self.model.device))


def shape(
    name: str,
    *,
    layers: int | None = None,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    device: str | torch.device | None = None,
    tokens: int = 131072,
) -> Subject:
    """A model of a known shape with random weights.

    Args:
        name: one of ``SHAPES``.
        layers: instead of all of them.
        dtypes: those that will be timed, all held at once; the vocabulary is cut if their embeddings would take more
            than a fifth of free memory, and the description says so.
        device: where to make it; default: a GPU if there is one.
        tokens: random ones to read.

    Raises:
        BenchmarkInputError: no such shape, or more layers than it has.
    """
    known = find_shape(name)
    layers = layers or known.num_hidden_layers
    if not 1 <= layers <= known.num_hidden_layers:
        raise BenchmarkInputError(f"{name} has {known.num_hidden_layers} layers; use --layers with at most that.")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    itemsize = sum(getattr(torch, dtype).itemsize for dtype in dtypes)
    vocabulary = affordable_vocabulary(known, itemsize, available_memory(device))
    description = f"{name} with random weights, {layers} of {known.num_hidden_layers} layers"
    if vocabulary < known.vocab_size:
        description += f", vocabulary cut from {known.vocab_size:,} to {vocabulary:,}"
    load = partial(_random, name, device=str(device), num_hidden_layers=layers, vocab_size=vocabulary)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (tokens,), generator=generator).tolist()
    return Subject(description, load, ids, random_weights=True)


def in_memory(model: Any, ids: Sequence[int] | torch.Tensor | None = None, description: str = "") -> Subject:
    """A model that is loaded already.

    Args:
        model: a causal language model.
        ids: a text to read, as token ids; default: random ones, with which agreement says little.
        description: default: the name that its config gives, or its class.
    """
    decoder = model.config.get_text_config(decoder=True)
    limit = getattr(decoder, "max_position_embeddings", None)
    if ids is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(decoder.vocab_size, (limit or 131072,), generator=generator)
    tokens = ids.flatten().tolist() if isinstance(ids, torch.Tensor) else list(ids)
    named = description or model.config.name_or_path or type(model).__name__
    return Subject(named, partial(_converted, model), tokens, limit, model=model)


def _random(name: str, dtype: str, **options: Any) -> Any:
    return random_model(name, dtype, options.pop("device"), **options)


def _converted(model: Any, dtype: str) -> Any:
    wanted = getattr(torch, dtype)
    return model if model.dtype == wanted else copy.deepcopy(model).to(wanted)


def _from_folder(folder: str, device: str, dtype: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
