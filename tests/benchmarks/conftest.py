"""``benchmarks/gpu`` is a package of scripts that nobody installs; its tests import it as ``gpu``."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture(autouse=True)
def _a_command_begins_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is that of a process, which is over for one that has run tests for minutes."""
    if "gpu.command" in sys.modules:
        monkeypatch.setattr("gpu.command.STARTED", time.monotonic())
