"""Several caches on the same problems: through lm-eval, through files that grow, and in pairs."""

import json
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from command import byte_tokenizer
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval_task import NAMES, write_tasks
from models import prompt, ragged_prompts, tiny_gemma2, tiny_hybrid, tiny_llama
from stores import same_bytes
from transformers import cache_utils

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.errors import EvaluationInputError, MissingPackageError
from kvquant_hf.evaluation import baselines
from kvquant_hf.evaluation.answer_file import AnswerFile
from kvquant_hf.evaluation.baselines import stored_bits
from kvquant_hf.evaluation.compare import answer, count, load_tasks, silent, tabulate
from kvquant_hf.evaluation.lm_eval_model import BaselineLM, KVQuantLM
from kvquant_hf.evaluation.paired import Mean, Paired
from kvquant_hf.evaluation.shared_prompts import SharedPrompts
from kvquant_hf.transformers_api.names import with_cache

DOCUMENTS, CHOICES = 7, 2
BATCH = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(autouse=True)
def _own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own thousands of tasks are not indexed."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(vocab_size=257)


def wrap(kind: Any, model: Any, **options: Any) -> Any:
    own = {} if kind is HFLM else {"page_size": 16}
    return kind(pretrained=model, tokenizer=byte_tokenizer(), max_length=512, batch_size=BATCH, **own, **options)


def answer_one(lm: Any, tasks: dict[str, Any], file: AnswerFile, **options: Any) -> Any:
    """Scores with a single cache."""
    return answer({"only": lm}, tasks, {"only": file}, **options)["only"]


def note(lm: Any, asked: list[Any]) -> None:
    """Have ``lm`` write into ``asked`` whatever it is asked."""
    for kind in ("generate_until", "loglikelihood"):
        ask = getattr(lm, kind)
        setattr(lm, kind, lambda requests, ask=ask, **rest: asked.extend(requests) or ask(requests, **rest))


def expected(lm: Any, tasks: dict[str, Any]) -> dict[str, Any]:
    """What lm-eval itself makes of all documents: by task, document and metric."""
    samples = lm_eval.simple_evaluate(lm, tasks=list(tasks.values()), bootstrap_iters=0)["samples"]
    metrics = {"small_words": ("odd", "mean_byte"), "small_choices": ("acc",)}
    return {
        task: {sample["doc_id"]: {f"{metric},none": sample[metric] for metric in metrics[task]} for sample in logged}
        for task, logged in samples.items()
    }


