"""The answers of one cache to the problems of lm-eval's tasks, in a file that grows while they are given.

JSON lines.  The first is ``{"settings": {...}}``: everything that the answers depend on.  Each other line is a problem:

    task, document    lm-eval's name of the task, and the document's number in it
    kind              what was asked of the model: generate_until, loglikelihood, loglikelihood_rolling
    prompts           a hash of what it was asked
    responses         its answers, one per request
    scores            {"metric,filter": number}; added when all problems have been answered

A line is written when its problem has been answered, so a run that is interrupted loses the batch that it was in, and
goes on from there, and so does one that asks for more problems.  A file with other settings is refused: what it holds
could not be compared.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..errors import EvaluationInputError

Key = tuple[str, int, str]  # task, document, kind
Scores = dict[str, dict[int, dict[str, float]]]  # by task and document, a number for each "metric,filter"


class AnswerFile:
    """The file of one cache.

    Args:
        folder: where it lies, or will.
        cache: what its name is made of.
        settings: what the answers depend on, ready for JSON.

    Raises:
        EvaluationInputError: the file was made with other settings, or is none of ours.
    """

    def __init__(self, folder: Path, cache: str, settings: Mapping[str, Any]) -> None:
        self.path = folder / f"{quote(cache, safe='')}.jsonl"  # "/" is in names of policies
        self._settings = json.loads(json.dumps(settings))  # as they are read back
        self._lines: dict[Key, dict[str, Any]] = {}
        if self.path.exists():
            self._read()

    def find(self, key: Key, prompts: str) -> list[Any] | None:
        """The responses to a problem, or None; ``prompts`` is the hash of what is asked.

        Raises:
            EvaluationInputError: something else was asked then.
        """
        line = self._lines.get(key)
        if line is None:
            return None
        if line["prompts"] != prompts:
            raise EvaluationInputError(
                f"{str(self.path)!r} has an answer to another document {key[1]} of {key[0]!r} than there is now; give "
                "another --out, or delete it."
            )
        found: list[Any] = line["responses"]
        return found

    def add(self, answers: Iterable[tuple[Key, str, list[Any]]]) -> None:
        """Write answers: key, hash of what was asked, responses."""
        new = {
            key: dict(zip(("task", "document", "kind"), key, strict=True)) | {"prompts": prompts, "responses": given}
            for key, prompts, given in answers
        }
        if not self.path.exists():
            self._write({"settings": self._settings})
        self._write(*new.values())
        self._lines |= new

    def finish(self, scores: Scores) -> None:
        """Write the scores beside the answers; problems without a new one, and what stands there already, stay."""
        new = {key: scores.get(key[0], {}).get(key[1]) for key in self._lines}
        lines = {key: line if new[key] is None else line | {"scores": new[key]} for key, line in self._lines.items()}
        if lines == self._lines:
            return
        whole = [{"settings": self._settings}, *lines.values()]
        draft = self.path.with_suffix(".new")
        draft.write_text("".join(f"{json.dumps(line)}\n" for line in whole), encoding="utf-8")
        os.replace(draft, self.path)
        self._lines = lines

    def _write(self, *lines: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(line)}\n" for line in lines)

    def _read(self) -> None:
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]  # the last line may have been cut while it was written
        try:
            first, *lines = [json.loads(line) for line in whole.splitlines()]
            settings = dict(first["settings"])
            found = {(line["task"], line["document"], line["kind"]): line for line in lines}
        except (ValueError, TypeError, KeyError) as error:
            raise EvaluationInputError(
                f"{str(self.path)!r} is no file of answers; give another --out, or delete it."
            ) from error
        self._compare(settings)
        self._lines = found
        if whole != text:
            os.truncate(self.path, len(whole))

    def _compare(self, made_with: dict[str, Any]) -> None:
        for name in self._settings | made_with:
            before, now = made_with.get(name), self._settings.get(name)
            if before != now:
                raise EvaluationInputError(
                    f"{str(self.path)!r} was made with {name}={json.dumps(before)}, not {json.dumps(now)}; give "
                    "another --out, or delete it."
                )
