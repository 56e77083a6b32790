"""A .gguf file is parsed once while a model is loaded from it.

transformers reads the whole file for the tokenizer, for the config and for the weights, with a Python call for each
string of the vocabulary, and makes a table of the names of all tensors anew for each module of the model.  Of the time
that the built-in model took to load, a tenth was its weights.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@contextmanager
def parsed_once() -> Iterator[None]:
    """Until the end, the package gguf remembers what it has read; whoever reads a file here only looks at it."""
    if find_spec("gguf") is None:  # whoever needs it says so
        yield
        return
    import gguf
    import numpy as np

    reader: Any = gguf.GGUFReader
    if not isinstance(reader, type):  # it remembers already
        yield
        return

    class Reader(gguf.GGUFReader):
        """Slices of an ``np.memmap``, half a million of them, cost twice as much as those of the array below."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = np.asarray(mapped)

    @functools.cache
    def read(path: str, *options: Any) -> Reader:
        return Reader(path, *options)

    remembering = {
        "GGUFReader": lambda path, *options: read(str(Path(path).absolute()), *options),
        "get_tensor_name_map": functools.cache(gguf.get_tensor_name_map),
    }
    originals = {name: getattr(gguf, name) for name in remembering}
    for name, function in remembering.items():
        setattr(gguf, name, function)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)
