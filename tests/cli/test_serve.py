"""``kvquant serve`` as a process: it says where it listens, answers, ends, and starts again; and what it refuses."""

import builtins
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from command import Run, is_one_sentence

from kvquant_hf.batching.hooks import unsupported
from kvquant_hf.cli.serve import budget_of, policy_of
from kvquant_hf.errors import UnknownPolicyError

pytestmark = pytest.mark.skipif(bool(unsupported()), reason="this transformers is too old for a server")
PROMPT = {"prompt": "hello", "max_tokens": 4, "temperature": 0}


@contextmanager
def process(*args: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on a free port, and its address; killed at the end."""
    command = [sys.executable, "-c", "from kvquant_hf.cli import main; main()", "serve", *args, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        try:
            said = []
            for line in running.stderr:
                said.append(line)
                if line.startswith("serving "):
                    break
            else:
                raise AssertionError("".join(said))
            yield running, said[-1].split()[-1]
        finally:
            running.kill()


@pytest.mark.slow
def test_killed_and_started_again_it_serves(tiny: Path) -> None:
    def ask(url: str) -> str:
        answer = httpx.post(f"{url}/v1/completions", json=PROMPT, timeout=60)
        answer.raise_for_status()
        return answer.json()["choices"][0]["text"]

    options = (str(tiny), "--policy", "4", "--kv-budget", "2MB", "--name", "small")
    with process(*options) as (first, url):
        text = ask(url)
        assert httpx.get(f"{url}/kvquant/report").json()["policy"] == "int4-token", "LMDeploy's number is a policy"
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "small"
        first.kill()
        assert first.wait(30) == -signal.SIGKILL
    with process(*options) as (second, url):
        assert ask(url) == text
        second.send_signal(signal.SIGINT)
        assert second.wait(30) == 0
        assert second.stderr is not None and second.stderr.read() == "stopped.\n"


def test_a_port_that_is_taken(run: Run, tiny: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        outcome = run("serve", str(tiny), "--port", str(taken.getsockname()[1]))
    assert outcome.code == 2 and is_one_sentence(outcome.err)
    assert "choose another --port" in outcome.err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--kv-budget", "much"], "'much' is no size"),
        (["--kv-budget", "1.5"], "a share between 0 and 1"),
        (["--policy", "int5"], "int5"),
        (["--log-level", "loud"], "unknown log level 'loud'"),
        (["--host", "192.0.2.1"], "cannot listen at 192.0.2.1"),
        (["--page-size", "7"], "multiple of 8"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(run: Run, tiny: Path, args: list[str], said: str) -> None:
    outcome = run("serve", str(tiny), "--port", "0", *args)
    assert outcome.code == 2 and is_one_sentence(outcome.err) and said in outcome.err


def test_a_budget_without_room_is_said(run: Run, tiny: Path) -> None:
    outcome = run("serve", str(tiny), "--port", "0", "--kv-budget", "10KB")
    assert outcome.code == 1
    assert "have no room for a block" in outcome.err.splitlines()[-1]


def test_without_the_packages_of_a_server(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "uvicorn":
            raise ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    outcome = run("serve", str(tiny))
    assert outcome.code == 1 and is_one_sentence(outcome.err)
    assert "the package uvicorn; run: pip install 'kvquant-hf[serve]'" in outcome.err


def test_budgets() -> None:
    assert [policy_of(*words) for words in (("int4",), ("8",), ("auto:3.5",))] == ["int4", 8, "auto:3.5"]
    assert policy_of("auto", 3.5) == "auto:3.5"
    with pytest.raises(UnknownPolicyError, match="leave bits out"):
        policy_of("int4", 3.5)
    assert [budget_of(text) for text in ("500MB", "0.3", "30%", "1.5GB")] == [500_000_000, 0.3, 0.3, 1_500_000_000]


def test_the_key_can_come_from_the_environment(run: Run) -> None:
    help_text = run("serve", "--help").out
    assert "KVQUANT_API_KEY" in help_text and os.environ.get("KVQUANT_API_KEY") is None
