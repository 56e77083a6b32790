"""The documentation against the code: the policy table, the snippets, the commands."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command import byte_tokenizer, save_tiny_model
from models import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from kvquant_hf.batching.hooks import unsupported
from kvquant_hf.cli.policies import markdown_table
from kvquant_hf.errors import KVQuantError
from kvquant_hf.transformers_api.names import CACHE_ARGUMENT

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


class Tokenizer:
    """Answers the README's calls: 77 tokens, and one more for each letter that its longer text adds."""

    def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        ids = torch.arange(3, 80 + len(text.removeprefix("The KV cache is"))).unsqueeze(0)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_policy_table_is_what_the_command_prints() -> None:
    table = markdown_table()
    assert table in README, f"the README's table is out of date; it should be\n{table}"


def test_snippets_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """In the order of the README and in one namespace, with a tiny random model instead of the hub's."""
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
        kvquant_hf.enable()  # the last line of the README's tour disables it
    assert namespace["cache"].get_seq_length() == 77 + len(" a kind of") + 99  # the one that was loaded
    assert unsupported() or all(len(result.generated_tokens) == 100 for result in namespace["results"].values())
    assert [len(answers) for answers in namespace["answers"]] == [1, 1]
    assert re.search(
        r"policy +int4, pages of 64 tokens, the first one exact\ntokens +176 x batch 1", capsys.readouterr().out
    )


def test_make_targets_and_files_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    assert targets == {"demo", "test"}
    assert all(re.search(rf"^{target}\b.*:", makefile, re.MULTILINE) for target in targets)
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_every_error_has_a_docstring() -> None:
    """They are the reference of what can go wrong."""
    classes = [KVQuantError, *KVQuantError.__subclasses__()]
    assert len(classes) > 5 and all(cls.__doc__ for cls in classes)
