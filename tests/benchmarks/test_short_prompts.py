"""What is printed of short prompts, with a tiny model and a clock that counts its readings."""

import itertools
from types import SimpleNamespace

import pytest
import short_prompts
from models import tiny_llama


def test_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama()
    monkeypatch.setattr(short_prompts, "load_model", lambda *args, **options: SimpleNamespace(model=model))
    monkeypatch.setattr(short_prompts.torch, "randint", lambda *args, **options: short_prompts.torch.ones(1, 8).long())
    readings = itertools.count()
    short_prompts.compare("float32", ["int4"], 8, 60, 2, lambda: next(readings))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if "tokens/s" in line] == ["DynamicCache", "int4"]
    assert all("1.000 x DynamicCache (1.000 to 1.000)" in line for line in lines if "tokens/s" in line)
    assert sum("the step that stores it" in line and "+0.00 ms" in line for line in lines) == 2


@pytest.mark.parametrize(
    ("prompt", "new", "steps"), [(8, 64, [0, 1, 57, 58, 64]), (8, 20, [0, 1, 20]), (64, 3, [0, 1, 2, 3])]
)
def test_phases_are_all_steps(prompt: int, new: int, steps: list[int]) -> None:
    parts = short_prompts.phases(prompt, new)
    assert [first for _, first, _ in parts] + [new] == steps
    assert [last for _, _, last in parts] == steps[1:]
