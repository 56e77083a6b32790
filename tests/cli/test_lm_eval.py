"""``kvquant lm-eval`` and ``kvquant compare`` without lm-eval; tests/evaluation has them with lm-eval."""

import importlib.util

import pytest
from command import Run, is_one_sentence


@pytest.mark.parametrize(
    "args",
    [
        ("lm-eval", "--help"),
        ("lm-eval", "--model", "kvquant", "--tasks", "local_gsm8k"),
        ("lm-eval",),
        ("compare", "--tasks", "local_gsm8k", "--out", "results"),
    ],
    ids=" ".join,
)
def test_lm_eval_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find_spec(name, *rest)
    )
    code, out, err = run(*args)
    assert (code, out) == (1, "")
    assert is_one_sentence(err) and "pip install 'kvquant-hf[lm-eval]'" in err
