"""``kvquant lm-eval`` in two processes: each evaluates half of the documents, or both all of them with half of a model;
there is one table."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval
import pytest
import torch
from command import save_tiny_model
from devices.launch import TESTS, torchrun
from lm_eval.tasks import TaskManager

import kvquant_hf.evaluation.lm_eval_model  # noqa: F401  # registers the model

TASKS = TESTS.parent / "benchmarks/lm_eval"
NAMES = ["local_choices", "local_needle"]
DOCUMENTS = 5  # the second process has one less, and is asked the last of its own twice
pytestmark = pytest.mark.slow


class Run(NamedTuple):
    output: str
    results: dict[str, Any]
    answers: dict[str, list[str]]  # of the model to each document, by task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, five questions with four choices, and five prompts to go on with."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    save_tiny_model(folder / "model")
    choices = [
        {"context": f"{i} and {i} is", "choices": [str(2 * i + n) for n in range(4)], "answer": i % 4}
        for i in range(DOCUMENTS)
    ]
    needles = [{"prompt": f"The number is {i * 11111}. It is", "answer": str(i * 11111)} for i in range(DOCUMENTS)]
    for name, rows in {"choices": choices, "needle": needles}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def model_args(folder: Path) -> dict[str, Any]:
    return {"pretrained": str(folder / "model"), "policy": "int4", "page_size": 8}


def files(folder: Path) -> dict[str, str]:
    """Where the tasks find their documents."""
    return {name: str(folder / f"{name}.jsonl") for name in ("choices", "needle")}


def pairs(values: dict[str, Any]) -> str:
    """As a command line has them."""
    return ",".join(f"{name}={value}" for name, value in values.items())


def in_two(folder: Path, out: Path, **more: str) -> Run:
    """The command, in two processes."""
    options = ["--model", "kvquant", "--model_args", pairs(model_args(folder) | more), "--device", "cpu"]
    options += ["--tasks", ",".join(NAMES), "--include_path", str(TASKS), "--metadata", pairs(files(folder))]
    options += ["--gen_kwargs", "max_gen_toks=3", "--log_samples", "--output_path", str(out / "results.json")]
    output = torchrun("evaluate.py", *options)
    (file,) = out.glob("results*.json")  # one process writes it
    samples = {}
    for name in NAMES:
        (path,) = out.glob(f"samples_{name}*.jsonl")
        samples[name] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return Run(output, json.loads(file.read_text(encoding="utf-8"))["results"], answers(samples))


def answers(samples: dict[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    """What the model answered, in the order of the documents: texts, or log-probabilities of choices."""

    def said(row: dict[str, Any]) -> str:
        parts = [answers[0] for answers in row["resps"]]  # what was asked again was answered again
        return " ".join(str(x) for part in parts for x in ([part] if isinstance(part, str) else part))

    return {name: [said(row) for row in sorted(rows, key=lambda row: row["doc_id"])] for name, rows in samples.items()}


@pytest.fixture(scope="module")
def together(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return in_two(folder, tmp_path_factory.mktemp("together"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> Run:
    """The same in this process."""
    found = lm_eval.simple_evaluate(
        model="kvquant",
        model_args=model_args(folder),
        device="cpu",
        tasks=NAMES,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False, metadata=files(folder)),
        gen_kwargs={"max_gen_toks": 3},
        bootstrap_iters=100000,
    )
    return Run("", json.loads(json.dumps(found["results"])), answers(found["samples"]))


def asked(run: Run) -> list[tuple[int, int]]:
    """Choices scored and prompts gone on with, by process."""
    return [
        (int(scored), int(continued))
        for scored, continued in re.findall(r"'loglikelihood': (\d+), 'generate_until': (\d+)", run.output)
    ]


def check_results(run: Run, alone: Run) -> None:
    """Equal, but for the order in which documents are added up."""
    for name in NAMES:
        assert run.results[name] == pytest.approx(alone.results[name])


def test_each_process_does_its_half(together: Run) -> None:
    assert asked(together) == 2 * [(4 * 3, 3)]  # lm-eval has all processes answer equally many


def test_there_is_one_table(together: Run) -> None:
    assert together.output.count("|local_choices|") == 1


def test_the_results_are_those_of_one_process(together: Run, alone: Run) -> None:
    check_results(together, alone)
    assert together.answers == alone.answers
    assert len(set(alone.answers["local_choices"])) == DOCUMENTS


def test_a_model_that_is_spread(folder: Path, alone: Run, tmp_path: Path) -> None:
    """``tp_plan`` is lm-eval's own option: every process is asked everything."""
    run = in_two(folder, tmp_path, tp_plan="auto")
    assert asked(run) == 2 * [(4 * DOCUMENTS, DOCUMENTS)]
    assert run.output.count("|local_choices|") == 1
    check_results(run, alone)
