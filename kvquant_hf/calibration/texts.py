"""Text to calibrate on: LMDeploy's four data sets by name, or a file."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ..errors import EvaluationInputError
from ..evaluation.text import load_rows, read_file

# Enough text for any number of tokens: a token has four characters, more or less.
_CHARACTERS_PER_TOKEN = 16


class Source(NamedTuple):
    """Where the ``datasets`` library finds a data set, and its column of text."""

    path: str
    config: str | None
    split: str
    column: str = "text"
    options: Mapping[str, Any] = MappingProxyType({})


SOURCES = {
    "c4": Source("allenai/c4", None, "train", options={"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}}),
    "ptb": Source(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        "train",
        "sentence",
        {"revision": "refs/convert/parquet"},  # the repository's own form is a script, which is no longer run
    ),
    "wikitext2": Source("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
    "pileval": Source("mit-han-lab/pile-val-backup", None, "validation"),
}


def read_text(dataset: str, tokens: int) -> str:
    """A file, or the beginning of a data set that is enough for so many ``tokens``.

    Args:
        dataset: a name of ``SOURCES``, or a UTF-8 file.
        tokens: tokens wanted.

    Raises:
        MissingPackageError: ``datasets`` is not installed.
        EvaluationInputError: neither, or the data set is not here and cannot be had.
    """
    if dataset not in SOURCES:
        if not Path(dataset).is_file():
            raise EvaluationInputError(f"no file {dataset!r}; use a UTF-8 text file or one of {', '.join(SOURCES)}.")
        return read_file(dataset)
    source = SOURCES[dataset]
    rows = load_rows(dataset, source.path, source.config, source.split, "--dataset FILE", **source.options)
    texts, length = [], 0
    for row in rows:
        texts.append(row[source.column])
        length += len(texts[-1])
        if length >= tokens * _CHARACTERS_PER_TOKEN:
            break
    return "\n\n".join(texts)
