"""Servers to measure: processes that are started, found and stopped again."""

import collections
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx

from ...errors import BenchmarkError, BenchmarkInputError
from .client import Target

STOCK = "stock"
_KVQUANT = "from kvquant_hf.cli import main; main()"
_ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")  # both servers print it once they take requests
_LINES = 20  # of a server's last words
_SECONDS_TO_STOP = 10


class Launch(NamedTuple):
    """A server to start: what tables call it, its command line, and its model's name ("": it is asked for)."""

    name: str
    command: tuple[str, ...]
    model: str = ""


def stock_server(place: str, *, dtype: str, blocks: int, page_size: int, max_batch_tokens: int) -> Launch:
    """transformers' own server with continuous batching, of a model at ``place``: a folder or a name on the hub."""
    module = ("-m", "transformers.cli.transformers", "serve", place, "--dtype", dtype, "--continuous-batching")
    sizes = ("--cb-num-blocks", blocks, "--cb-block-size", page_size, "--cb-max-batch-tokens", max_batch_tokens)
    return Launch(STOCK, _command(*module, *sizes), place)  # before 5.24 it does not list a folder that it serves


def our_server(
    place: str, policy: str, *, dtype: str, budget: int, max_batch_tokens: int, max_concurrent: int, queue: int
) -> Launch:
    """``kvquant serve`` with a policy, of the same model; ``budget`` in bytes, and ``queue`` requests may wait."""
    module = ("-c", _KVQUANT, "serve", place, "--dtype", dtype, "--policy", policy)
    sizes = ("--kv-budget", f"{budget / 1e3:.3f}kB", "--max-batch-tokens", max_batch_tokens)
    return Launch(policy, _command(*module, *sizes, "--max-concurrent", max_concurrent, "--queue", queue))


def _command(*words: object) -> tuple[str, ...]:
    return (sys.executable, *map(str, words), "--host", "127.0.0.1", "--port", "0")


@contextmanager
def started(launch: Launch, timeout: float) -> Iterator[Target]:
    """Start a server, wait until it takes requests, and stop it at the end.

    Args:
        launch: what to start.
        timeout: seconds that it may take to load its model.

    Raises:
        BenchmarkError: it ended before, or took longer.
    """
    # A session of its own: Ctrl-C is for us, and a server that is stopped by it would fail its requests.
    process = subprocess.Popen(
        launch.command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    words = _LastWords(process)
    try:
        decided = words.decided.wait(timeout)
        if words.url is None:
            waited = "ended at once" if decided else f"did not take requests within {timeout:.0f} s"
            raise BenchmarkError(
                f"the server {launch.name!r} {waited} ({words.last()}); run it by itself to see why: "
                f"{' '.join(launch.command)}"
            )
        yield Target(launch.name, words.url, launch.model) if launch.model else target_at(launch.name, words.url)
    finally:
        process.terminate()
        try:
            process.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        words.join()


class _LastWords:
    """Reads what a process prints, so that it never waits for a reader; keeps its address and the end of it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lines: collections.deque[str] = collections.deque(maxlen=_LINES)
        self.url: str | None = None
        self.decided = threading.Event()  # there is an address, or there will be none
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line.strip())
            found = None if self.url else _ADDRESS.search(line)
            if found:
                self.url = found.group()
                self.decided.set()
        self._process.stdout.close()
        self.decided.set()

    def last(self) -> str:
        """The last line that says something."""
        return next((line for line in reversed(self._lines) if line), "it said nothing")

    def join(self) -> None:
        """Wait until all was read; the process has ended."""
        self._thread.join()


def target_at(name: str, url: str) -> Target:
    """A running server, its model asked for.

    Raises:
        BenchmarkInputError: nobody answers there, or not as a server of this kind does.
    """
    try:
        models = httpx.get(f"{url}/v1/models", timeout=60, trust_env=False).raise_for_status().json()
        return Target(name, url, str(models["data"][0]["id"]))
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise BenchmarkInputError(
            f"{url!r} does not name its model at /v1/models ({type(error).__name__}); give the address of a running "
            f"server, as in --url {name}=http://127.0.0.1:8000."
        ) from error


def report_of(target: Target) -> dict[str, Any]:
    """What our server says of itself; {} of another kind, and of one that has gone, whose requests have failed."""
    try:
        response = httpx.get(f"{target.url}/kvquant/report", timeout=60, trust_env=False)
        return dict(response.json()) if response.status_code == httpx.codes.OK else {}
    except httpx.HTTPError:
        return {}
