"""``kvquant compare`` on a tiny model and two small tasks."""

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from command import Outcome, Run, is_one_sentence, save_tiny_model
from lm_eval.tasks import TaskManager
from lm_eval_task import NAMES, write_tasks

from kvquant_hf.cli import compare as command
from kvquant_hf.cli import main
from kvquant_hf.evaluation import lm_eval_model
from kvquant_hf.evaluation.lm_eval_model import KVQuantLM
from kvquant_hf.policies.file import write_layers
from kvquant_hf.policies.table import parse_policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def compare(
    tiny: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Run:
    """The command in this process, with the small tasks; lm-eval's own thousands are not indexed."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.delenv("KVQUANT_DEBUG", raising=False)
    own = ("--model", tiny, "--include-path", folder, "--out", tmp_path / "out", "--page-size", 16, "--batch", 2)

    def run(*args: Any) -> Outcome:
        with pytest.raises(SystemExit) as exit_:
            main(["compare", *map(str, (*own, *args))])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Outcome(exit_.value.code, captured.out, captured.err)

    return run


def test_as_json(compare: Run, tmp_path: Path) -> None:
    asked = ("--tasks", ",".join(NAMES), "--policies", "int4-channel/lloyd2,exact", "--baselines", "dynamic")
    code, out, err = compare(
        *asked,
        "--limit",
        3,
        "--num-fewshot",
        1,
        "--metadata",
        '{"first": "So: "}',
        "--json",
        "--csv",
        tmp_path / "out.csv",
    )
    data = json.loads(out)
    assert (code, err) == (0, "")
    conditions = {"limit": 3, "documents": dict.fromkeys(NAMES, 3), "num_fewshot": 1, "batch": 2, "dtype": "float32"}
    assert conditions.items() <= data.items() and set(data["tasks"]) == set(NAMES)
    assert data["versions"]["lm_eval"].startswith("0.")
    named = [(one["task"], one["metric"], one["filter"], one["binary"]) for one in data["measures"]]
    assert named == [
        ("small_words", "odd", "none", True),
        ("small_words", "mean_byte", "none", False),
        ("small_choices", "acc", "none", True),
    ]
    names = ["exact", "int4-channel/lloyd2", "dynamic"]
    scores = {}
    for name in names:
        file = tmp_path / "out" / f"{name.replace('/', '%2F')}.jsonl"
        first, *lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        assert first["settings"]["cache"] == name and "limit" not in first["settings"]
        assert (first["settings"]["policy"] is None) == (name == "dynamic")
        scores[name] = {line["document"]: line["scores"] for line in lines if line["task"] == "small_words"}
    for measure in data["measures"]:
        assert list(measure["caches"]) == names
        exact, quantized, dynamic = measure["caches"].values()
        assert exact["against_exact"] is None and exact["n"] == 3
        assert dynamic["score"] == exact["score"] and dynamic["against_exact"]["difference"] == 0
        assert (exact["bits_per_element"], dynamic["bits_per_element"]) == (32, 32)
        assert 2 < quantized["bits_per_element"] < 8
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["metric"], row["cache"]) for row in rows] == [
        (task, metric, name) for task, metric, _, _ in named for name in names
    ]
    for row, of in zip(rows, (of for one in data["measures"] for of in one["caches"].values()), strict=True):
        assert (row["model"], row["limit"], row["filter"]) == (data["model"], "3", "none")
        assert (float(row["score"]), int(row["n"])) == (of["score"], 3)
        paired = of["against_exact"] or dict.fromkeys(("lost", "gained", "p", "difference"))
        assert all(row[name] == ("" if paired[name] is None else str(paired[name])) for name in paired)
    exact, quantized = (data["measures"][1]["caches"][name] for name in names[:2])
    differences = [scores[names[1]][i]["mean_byte,none"] - scores["exact"][i]["mean_byte,none"] for i in range(3)]
    assert quantized["against_exact"]["difference"] == pytest.approx(sum(differences) / 3)
    assert quantized["against_exact"]["p"] is None and quantized["against_exact"]["difference_stderr"] is not None
    assert exact["stderr"] is not None


def test_as_a_table_of_80_columns(compare: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = compare(
        "--tasks", "small_words", "--policies", "int8,turboquant", "--limit", 1, "--dtype", "bfloat16"
    )
    assert code == 0 and "loading the tasks ..." in err and "measuring ..." in err
    assert max(map(len, out.splitlines())) <= 80
    odd, mean = out.split("small_words, mean_byte")
    assert "bfloat16: small_words, odd\n" in odd and "McNemar" in odd and "McNemar" not in mean
    for table, cells in ((odd, 8), (mean, 7)):
        rows = {
            line.split()[0]: line.split() for line in table.splitlines() if line.startswith(("exact", "int8", "turb"))
        }
        assert list(rows) == ["exact", "int8", "turboquant"]
        assert {len(row) for row in rows.values()} == {cells}
        assert rows["exact"][1:3] == ["16.00", "1"] and rows["exact"][5:] == ["-"] * (cells - 5)
        assert rows["int8"][4] == "-"  # one problem has no error


def test_an_interrupted_run_goes_on(compare: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("--tasks", "small_words", "--policies", "int4", "--json")
    generate, calls = KVQuantLM._model_generate, []

    def counted(self: Any, context: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(context))
        if sum(calls) > stop:
            raise KeyboardInterrupt
        return generate(self, context, *args, **options)

    monkeypatch.setattr(lm_eval_model.CacheLM, "_model_generate", counted)
    stop = 10  # of 14; a batch of two begins with the next, and is lost
    code, out, err = compare(*asked)
    assert (code, out) == (130, "") and is_one_sentence(err) and "interrupted" in err
    lines = {path.stem: path.read_text(encoding="utf-8").count("\n") - 1 for path in (tmp_path / "out").iterdir()}
    assert lines == {"exact": 6, "int4": 4}
    stop = 1000
    calls.clear()
    code, out, err = compare(*asked)
    assert (code, err) == (0, "") and sum(calls) == 4
    calls.clear()
    assert compare(*asked).out == out and not calls
    # Fewer problems are there too.  Other settings, and nothing is measured.
    assert json.loads(compare(*asked, "--limit", 3).out)["limit"] == 3 and not calls
    code, out, err = compare(*asked, "--num-fewshot", 1)
    assert (code, out) == (2, "") and is_one_sentence(err) and not calls
    assert "exact.jsonl' was made with num_fewshot=null, not 1; give another --out" in err


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("--policies", "int5"), "turboquant"),
        (("--policies", "int8-static"), "qparams"),
        (("--baselines", "quanto-3"), "use quanto-2"),
        (("--page-size", "60"), "multiple of 8"),
        (("--prefill", "none"), "prefill"),
        (("--metadata", "file"), "--metadata gsm8k_test=FILE"),
        (("--metadata", '{"first": So}'), "is no JSON"),
        (("--include-path", "/no/such/folder"), "--include-path"),
        (("--out", __file__), "--out takes a folder"),
        (("--csv", "/no/such/folder/x.csv"), "folder that exists"),
        (("--tasks", "nothing"), "no task 'nothing'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_one_sentence(
    compare: Run, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], word: str
) -> None:
    monkeypatch.setattr(command, "load_model", None)  # no model is loaded before that
    code, out, err = compare("--tasks", "small_words", "--json", *args)
    assert (code, out) == (2, "")
    assert is_one_sentence(err)
    assert word in err


def test_a_budget_is_shown_with_what_it_chose(compare: Run, tmp_path: Path) -> None:
    code, out, _ = compare("--tasks", "small_choices", "--policies", "auto:9.5", "--limit", 2, "--json")
    name = list(json.loads(out)["measures"][0]["caches"])[1]
    assert code == 0 and name.startswith("auto:9.5 (")
    (file,) = (path for path in (tmp_path / "out").iterdir() if path.name != "exact.jsonl")
    settings = json.loads(file.read_text(encoding="utf-8").splitlines()[0])["settings"]
    assert settings["cache"] == name
    assert settings["policy"] == parse_policy(name.partition("(")[2][:-1]).as_dict()


def test_a_policy_for_another_model(compare: Run, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.json"
    write_layers(tuned, [{"keys": "int8-channel", "values": "int8-channel"}] * 2, ["qwen2"], {})
    code, out, err = compare("--tasks", "small_words", "--policies", tuned, "--json")
    assert (code, out) == (2, "") and is_one_sentence(err) and "kvquant tune" in err
    assert not (tmp_path / "out").exists()  # before exact was measured


def test_no_chat_template(compare: Run) -> None:
    code, out, err = compare("--tasks", "small_words", "--apply-chat-template", "--json")
    assert (code, out) == (2, "") and is_one_sentence(err) and "leave --apply-chat-template out" in err


def test_a_chat_template_is_used(compare: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    load = command.load_model

    def with_template(*args: Any, **options: Any) -> Any:
        loaded = load(*args, **options)
        loaded.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<bot>"
        return loaded

    monkeypatch.setattr(command, "load_model", with_template)
    seen = []
    encode = KVQuantLM.tok_batch_encode
    monkeypatch.setattr(
        KVQuantLM, "tok_batch_encode", lambda self, texts, **rest: seen.extend(texts) or encode(self, texts, **rest)
    )
    asked = ("--tasks", "small_words", "--policies", "", "--limit", 1, "--apply-chat-template", "--json")
    assert compare(*asked).code == 0
    (prompt,) = seen
    assert prompt.count("<user>") == 3 and prompt.count("<assistant>") == 2 and prompt.endswith("<bot>")


def test_a_baseline_is_missing(compare: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvquant_hf.evaluation.baselines._installed", lambda module: False)
    code, out, err = compare("--tasks", "small_words", "--baselines", "dynamic,hqq-4")
    assert (code, out) == (1, "")
    assert is_one_sentence(err) and "pip install hqq, or leave it out of --baselines" in err
