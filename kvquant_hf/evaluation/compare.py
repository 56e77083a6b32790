"""lm-eval's tasks with several caches, on the same problems, so that scores can be compared in pairs.

lm-eval builds the prompts and scores the answers; this module comes between it and the model.  Answers that a file has
(``answer_file.py``) are taken from there, the others are asked for in blocks of a batch, longest prompts first as
lm-eval has them, of one cache after another, and written after each block.  Prompts therefore are those of ``kvquant
lm-eval``, examples included, however often a run was interrupted; asked for in parts (lm-eval's ``samples``) they would
have other examples in each.
``paired.py`` has the statistics.
"""

import hashlib
import json
import logging
import numbers
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import lm_eval
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import lm_eval.tasks
import numpy as np
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

from ..errors import EvaluationInputError, MissingPackageError
from .answer_file import AnswerFile, Scores
from .lm_eval_model import CacheLM
from .paired import Mean, Paired, compare, is_binary, mean_of
from .shared_prompts import SharedPrompts

_KINDS = ("generate_until", "loglikelihood", "loglikelihood_rolling")
_NOT_MEASURED = -1.0  # what lm-eval's RULER gives as the score at lengths that a document does not have
_WITH_BARS = (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface)


class Row(NamedTuple):
    """One cache: its score, and how it compares with the first one (None for that one itself)."""

    score: Mean
    paired: Paired | None


class Measure(NamedTuple):
    """A metric of a task, for all caches.

    Args:
        task, metric, filter: lm-eval's names; the filter says how an answer is read.
        binary: whether all scores are 0 or 1.
        rows: by cache.
    """

    task: str
    metric: str
    filter: str
    binary: bool
    rows: dict[str, Row]


