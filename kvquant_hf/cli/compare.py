"""``kvquant compare``: lm-eval's tasks with several caches on the same problems, compared in pairs."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..policies.cost import page_cost
from ..policies.fingerprint import fingerprint
from ..policies.table import AnyPolicy, parse_policy
from .eval import EXACT
from .lm_eval import check_installed
from .measuring import check_writable, conditions, split_names
from .models import LoadedModel, check_cache_options, load_model
from .policies import shape_of
from .terminal import InputError, print_json, print_table, progress, stage

DEFAULT_POLICIES = "int8,int4,turboquant"
NOTHING = "-"
_SHARED = [
    "bits: per key or value element in full pages; of quanto and hqq, of what they have quantized",
    "+-: standard error",
]
NOTES = [*_SHARED, "difference: mean of the score minus exact's, problem by problem"]
NOTES_BINARY = [
    *_SHARED,
    "lost, gained: problems that only exact solves, and that only this cache does; p: McNemar's exact test of them",
]
TRACEABLE = ("lm_eval", "datasets")  # packages that the prompts and the scores are from


def compare(
    tasks: Annotated[str, typer.Option(help="lm-eval's tasks, groups or tags, with commas.")],
    out: Annotated[str, typer.Option(help="A folder for the answers, a file per cache; the same again goes on.")],
    model: Annotated[
        str | None, typer.Option(help="Folder, .gguf file or hub name; default: the built-in SmolLM2-135M-Instruct.")
    ] = None,
    policies: Annotated[
        str, typer.Option(help="Policies to measure, with commas; exact always is, and first.")
    ] = DEFAULT_POLICIES,
    baselines: Annotated[str, typer.Option(help="transformers' own caches, with commas: dynamic,quanto-4,hqq-4.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first problems of each task.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Problems side by side.")] = 8,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in each prompt; default: what the task says.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Prompts as a chat, examples as its earlier turns.")
    ] = False,
    include_path: Annotated[str | None, typer.Option(help="A folder with task files of your own.")] = None,
    metadata: Annotated[
        str, typer.Option(help="NAME=VALUE with commas, or a JSON object, for tasks that find their data by it.")
    ] = "",
    prefill: Annotated[
        str, typer.Option(help="What prompts of tasks that generate attend to in themselves: exact or quantized.")
    ] = "exact",
    page_size: Annotated[int, typer.Option(help="Tokens per page, a multiple of 8.")] = 64,
    sinks: Annotated[
        int | None, typer.Option(help="First tokens of a sequence that are kept exact; default: what the policy does.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    csv_file: Annotated[str | None, typer.Option("--csv", help="Write the numbers to a CSV file too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
) -> None:
    """Run lm-eval's tasks with several caches on the same problems, and compare scores problem by problem.

    How many problems a cache loses and gains against exact says more than two scores with their errors: McNemar's exact
    test is of these alone.  An interrupted run goes on where it was: give the same command, or a larger --limit.
    """
    check_installed()
    from ..evaluation.baselines import check_cache

    # Whatever can be wrong is said before a model is loaded or hours of measuring are lost.
    names = [EXACT, *(name for name in split_names(policies) if parse_policy(name).name != EXACT)]
    names = list({parse_policy(name): name for name in names}.values())
    for name in names:
        check_cache_options(name, page_size, prefill, sinks=sinks)
    others = split_names(baselines)
    for name in others:
        check_cache(name)
    given = _named(metadata)
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"no folder {include_path!r}; --include-path takes one with lm-eval's task files.")
    if Path(out).exists() and not Path(out).is_dir():
        raise InputError(f"{out!r} is a file; --out takes a folder, existing or new.")
    check_writable(csv_file)

    with stage("loading the tasks", hidden=as_json):
        from ..evaluation.answer_file import AnswerFile
        from ..evaluation.compare import answer, count, load_tasks, tabulate
        from ..evaluation.harness import written
        from ..transformers_api.auto import policy_for

        loaded_tasks = load_tasks(split_names(tasks), include_path, given)
    loaded = load_model(model, dtype, hidden=as_json)
    if apply_chat_template and not loaded.tokenizer.chat_template:
        raise InputError(f"{loaded.description} has no chat template; leave --apply-chat-template out.")
    documents = count(loaded_tasks, limit)
    settings = _settings(loaded) | {
        "tasks": {name: task.VERSION for name, task in loaded_tasks.items()},
        "num_fewshot": num_fewshot,
        "apply_chat_template": apply_chat_template,
        "batch": batch,
        "page_size": page_size,
        "sinks": sinks,
        "prefill": prefill,
    }
    caches: dict[str, AnyPolicy | None] = {
        written(name, loaded.model, page_size): policy_for(loaded.model.config, name, page_size) for name in names
    }
    caches |= dict.fromkeys(others)
    bits = {name: _bits(loaded, name, policy, page_size) for name, policy in caches.items()}
    files = {
        name: AnswerFile(Path(out), name, {"cache": name, "policy": policy and policy.as_dict()} | settings)
        for name, policy in caches.items()
    }
    options = {"page_size": page_size, "prefill": prefill, "batch_size": batch, "tokenizer": loaded.tokenizer}
    lms = {name: _make_lm(loaded, name, policy, sinks, options) for name, policy in caches.items()}
    settings |= {"limit": limit, "documents": documents}  # an answer does not depend on how many others there are
    with progress("measuring", len(files) * sum(documents.values()), hidden=as_json) as done:
        scores = answer(
            lms,
            loaded_tasks,
            files,
            limit=limit,
            num_fewshot=num_fewshot,
            chat=apply_chat_template,
            batch=batch,
            advance=done,
        )
    measures = tabulate(scores)
    if csv_file is not None:
        from ..benchmark.csv_file import write_csv

        write_csv(csv_file, settings, [row for measure in measures for row in _rows(measure, bits)])
    if as_json:
        print_json(settings | {"measures": [_as_dict(measure, bits) for measure in measures]})
    else:
        _print_tables(settings, measures, bits)


def _named(listed: str) -> dict[str, Any]:
    """Values by name, of ``NAME=VALUE`` with commas or of a JSON object.

    Raises:
        InputError: it is neither.
    """
    example = "write for instance --metadata gsm8k_test=FILE"
    if listed.lstrip().startswith("{"):
        try:
            return dict(json.loads(listed))
        except ValueError as error:
            raise InputError(
                f"{listed!r} is no JSON: {error}; {example}, or '{{\"max_seq_lengths\": [4096]}}'."
            ) from error
    parts = [part.partition("=") for part in split_names(listed)]
    if not all(name and sign for name, sign, _ in parts):
        raise InputError(f"{listed!r} is no list of names and values; {example}.")
    return {name: value for name, _, value in parts}


def _settings(loaded: LoadedModel) -> dict[str, Any]:
    """What answers depend on with any cache: the model, where it runs, versions of packages."""
    from importlib.metadata import version

    facts = conditions(loaded)
    facts["versions"] |= {package: version(package) for package in TRACEABLE}
    return facts | {
        "fingerprint": list(fingerprint(loaded.model.config)),
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
    }


def _make_lm(
    loaded: LoadedModel, name: str, policy: AnyPolicy | None, sinks: int | None, options: dict[str, Any]
) -> Any:
    """The model as lm-eval takes it, with one of the caches; without a policy it is a baseline."""
    from ..evaluation.compare import silent
    from ..evaluation.lm_eval_model import BaselineLM, KVQuantLM

    with silent():
        if policy is None:
            return BaselineLM(loaded.model, name, **options)
        return KVQuantLM(loaded.model, policy, sinks=sinks, **options)


def _bits(loaded: LoadedModel, name: str, policy: AnyPolicy | None, page_size: int) -> float:
    """Bits per key or value element in full pages; of a baseline, of what it has quantized."""
    from ..evaluation.baselines import stored_bits

    if policy is None:
        return stored_bits(loaded.model, name)
    shape = shape_of(loaded.description, loaded.model.config)
    cost = page_cost(
        policy, shape.head_dim, value_head_dim=shape.value_head_dim, page_size=page_size, dtype=loaded.model.dtype
    )
    return cost.bits_per_element


def _as_dict(measure: Any, bits: dict[str, float]) -> dict[str, Any]:
    caches = {}
    for name, row in measure.rows.items():
        caches[name] = {
            "bits_per_element": bits[name],
            "n": row.score.n,
            "score": row.score.mean,
            "stderr": row.score.stderr,
            "against_exact": row.paired and row.paired.as_dict(),
        }
    return _named_as(measure) | {"binary": measure.binary, "caches": caches}


def _rows(measure: Any, bits: dict[str, float]) -> list[dict[str, Any]]:
    """A line of the CSV file per cache; what compares with ``exact`` is empty in its own."""
    from ..evaluation.paired import Paired

    rows = []
    for name, own in _as_dict(measure, bits)["caches"].items():
        paired = own.pop("against_exact") or dict.fromkeys(field.name for field in fields(Paired))
        rows.append(_named_as(measure) | {"cache": name} | own | paired)
    return rows


def _named_as(measure: Any) -> dict[str, str]:
    return {"task": measure.task, "metric": measure.metric, "filter": measure.filter}


def _print_tables(settings: dict[str, Any], measures: Sequence[Any], bits: dict[str, float]) -> None:
    """A table per metric, as wide as a terminal of 80 columns."""
    from ..benchmark.tables import Table

    for i, measure in enumerate(measures):
        named = f"{measure.task}, {measure.metric}" + (f" ({measure.filter})" if measure.filter != "none" else "")
        title = f"{settings['model']}, {settings['dtype']}: {named}"
        headings = ("lost", "gained", "p") if measure.binary else ("difference", "+-")
        lines = [(name, f"{bits[name]:.2f}", *_cells(row, measure.binary)) for name, row in measure.rows.items()]
        last = i + 1 == len(measures) or measures[i + 1].binary != measure.binary
        notes = (NOTES_BINARY if measure.binary else NOTES) if last else []
        print_table(Table(title, ("cache", "bits", "n", "score", "+-", *headings), lines, notes, words=1))


def _cells(row: Any, binary: bool) -> list[str]:
    """What a line says of one cache: its score, and how it compares with the exact one's."""
    number = "{:.2%}" if binary else "{:.4g}"
    score, paired = row.score, row.paired
    cells = [str(score.n), number.format(score.mean), _error(score.stderr, number)]
    if paired is None:
        return cells + [NOTHING] * (3 if binary else 2)
    if binary:
        return [*cells, str(paired.lost), str(paired.gained), f"{paired.p:.2g}"]
    return [*cells, f"{paired.difference:+.3g}", _error(paired.difference_stderr, "{:.2g}")]


def _error(stderr: float | None, number: str) -> str:
    return NOTHING if stderr is None else number.format(stderr)
