"""What the commands that measure share: lists of names, a bar, files to write, the conditions of a measurement."""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .models import LoadedModel
from .terminal import InputError
from .terminal import progress as bar


def split_names(names: str) -> list[str]:
    """The names of a list with commas, each once, in order."""
    return list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))


def check_writable(file: str | None) -> None:
    """Say before anything is measured that the result could not be written.

    Raises:
        InputError: the folder does not exist, or it is a folder.
    """
    if file is not None and (not Path(file).absolute().parent.is_dir() or Path(file).is_dir()):
        raise InputError(f"cannot write {file!r}: give the name of a file in a folder that exists.")


def position_limit(model: Any) -> int | None:
    """Tokens that a model can read; None where its config does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


@contextmanager
def progress(total: int, *, hidden: bool) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; yields what is to be called after each forward pass, with what it was for (or "").

    Args:
        total: forward passes.
        hidden: show nothing unless stderr is a terminal.
    """
    with bar("measuring", total, hidden=hidden) as step_done:
        yield lambda name: step_done(name or "exact model")


def conditions(loaded: LoadedModel) -> dict[str, Any]:
    """Model, dtype, device and versions, ready for JSON."""
    from .. import __version__

    return {
        "model": loaded.description,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "versions": {
            "kvquant_hf": __version__,
            "transformers": version("transformers"),
            "torch": version("torch"),
            "python": platform.python_version(),
        },
    }
