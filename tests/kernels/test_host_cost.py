"""What the host does in a decode step, on a GPU that is not there (``pretended.py``): it compiles nothing, and little
else.  Calls of Python functions are counted instead of time, which would depend on the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

POLICIES = ("int4", "lloyd4-centred/lloyd2")  # the second has rotated queries: one launch more


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))
    script = Path(__file__).with_name("pretended.py")
    done = subprocess.run([sys.executable, script, *POLICIES], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_growing_contexts_compile_nothing(policy: str, found: dict[str, Any]) -> None:
    """Three contexts at three alignments, masks included: what the first compiled serves all, in both caches."""
    first = found[policy]["static"][0]
    assert found[policy]["static"] == found[policy]["growing"] == [first] * 3


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_calls_few_functions(policy: str, found: dict[str, Any]) -> None:
    """With int4 87 in a static cache and 119 in one that grows; before launches were planned it was 283 and 295."""
    calls = found[policy]["calls"]
    assert calls["static"] <= 110 and calls["growing"] <= 140
