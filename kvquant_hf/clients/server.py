"""The server behind a client: one that runs already, or a process of its own that ends with the client."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

import httpx

from ..errors import NoServerError

_READY = re.compile(r"^serving .+ with .+ at (http://\S+)$")
_COMMAND = (sys.executable, "-c", "from kvquant_hf.cli import main; main()", "serve")
_PATIENCE = 10.0  # seconds for a short answer, and for a server to end


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Args:
        url: where, without ``/v1``.
        model: what requests call the model.
        api_key: what requests bear, or None.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)

    @property
    def api(self) -> str:
        """Where OpenAI's protocol is spoken."""
        return f"{self.url}/v1"

    def report(self) -> dict[str, Any]:
        """What the server says of itself at ``/kvquant/report``.

        Raises:
            NoServerError: it does not answer, or not as a server of kvquant.
        """
        return _get(f"{self.url}/kvquant/report", self.api_key)


def find(url: str, api_key: str | None = None) -> Server:
    """The server at a URL, and the model that it serves.

    Args:
        url: ``http://host:port``, with or without ``/v1``.
        api_key: what requests bear, or None.

    Raises:
        NoServerError: no server answers there, or it wants another key, or serves no model.
    """
    url = url.rstrip("/").removesuffix("/v1").rstrip("/")
    models = _get(f"{url}/v1/models", api_key).get("data")
    if not models:
        raise NoServerError(f"the server at {url} serves no model; start one with kvquant serve.")
    return Server(url, models[0]["id"], api_key)


def _get(url: str, api_key: str | None) -> dict[str, Any]:
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        answer = httpx.get(url, headers=headers, timeout=_PATIENCE)
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise NoServerError(f"the server wants another key for {url}; give it with --api-key.")
        answer.raise_for_status()
        found = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        if isinstance(error, NoServerError):
            raise
        reason = str(error).partition("\n")[0].rstrip(".")
        raise NoServerError(
            f"no server of kvquant answers at {url} ({reason}); start one with kvquant serve."
        ) from error
    if not isinstance(found, dict):
        raise NoServerError(f"what answers at {url} is no server of kvquant; start one with kvquant serve.")
    return found


@contextmanager
def started(arguments: Sequence[str], api_key: str | None = None) -> Iterator[Server]:
    """A server of its own, at a free port of this machine; it ends with the block, or with this process's SIGTERM.

    Args:
        arguments: of ``kvquant serve``, without ``--port`` and ``--api-key``.
        api_key: what requests will bear, or None.

    Raises:
        NoServerError: it ended before it answered; what it had to say is on stderr.
    """
    key = {} if api_key is None else {"KVQUANT_API_KEY": api_key}  # no one else reads it there, as in a command line
    # A session of its own: Ctrl-C is for the client, which then ends the server.
    process = subprocess.Popen(
        [*_COMMAND, *arguments, "--port", "0"],
        env=os.environ | key,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        url = _await_ready(process)
        threading.Thread(target=_pass_on, args=(process.stderr,), daemon=True).start()
        yield find(url, api_key)
    finally:
        signal.signal(signal.SIGTERM, before)
        _end(process)


def _await_ready(process: subprocess.Popen[str]) -> str:
    """Where a server that was just started answers; what it says is passed on."""
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", file=sys.stderr, flush=True)
        if match := _READY.match(line.strip()):
            return match[1]
    process.stderr.close()
    code = process.wait()
    raise NoServerError(f"the server ended with exit code {code} before it answered; its own words are above.")


def _pass_on(words: IO[str]) -> None:
    """Warnings of the server are for whoever started the client."""
    with words:
        for line in words:
            print(line, end="", file=sys.stderr, flush=True)


def _end(process: subprocess.Popen[str]) -> None:
    """End the server; a second Ctrl-C does not leave it behind."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
