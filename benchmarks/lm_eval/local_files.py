"""The data of the tasks beside this file, from files that ``--metadata`` names; nothing is downloaded.

lm-eval calls the function that a task names in ``custom_dataset`` with everything in ``--metadata`` and
``--model_args``, so each takes what it knows and ignores the rest.
"""

import json
import re
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

# The first line of an article, " = Title = "; sections have more signs: " = = Section = = ".
_TITLE = re.compile(r"^ ?= [^=\n]+ = ?$", re.MULTILINE)


def wikitext2(*, wikitext2: str = "", **_: Any) -> DatasetDict:
    """Articles of a WikiText-2 file as it is distributed: split ``test``, column ``page``."""
    text = _path(wikitext2, "wikitext2").read_text(encoding="utf-8")
    starts = [match.start() for match in _TITLE.finditer(text)] or [0]
    pages = (text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True))
    return _splits(test=[{"page": page} for page in pages])


def gsm8k(*, gsm8k_test: str = "", gsm8k_train: str = "", **_: Any) -> DatasetDict:
    """JSON lines with ``question`` and ``answer``: split ``test``, and ``train`` for the examples in the prompt."""
    return _splits(test=_rows(gsm8k_test, "gsm8k_test"), train=_rows(gsm8k_train, "gsm8k_train"))


def choices(*, choices: str = "", **_: Any) -> DatasetDict:
    """JSON lines with ``context``, ``choices`` and ``answer``, the index of the right one: split ``test``."""
    return _splits(test=_rows(choices, "choices"))


def needle(*, needle: str = "", **_: Any) -> DatasetDict:
    """JSON lines with ``prompt`` and ``answer``: split ``test``."""
    return _splits(test=_rows(needle, "needle"))


def _splits(**rows: list[dict[str, Any]]) -> DatasetDict:
    return DatasetDict({split: Dataset.from_list(part) for split, part in rows.items()})


def _rows(path: str, name: str) -> list[dict[str, Any]]:
    with _path(path, name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def _path(path: str, name: str) -> Path:
    if not path or not Path(path).is_file():
        raise FileNotFoundError(f"this task reads a local file, and {path!r} is none: add --metadata {name}=FILE")
    return Path(path)