def load_tasks(
    names: Sequence[str], include_path: str | None = None, metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """lm-eval's tasks by name; a group or a tag brings all of its own.  Seeds are lm-eval's own.

    Args:
        names: of tasks, groups or tags.
        include_path: a folder with further task files.
        metadata: handed to the tasks; some find their data by it.

    Raises:
        EvaluationInputError: no such task.
        MissingPackageError: a task needs a package that is not installed.
    """
    options = {"include_path": include_path, "metadata": dict(metadata or {})}
    with silent():
        manager = lm_eval.tasks.TaskManager(include_defaults=False, **options)
        if not set(names) <= set(manager.all_subtasks):  # lm-eval's own are thousands of files
            manager = lm_eval.tasks.TaskManager(**options)
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown:
            raise EvaluationInputError(
                f"lm-eval has no task {', '.join(map(repr, unknown))}; `kvquant lm-eval ls tasks` lists them, and "
                "--include-path adds a folder of your own."
            )
        try:
            tasks: dict[str, Any] = {}
            for name in names:  # a task that draws its data draws the same in every run, whatever others there are
                random.seed(DEFAULT_RANDOM_SEED)
                np.random.seed(DEFAULT_OTHER_SEED)
                tasks |= manager.load([name])["tasks"]
        except ImportError as error:
            raise MissingPackageError(
                f"the tasks {', '.join(names)} need a package that is not installed: {str(error).splitlines()[0]}"
            ) from error
    return tasks


def count(tasks: Mapping[str, Any], limit: int | None) -> dict[str, int]:
    """Documents of each task, at most ``limit``."""
    return {name: min(len(task.eval_docs), limit or len(task.eval_docs)) for name, task in tasks.items()}


def answer(
    lms: Mapping[str, CacheLM],
    tasks: Mapping[str, Any],
    files: Mapping[str, AnswerFile],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    batch: int = 1,
    advance: Callable[[str], object] = lambda name: None,
) -> dict[str, Scores]:
    """Scores of every document with every cache; answers that a file has are not asked for again.

    A block of documents goes through all caches before the next: where a prompt attends to itself as it came, it is
    read once for all of them (``shared_prompts.py``).

    Args:
        lms: by name of the cache; used up: they ask through the files from now on.
        tasks: of :func:`load_tasks`.
        files: of these caches, for these tasks.
        limit: the first documents of each task only.
        num_fewshot: examples in the prompt; None: what the task says.
        chat: put prompts through the tokenizer's chat template, examples as earlier turns.
        batch: documents of a block, between two writes; the models' own batch size, for blocks that fill their batches.
        advance: called with the cache's name for each document that it has answered.

    Raises:
        EvaluationInputError: a file's answers are to something else, or a task has no score for a single document.
    """
    prompts = SharedPrompts()
    for lm in lms.values():
        lm.prompts = prompts
    first = next(iter(lms))
    for kind in _KINDS:
        asked = {name: (files[name], getattr(lm, kind)) for name, lm in lms.items()}
        for name, lm in lms.items():
            # The first one asks for all; what the others ask then is in their files.
            own, told = (asked, advance) if name == first else ({name: asked[name]}, lambda name: None)
            setattr(lm, kind, _through(own, kind, batch, told, prompts.clear))
    scores = {}
    for name, lm in lms.items():
        with silent():
            results = lm_eval.simple_evaluate(
                lm,
                tasks=list(tasks.values()),
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=chat,
                log_samples=True,
                bootstrap_iters=0,
                task_manager=lm_eval.tasks.TaskManager(include_defaults=False),  # loaded already: none is looked up
            )
        scores[name] = _scores(results["samples"])
        files[name].finish(scores[name])
    return scores


def tabulate(scores: Mapping[str, Scores]) -> list[Measure]:
    """Every metric of every task; ``scores`` by cache, the exact one first."""
    exact = next(iter(scores))
    measures = []
    for task, documents in scores[exact].items():
        for measured in dict.fromkeys(name for document in documents.values() for name in document):
            numbered = [number for number, document in documents.items() if measured in document]
            values = {name: [of[task][number][measured] for number in numbered] for name, of in scores.items()}
            if all(value == _NOT_MEASURED for own in values.values() for value in own):
                continue
            binary = all(map(is_binary, values.values()))
            rows = {
                name: Row(mean_of(own), None if name == exact else compare(values[exact], own, binary=binary))
                for name, own in values.items()
            }
            metric, _, filtered = measured.partition(",")
            measures.append(Measure(task, metric, filtered, binary, rows))
    return measures


def _through(
    asked: Mapping[str, tuple[AnswerFile, Callable[..., Any]]],
    kind: str,
    batch: int,
    advance: Callable[[str], object],
    forget: Callable[[], None],
) -> Callable[..., Any]:
    """What asks every cache for requests of one kind that its file has no answers to, and gives the first one's.

    Args:
        asked: file and method of lm-eval's models, by cache.
        forget: called when a block has gone through all of them.
    """
    restored = tuple if kind == "loglikelihood" else lambda response: response  # JSON has no tuples

    def answers(requests: Sequence[Any], **_: Any) -> list[Any]:
        documents: dict[tuple[str, int], list[Any]] = {}
        for request in requests:
            documents.setdefault((request.task_name, request.doc_id), []).append(request)
        hashes = {document: _hash(own) for document, own in documents.items()}
        given: dict[str, dict[tuple[str, int], list[Any]]] = {}
        for name, (file, _ask) in asked.items():
            found = {document: file.find((*document, kind), hashed) for document, hashed in hashes.items()}
            given[name] = {document: own for document, own in found.items() if own is not None}
            for _document in given[name]:
                advance(name)
        lacking = [document for document in documents if any(document not in own for own in given.values())]
        lacking.sort(key=_size(documents))
        for start in range(0, len(lacking), batch):
            for name, (file, ask) in asked.items():
                block = [document for document in lacking[start : start + batch] if document not in given[name]]
                if not block:
                    continue
                responses = iter(ask([request for each in block for request in documents[each]], disable_tqdm=True))
                new = {document: [next(responses) for _ in documents[document]] for document in block}
                file.add(((*document, kind), hashes[document], own) for document, own in new.items())
                given[name] |= new
                for _document in block:
                    advance(name)
            forget()
        rows = {document: iter(own) for document, own in next(iter(given.values())).items()}
        return [restored(next(rows[request.task_name, request.doc_id])) for request in requests]

    return answers


def _size(documents: Mapping[tuple[str, int], list[Any]]) -> Callable[[tuple[str, int]], int]:
    """What sorts the documents with the longest prompts first."""
    return lambda document: -sum(len(request.args[0]) for request in documents[document])


def _hash(requests: Sequence[Any]) -> str:
    """Of everything that a document asks: prompts, continuations, options of generation."""
    asked = json.dumps([request.args for request in requests], sort_keys=True, default=str)
    return hashlib.sha256(asked.encode()).hexdigest()


def _scores(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Scores:
    """The numbers that lm-eval gives to single documents.

    Raises:
        EvaluationInputError: a task has none.
    """
    scores: Scores = {}
    for task, logged in samples.items():
        documents: dict[int, dict[str, float]] = {}
        for sample in logged:
            numbered = documents.setdefault(sample["doc_id"], {})
            values = {f"{metric},{sample['filter']}": sample[metric] for metric in sample["metrics"]}
            numbered |= {name: float(value) for name, value in values.items() if isinstance(value, numbers.Real)}
        if not any(documents.values()):
            raise EvaluationInputError(
                f"the task {task!r} has no number for a single document, so nothing can be paired; leave it out of "
                "--tasks and use `kvquant lm-eval` for it."
            )
        scores[task] = documents
    return scores


@contextmanager
def silent() -> Iterator[None]:
    """lm-eval without its bars and its advice: the command has a bar, and its settings are on purpose."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, [vars(module)["tqdm"] for module in _WITH_BARS]
    logger.setLevel(logging.ERROR)
    for module, bar in zip(_WITH_BARS, bars, strict=True):
        vars(module)["tqdm"] = _hidden(bar)
    try:
        yield
    finally:
        logger.setLevel(level)
        for module, bar in zip(_WITH_BARS, bars, strict=True):
            vars(module)["tqdm"] = bar


def _hidden(bar: Callable[..., Any]) -> Callable[..., Any]:
    """``bar`` that shows nothing, whatever it is told."""
    return lambda *arguments, **options: bar(*arguments, **(options | {"disable": True}))
