"""``kvquant chat``: the chat itself, in a pipe and in a pseudo terminal, and how it ends."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from cli.clients.asking import KEY, answer
from command import Run, is_one_sentence

from kvquant_hf.clients import server as server_module
from kvquant_hf.clients.server import started

COMMAND = [sys.executable, "-c", "from kvquant_hf.cli import main; main()", "chat"]
GREEDY = ("--temperature", "0", "--max-new-tokens", "20")
WIDE = {**os.environ, "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}


def say(*lines: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A chat whose stdin is a pipe that ends."""
    text = "".join(line + "\n" for line in lines)
    return subprocess.run([*COMMAND, *arguments], input=text, env=WIDE, capture_output=True, text=True, timeout=120)


def test_two_turns(served: Any) -> None:
    """The answer to the second question has seen the first; "n" declines to go on where the length ended it."""
    done = say(
        "hello", "n", "and you?", "n", arguments=[served.url, "--api-key", KEY, "--system", "Be brief.", *GREEDY]
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    first = answer(served, "hello", tokens=20, system="Be brief.")
    second = answer(served, "hello", first, "and you?", tokens=20, system="Be brief.")
    assert re.fullmatch("[a-z]{20}", first) and first != second
    assert first in done.stdout and second in done.stdout.partition(first)[2]
    assert "KV cache in int4" in done.stdout


class Terminal:
    """A chat in a pseudo terminal."""

    def __init__(self, process: subprocess.Popen[bytes], end: int) -> None:
        self.process, self._end, self.seen = process, end, ""
        self.place = 0  # behind what was waited for

    def until(self, pattern: str, seconds: float = 60) -> None:
        """Read until ``pattern`` was shown after what was waited for before: several may come at once."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen[self.place :])):
            assert time.monotonic() < deadline, f"{pattern!r} was not shown:\n{self.seen}"
            if select.select([self._end], [], [], 0.2)[0]:
                self.seen += os.read(self._end, 4096).decode(errors="replace")
        self.place += match.end()

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def interrupted(self) -> int:
        """The exit code after Ctrl-C, again as one would press it: a signal between Python's last look for one and
        readline's wait for a key is only seen with the next key."""
        for _ in range(10):
            self.type("\x03")
            try:
                return self.process.wait(8)
            except subprocess.TimeoutExpired:
                continue
        raise AssertionError("Ctrl-C does not end it")


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    """A chat whose controlling terminal is ours, so that Ctrl-C typed there is a signal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=WIDE,
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_ctrl_c_in_the_middle_of_an_answer(served: Any) -> None:
    with terminal(served.url, "--api-key", KEY, "--temperature", "0", "--max-new-tokens", "3000") as chat:
        chat.until(r">:\s*$")
        chat.type("hello\n")
        chat.until("[a-z]{40}")
        assert chat.interrupted() == 0
        assert "Traceback" not in chat.seen
    deadline = time.monotonic() + 20
    while served.report()["requests"]["running"]:
        assert time.monotonic() < deadline, "the server goes on with an answer that nobody reads"
        time.sleep(0.05)


# -- a server of its own -----------------------------------------------------------------------------------------------


def is_gone(url: str) -> bool:
    try:
        httpx.get(f"{url}/health")
    except httpx.ConnectError:
        return True
    return False


def test_it_starts_a_server_and_ends_it(lettered: Path, served: Any) -> None:
    """With Ctrl-C where a question could be typed."""
    with terminal(str(lettered), "--policy", "int8", "--kv-budget", "20MB", *GREEDY) as chat:
        chat.until(r"with int8 at http://\S+\s")
        url = re.search(r"with int8 at (http://\S+)", chat.seen)[1]
        chat.until(r"KV cache in int8(.|\n)*>:\s*$")
        assert not is_gone(url)
        chat.type("hello\n")
        chat.until("[a-z]{20}")
        chat.until(r"y/N\): ")
        chat.type("n\n")
        chat.until(r">:\s*$")
        assert chat.interrupted() == 0
        assert "Traceback" not in chat.seen
        assert is_gone(url)


def instead(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have clients start ``program`` instead of a server."""
    monkeypatch.setattr(server_module, "_COMMAND", (sys.executable, "-c", f"import os, sys, time; {program}"))


def test_a_server_that_does_not_start(run: Run, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    instead("print('kvquant: no folder.', file=sys.stderr); sys.exit(2)", monkeypatch)
    code, _, err = run("chat", "/no/such/folder")
    assert code == 1
    assert err.startswith("kvquant: no folder.\n")
    assert is_one_sentence(err.partition("\n")[2]) and "exit code 2 before it answered" in err


def test_sigterm_ends_the_server_too(served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the server, which has the key where no one else reads it."""
    ready = f"serving it with int4 at {served.url}"
    pid = tmp_path / "pid"
    instead(
        f"assert os.environ['KVQUANT_API_KEY'] == {KEY!r} and {KEY!r} not in sys.argv; "
        f"open({str(pid)!r}, 'w').write(str(os.getpid())); sys.exit(print({ready!r}, file=sys.stderr, flush=True) "
        "or time.sleep(600))",
        monkeypatch,
    )
    with pytest.raises(SystemExit) as ended, started([], KEY) as server:
        assert server == served
        os.kill(int(pid.read_text()), 0)  # it is there
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_no_server_there(run: Run, served: Any) -> None:
    code, _, err = run("chat", "http://127.0.0.1:9")
    assert code == 1
    assert is_one_sentence(err) and "start one with kvquant serve" in err


def test_the_wrong_key(run: Run, served: Any) -> None:
    for key in ((), ("--api-key", "another")):
        code, _, err = run("chat", served.url, *key)
        assert code == 1
        assert is_one_sentence(err) and "--api-key" in err


def test_options_of_a_server_for_one_that_runs(run: Run, served: Any) -> None:
    code, _, err = run("chat", served.url, "--policy", "int8", "--api-key", KEY)
    assert code == 2
    assert is_one_sentence(err) and "--policy" in err


@pytest.mark.parametrize("command", ["chat", "web"])
def test_without_the_extra(command: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = run(command)
    assert code == 1
    assert is_one_sentence(err) and "pip install 'kvquant-hf[" in err
