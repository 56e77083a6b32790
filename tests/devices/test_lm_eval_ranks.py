"""``kvquant lm-eval`` in two processes: each evaluates half of the documents, or both all of them with half of a model;
there is one table."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from command import save_tiny_model

pytest.importorskip("lm_eval", reason="an extra of the package")

from devices.launch import TESTS, torchrun

TASKS = TESTS.parent / "benchmarks/lm_eval"
DOCUMENTS = 5  # the second process has one less, and is asked the last of its own twice
pytestmark = pytest.mark.slow


class Run(NamedTuple):
    output: str
    result: dict[str, Any]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """A tiny model, five questions with four choices, and five prompts to go on with."""
    folder = tmp_path_factory.mktemp("ranks")
    model = save_tiny_model(folder / "model")
    choices = [
        {"context": f"{i} and {i} is", "choices": [str(2 * i + n) for n in range(4)], "answer": i % 4}
        for i in range(DOCUMENTS)
    ]
    needles = [{"prompt": f"The number is {i * 11111}. It is", "answer": str(i * 11111)} for i in range(DOCUMENTS)]
    for name, rows in {"choices": choices, "needle": needles}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    files = ",".join(f"{name}={folder / name}.jsonl" for name in ("choices", "needle"))
    options = ["--model", "kvquant", "--model_args", f"pretrained={model},policy=int4,page_size=8", "--device", "cpu"]
    options += ["--tasks", "local_choices,local_needle", "--include_path", TASKS, "--metadata", files]
    return [*options, "--gen_kwargs", "max_gen_toks=3", "--log_samples"]


def evaluate(arguments: list[str | Path], folder: Path, processes: int, more: str = "") -> Run:
    given = [f"{value}{more}" if str(value).startswith("pretrained=") else value for value in arguments]
    output = torchrun("evaluate.py", *given, "--output_path", folder / "results.json", processes=processes)
    (file,) = folder.glob("results*.json")  # one process writes it
    return Run(output, json.loads(file.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def together(arguments: list[str | Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return evaluate(arguments, tmp_path_factory.mktemp("together"), 2)


@pytest.fixture(scope="module")
def alone(arguments: list[str | Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return evaluate(arguments, tmp_path_factory.mktemp("alone"), 1)


def asked(run: Run) -> list[tuple[int, int]]:
    """Choices scored and prompts gone on with, by process."""
    return [
        tuple(map(int, pair)) for pair in re.findall(r"'loglikelihood': (\d+), 'generate_until': (\d+)", run.output)
    ]


def test_each_process_does_its_half(together: Run, alone: Run) -> None:
    assert asked(alone) == [(4 * DOCUMENTS, DOCUMENTS)]
    assert asked(together) == 2 * [(4 * 3, 3)]  # lm-eval has all processes answer equally many


def test_a_model_that_is_spread(arguments: list[str | Path], alone: Run, tmp_path: Path) -> None:
    """``tp_plan`` is lm-eval's own option: every process is asked everything."""
    run = evaluate(arguments, tmp_path, 2, ",tp_plan=auto")
    assert asked(run) == 2 * asked(alone)
    assert run.output.count("|local_choices|") == 1
    assert run.result["results"] == alone.result["results"]


def test_there_is_one_table(together: Run) -> None:
    assert together.output.count("|local_choices|") == 1


def test_the_results_are_those_of_one_process(together: Run, alone: Run) -> None:
    assert together.result["results"] == alone.result["results"]
    assert together.result["n-samples"] == alone.result["n-samples"]
