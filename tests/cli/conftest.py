"""A command line in this process, and a model for it."""

from pathlib import Path

import pytest
from command import Outcome, Run, save_tiny_model

from kvquant_hf.cli import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in this process."""
    monkeypatch.delenv("KVQUANT_DEBUG", raising=False)

    def run(*args: str) -> Outcome:
        with pytest.raises(SystemExit) as exit_:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Outcome(exit_.value.code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers and a tokenizer whose tokens are bytes."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"))
