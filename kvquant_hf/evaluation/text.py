"""Text for the harness: a file, or a data set of the ``datasets`` library; tokenized and cut into windows."""

import importlib.util
from pathlib import Path
from typing import Any

import torch

from ..errors import EvaluationInputError, MissingPackageError


def read_file(path: str) -> str:
    """A UTF-8 file.

    Raises:
        EvaluationInputError: it cannot be read, or is no UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise EvaluationInputError(f"cannot read the text {path!r}: {reason}; give a UTF-8 text file.") from error


def read_dataset(name: str) -> str:
    """Rows of a data set joined by blank lines.

    Args:
        name: ``NAME``, ``NAME:CONFIG`` or ``NAME:CONFIG:SPLIT``; the split is ``test`` unless it is said.

    Raises:
        MissingPackageError: ``datasets`` is not installed.
        EvaluationInputError: there is no such data set, split, or column ``text``.
    """
    path, config, split = (*name.split(":", 2), "", "")[:3]
    rows = load_rows(name, path, config or None, split or "test", "--text FILE")
    if "text" not in rows.column_names:
        found = ", ".join(rows.column_names)
        raise EvaluationInputError(f"the data set {name!r} has no column 'text' but {found}; use --text FILE.")
    return "\n\n".join(rows["text"])


def load_rows(name: str, path: str, config: str | None, split: str, instead: str, **options: Any) -> Any:
    """Rows of a data set, as ``datasets.load_dataset`` gives them.

    Args:
        name: what errors call it.
        path, config, split, options: arguments of ``load_dataset``.
        instead: the option that takes a file instead.

    Raises:
        MissingPackageError: ``datasets`` is not installed.
        EvaluationInputError: there is no such data set or split, or it cannot be had.
    """
    if importlib.util.find_spec("datasets") is None:
        raise MissingPackageError(f"--dataset needs the package datasets; run: pip install datasets, or use {instead}.")
    from datasets import load_dataset

    try:
        return load_dataset(path, config, split=split, **options)
    except Exception as error:  # the library's own, the hub's, and the network's
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise EvaluationInputError(
            f"cannot load the data set {name!r}: {reason}; check its name and the network, or use {instead}."
        ) from error


def first_tokens(tokenizer: Any) -> list[int]:
    """The special token with which the tokenizer begins every text, if it has one."""
    first = tokenizer("").input_ids[:1]
    return list(first) if first and first[0] == tokenizer.bos_token_id else []


def cut_windows(
    tokenizer: Any,
    text: str,
    context: int,
    count: int,
    options: tuple[str, str] = ("--context", "--windows"),
    *,
    or_fewer: bool = False,
) -> torch.Tensor:
    """The first ``count`` windows of ``context`` tokens, one after the other, nothing left out between them.

    Where the tokenizer begins a text with a special token, each window begins with it and has one token of text fewer:
    models that are trained with that token are not themselves without it.  Other special tokens are not added.

    Args:
        tokenizer: the model's.
        text: the text.
        context: tokens of a window.
        count: windows.
        options: what errors call ``context`` and ``count``.
        or_fewer: take as many windows as the text has, at least one, where it has fewer than ``count``.

    Returns:
        int64 ``[count, context]``.

    Raises:
        EvaluationInputError: the text is too short, or a window has no next token to predict.
    """
    if context < 2:
        raise EvaluationInputError(f"a window of {context} tokens has nothing to predict; use {options[0]} 2 or more.")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    first = first_tokens(tokenizer)
    length = context - len(first)
    found = len(ids) // length
    if found == 0:
        raise EvaluationInputError(
            f"the text has {len(ids)} tokens, and a window of {context} needs {length}; give a longer text, or a "
            f"smaller {options[0]}."
        )
    if or_fewer:
        count = min(count, found)
    if found < count:
        raise EvaluationInputError(
            f"the text has {len(ids)} tokens, and {count} windows of {context} need {count * length}; use at most "
            f"{options[1]} {found}, or a smaller {options[0]}."
        )
    rows = torch.tensor(ids[: count * length]).view(count, length)
    return torch.cat([torch.tensor(first, dtype=rows.dtype).expand(count, -1), rows], dim=1)