def test_scores_are_those_of_lm_eval(
    folder: Path, model: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tasks = load_tasks(NAMES, str(folder))
    assert list(tasks) == NAMES and count(tasks, None) == dict.fromkeys(NAMES, DOCUMENTS)
    assert count(tasks, 3) == dict.fromkeys(NAMES, 3)
    done: list[str] = []
    file = AnswerFile(tmp_path, "int4", {})
    with silent():
        lm = wrap(KVQuantLM, model, policy="int4")
    scores = answer_one(lm, tasks, file, batch=BATCH, advance=done.append)
    assert capfd.readouterr() == ("", "")
    assert scores == expected(wrap(KVQuantLM, model, policy="int4"), tasks)
    assert done == ["only"] * 2 * DOCUMENTS
    first, *lines = [json.loads(line) for line in file.path.read_text(encoding="utf-8").splitlines()]
    assert first == {"settings": {}} and len(lines) == len(done)
    for line in lines:
        assert line["scores"] == scores[line["task"]][line["document"]]
        assert len(line["responses"]) == (CHOICES if line["task"] == "small_choices" else 1)
    assert [path.name for path in tmp_path.iterdir()] == ["int4.jsonl"]


@pytest.mark.parametrize(
    "written", [pytest.param(0, marks=pytest.mark.full), 3, pytest.param(DOCUMENTS, marks=pytest.mark.full), 9]
)
def test_an_interrupted_run_goes_on(folder: Path, model: Any, tmp_path: Path, written: int) -> None:
    tasks = load_tasks(NAMES, str(folder))
    done = 0

    def advance(name: str) -> None:
        nonlocal done
        done += 1
        if done > written:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_one(wrap(KVQuantLM, model), tasks, AnswerFile(tmp_path, "a", {"x": 1}), batch=BATCH, advance=advance)
    path = tmp_path / "a.jsonl"
    before = path.read_text(encoding="utf-8")
    path.write_text(before + '{"task": "small_wo', encoding="utf-8")  # as a process leaves it that is killed
    lm, asked, counted = wrap(KVQuantLM, model), [], 0
    note(lm, asked)

    def advance_on(name: str) -> None:
        nonlocal counted
        counted += 1

    scores = answer_one(lm, tasks, AnswerFile(tmp_path, "a", {"x": 1}), batch=BATCH, advance=advance_on)
    assert counted == 2 * DOCUMENTS
    there = before.count("\n") - 1
    assert there > written and len({(one.task_name, one.doc_id) for one in asked}) == 2 * DOCUMENTS - there
    whole = AnswerFile(tmp_path, "b", {"x": 1})
    assert (
        scores
        == answer_one(wrap(KVQuantLM, model), tasks, whole, batch=BATCH)
        == expected(wrap(KVQuantLM, model), tasks)
    )
    assert path.read_text(encoding="utf-8") == whole.path.read_text(encoding="utf-8")
    # Once more: everything is there, and the file stays as it is.
    stamp = path.stat().st_mtime_ns
    lm._model_generate = lm._model_call = None
    assert answer_one(lm, tasks, AnswerFile(tmp_path, "a", {"x": 1}), batch=BATCH) == scores
    assert path.stat().st_mtime_ns == stamp


def test_another_limit_goes_on(folder: Path, model: Any, tmp_path: Path) -> None:
    tasks = load_tasks(NAMES, str(folder))
    whole = answer_one(wrap(KVQuantLM, model), tasks, AnswerFile(tmp_path, "whole", {}), batch=BATCH)
    for limit, asked in ((2, 2), (5, 3), (3, 0), (None, DOCUMENTS - 5)):
        lm, asks = wrap(KVQuantLM, model), []
        note(lm, asks)
        scores = answer_one(lm, tasks, AnswerFile(tmp_path, "a", {}), batch=BATCH, limit=limit)
        assert scores == {task: dict(list(own.items())[:limit]) for task, own in whole.items()}
        assert len({(one.task_name, one.doc_id) for one in asks}) == len(NAMES) * asked
    kept = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    assert all(line["scores"] == whole[line["task"]][line["document"]] for line in kept)


def test_a_file_of_something_else_is_refused(folder: Path, model: Any, tmp_path: Path) -> None:
    tasks = load_tasks(["small_words"], str(folder), {"first": "One "})
    settings = {"dtype": "float32", "versions": {"lm_eval": "1"}}
    answer_one(wrap(KVQuantLM, model), tasks, AnswerFile(tmp_path, "a/b", settings), limit=1)
    assert (tmp_path / "a%2Fb.jsonl").is_file()
    AnswerFile(tmp_path, "a/b", settings)
    for other in ({"dtype": "bfloat16"}, {"versions": {"lm_eval": "2"}}, {"batch": 8}):
        name = next(iter(other))
        with pytest.raises(EvaluationInputError, match=f"a%2Fb.jsonl' was made with {name}=.*, not .*--out"):
            AnswerFile(tmp_path, "a/b", settings | other)
    with pytest.raises(EvaluationInputError, match=r'made with versions=\{"lm_eval": "1"\}, not null'):
        AnswerFile(tmp_path, "a/b", {"dtype": "float32"})
    # The same settings, and other documents behind the same name.
    tasks = load_tasks(["small_words"], str(folder), {"first": "Two "})
    with pytest.raises(EvaluationInputError, match="another document 0 of 'small_words'"):
        answer_one(wrap(KVQuantLM, model), tasks, AnswerFile(tmp_path, "a/b", settings), limit=1)
    for text in ("", "no JSON\n", "[]\n", '{"settings": {}}\n{"task": "x"}\n', "cut before the first end of a line"):
        (tmp_path / "c.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(EvaluationInputError, match="no file of answers"):
            AnswerFile(tmp_path, "c", {})
        assert (tmp_path / "c.jsonl").read_text(encoding="utf-8") == text


def test_no_such_task(folder: Path) -> None:
    with pytest.raises(EvaluationInputError, match=r"no task 'none', 'neither'; .*--include-path"):
        load_tasks(["none", "small_words", "neither"], str(folder))


_DRAWN = """\
task: drawn
custom_dataset: !function draw.documents
output_type: generate_until
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "x"
metric_list: [{metric: exact_match}]
"""
_DRAW = """
import random
import numpy
from datasets import Dataset, DatasetDict

def documents(**_):
    return DatasetDict({"test": Dataset.from_list([{"text": f"{random.random()} {numpy.random.rand()}"}])})
"""


def test_data_that_a_task_draws_are_the_same_in_every_run(tmp_path: Path) -> None:
    """As RULER's tasks do: a run could not go on with other data, nor be repeated."""
    write_tasks(tmp_path)
    (tmp_path / "drawn.yaml").write_text(_DRAWN, encoding="utf-8")
    (tmp_path / "draw.py").write_text(_DRAW, encoding="utf-8")
    alone = load_tasks(["drawn"], str(tmp_path))
    after = load_tasks(["small_words", "drawn"], str(tmp_path))
    assert list(alone["drawn"].eval_docs) == list(after["drawn"].eval_docs)


def test_tasks_of_ones_own_need_no_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own are read for what is not in the folder, and never again to ask a model."""
    read = []

    def manager(**options: Any) -> TaskManager:
        read.append(options.pop("include_defaults", True))
        return TaskManager(**options, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    assert list(load_tasks(NAMES, str(folder))) == NAMES and read == [False]
    with pytest.raises(EvaluationInputError, match="'hellaswag'"):
        load_tasks([NAMES[0], "hellaswag"], str(folder))
    assert read == [False, False, True]


def test_a_task_that_scores_no_single_document(model: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" = One = \n \n words and words \n", encoding="utf-8")
    root = Path(__file__).resolve().parents[2]
    tasks = load_tasks(["local_wikitext2"], str(root / "benchmarks/lm_eval"), {"wikitext2": str(text)})
    with pytest.raises(EvaluationInputError, match="'local_wikitext2' has no number for a single document"):
        answer_one(wrap(KVQuantLM, model), tasks, AnswerFile(tmp_path, "int4", {}))


def test_the_dynamic_cache_is_hf(folder: Path, model: Any, tmp_path: Path) -> None:
    tasks = load_tasks(NAMES, str(folder))
    hf = expected(wrap(HFLM, model), tasks)
    for prefill in ("exact", "quantized"):
        lm = wrap(BaselineLM, model, baseline="dynamic", prefill=prefill)
        assert answer_one(lm, tasks, AnswerFile(tmp_path, prefill, {}), batch=BATCH) == hf
    assert stored_bits(model, "dynamic") == 32
    assert stored_bits(tiny_llama().to(torch.bfloat16), "dynamic") == 16


def _lms(model: Any) -> dict[str, Any]:
    policies = ("exact", "kv3", "int4-token")
    lms = {name: wrap(KVQuantLM, model, policy=name) for name in policies}
    return lms | {"dynamic": wrap(BaselineLM, model, baseline="dynamic")}


def test_a_prompt_is_read_once_for_all_caches(folder: Path, model: Any, tmp_path: Path) -> None:
    tasks = load_tasks(NAMES, str(folder))
    apart = {name: expected(lm, tasks) for name, lm in _lms(model).items()}
    assert apart["kv3"]["small_words"] != apart["exact"]["small_words"]  # rounding is seen in the answers
    done: list[str] = []
    files = {name: AnswerFile(tmp_path, name, {}) for name in apart}
    lms = _lms(model)
    assert answer(lms, tasks, files, batch=BATCH, advance=done.append) == apart
    assert Counter(done) == dict.fromkeys(apart, 2 * DOCUMENTS)
    prompts = lms["exact"].prompts
    blocks = -(-DOCUMENTS // BATCH)
    assert (prompts.read, prompts.taken) == (blocks, (len(apart) - 1) * blocks)
    assert "forward" not in vars(model)
    # One file is lost: the others are not asked again, and this one's prompts are read anew.
    files["kv3"].path.unlink()
    files = {name: AnswerFile(tmp_path, name, {}) for name in apart}
    lms = _lms(model)
    assert answer(lms, tasks, files, batch=BATCH) == apart
    assert (lms["kv3"].prompts.read, lms["kv3"].prompts.taken) == (blocks, 0)


def test_a_block_of_several_batches_is_read_once_too(folder: Path, model: Any, tmp_path: Path) -> None:
    """As where tasks of one block generate with other options, or the model takes fewer prompts at a time."""
    tasks = load_tasks(["small_words"], str(folder))
    lms = _lms(model)
    for lm in lms.values():
        lm.batch_size_per_gpu = 1
    files = {name: AnswerFile(tmp_path, name, {}) for name in lms}
    kept: list[int] = []
    answer(lms, tasks, files, batch=BATCH, advance=lambda name: kept.append(len(lms[name].prompts._kept)))
    prompts = lms["exact"].prompts
    assert (prompts.read, prompts.taken) == (DOCUMENTS, (len(lms) - 1) * DOCUMENTS)
    assert max(kept) == BATCH and not prompts._kept  # a block at a time


@pytest.mark.parametrize(
    "make",
    [tiny_llama, tiny_gemma2, partial(tiny_hybrid, "gemma4"), partial(tiny_hybrid, "deepseek-v3")],
    ids=["llama", "windows", "shared keys", "latents"],
)
def test_what_a_cache_holds_of_a_shared_prompt(make: Any) -> None:
    model = make()
    inputs = ragged_prompts((70, 41))
    held = []
    for shared in (SharedPrompts(), None):
        caches = [QuantizedPagedCache(model.config, "kv3", page_size=16) for _ in range(2)]
        for cache in caches:
            with shared.of(model) if shared else nullcontext():
                model.generate(**inputs, **with_cache(cache), max_new_tokens=30, do_sample=False)
            assert model.config.model_type == "deepseek_v3" or all(store.seen.rounded for store in cache.stores)
        assert shared is None or (shared.read, shared.taken) == (1, 1)
        held += caches
    for stores in zip(*(cache.stores for cache in held), strict=True):
        assert all(same_bytes(stores[0], store) for store in stores[1:])


def test_prompts_that_leave_more_than_keys_and_values_are_read_by_every_cache() -> None:
    model = tiny_hybrid("qwen3-next")
    shared = SharedPrompts()
    with shared.of(model):
        assert "forward" not in vars(model)
    model = tiny_llama()
    other = prompt(1, 40)
    expected = model.generate(other, max_new_tokens=4, do_sample=False)
    with shared.of(model):
        for ids in (prompt(1, 40, seed=1), other, other[:, :-1]):
            found = model.generate(ids, max_new_tokens=4, do_sample=False)
            assert torch.equal(found, expected) == (ids is other)
    assert (shared.read, shared.taken) == (3, 0)


class RoundingLayer(cache_utils.QuantizedLayer):
    """One scale per token, codes in int8 whatever ``nbits`` is."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
        scale = tensor.abs().amax(-1, keepdim=True) / (2 ** (self.nbits - 1) - 1)
        return (tensor / scale).round().to(torch.int8), {"scale": scale, "axis": axis}

    def _dequantize(self, quantized: Any) -> torch.Tensor:
        codes, meta = quantized
        return codes * meta["scale"]


def test_a_quantized_cache_of_transformers(
    folder: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EvaluationInputError, match="use quanto-2"):
        wrap(BaselineLM, model, baseline="int4")
    monkeypatch.setattr(baselines, "_installed", lambda module: False)
    with pytest.raises(MissingPackageError, match="pip install hqq,"):
        wrap(BaselineLM, model, baseline="hqq-2")
    monkeypatch.setattr(cache_utils, "HQQQuantizedLayer", RoundingLayer)
    monkeypatch.setattr(baselines, "_installed", lambda module: module == "hqq")
    tasks = load_tasks(NAMES, str(folder))
    scores = {}
    for name in ("dynamic", "hqq-2"):
        lm = wrap(BaselineLM, model, baseline=name)
        scores[name] = answer_one(lm, tasks, AnswerFile(tmp_path, name, {}), batch=BATCH)
    assert scores["hqq-2"]["small_words"] != scores["dynamic"]["small_words"]
    # A byte for each element and a float32 for 32 of them.
    assert stored_bits(model, "hqq-2") == 8 + 32 / 32


def test_a_task_whose_package_is_missing(tmp_path: Path) -> None:
    code = write_tasks(tmp_path) / "small.py"
    code.write_text(f"import no_such_package\n{code.read_text(encoding='utf-8')}", encoding="utf-8")
    with pytest.raises(MissingPackageError, match=r"small_words need a package .*no_such_package"):
        load_tasks(["small_words"], str(tmp_path))


def test_lengths_that_no_document_has_are_no_measure() -> None:
    """RULER's tasks score each document at its own length, and -1 at every other."""
    scores = {
        name: {"niah": {0: {"2048,none": score, "4096,none": -1.0}}} for name, score in (("exact", 1.0), ("a", -1.0))
    }
    assert [measure.metric for measure in tabulate(scores)] == ["2048"]


def test_pairs() -> None:
    def of(*solved: int, metric: str = "acc,none") -> dict[str, Any]:
        return {"task": {number: {metric: float(value)} for number, value in enumerate(solved)}}

    (measure,) = tabulate({"exact": of(1, 1, 0), "int4": of(0, 1, 0), "int8": of(1, 1, 1)})
    assert measure[:4] == ("task", "acc", "none", True)
    assert measure.rows["exact"] == (Mean(3, 2 / 3, pytest.approx(1 / 3)), None)
    third = pytest.approx(1 / 3)
    assert measure.rows["int4"].paired == Paired(pytest.approx(-1 / 3), third, 1, 0, 1.0)
    assert measure.rows["int8"].paired == Paired(third, third, 0, 1, 1.0)
    # A metric of which one cache alone has scores between 0 and 1 is compared by means, for all of them.
    (measure,) = tabulate(
        {"exact": of(1, 0, metric="f1"), "int4": of(0.5, 0, metric="f1"), "int8": of(1, 0, metric="f1")}
    )
    assert (measure.metric, measure.filter, measure.binary) == ("f1", "", False)
    assert measure.rows["int4"].paired == Paired(-0.25, 0.25, None, None, None)
    assert measure.rows["int8"].paired == Paired(0, 0, None, None, None)
