"""A server that plays the API of ``kvquant serve`` with known delays; as a script it prints its address and stays."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Played:
    """How it answers, and what it saw.  Times are ``time.perf_counter``'s.

    Args:
        first, gap: seconds before the first token, and before each further one.
        silent: every so many tokens, one has no text; 0: none.
        missing: tokens that an answer lacks.
        text: of each token; ``texts``: of the answers to some prompts.
        statuses: for the first requests, the status with which they are refused.
        error: sent instead of the last token.
        report: at /kvquant/report; None: there is none.
    """

    first: float = 0.0
    gap: float = 0.0
    silent: int = 0
    missing: int = 0
    text: str = "a "
    texts: dict[str, str] = field(default_factory=dict)
    statuses: list[int] = field(default_factory=list)
    error: str = ""
    report: dict[str, Any] | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    spans: dict[str, tuple[float, float, float]] = field(default_factory=dict)  # prompt: came, first token, end
    running: int = 0
    most_running: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def handler(played: Played) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, status: int, data: dict[str, Any]) -> None:
            body = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self.reply(200, {"data": [{"id": "fake"}]})
            elif self.path == "/kvquant/report" and played.report is not None:
                self.reply(200, played.report)
            else:
                self.reply(404, {"detail": "Not Found"})

        def do_POST(self) -> None:
            came = time.perf_counter()
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with played.lock:
                played.bodies.append(body)
                status = played.statuses.pop(0) if played.statuses else 200
                played.running += status == 200
                played.most_running = max(played.most_running, played.running)
            if status != 200:
                self.reply(status, {"error": {"message": "the queue is full"}})
                return
            try:
                self.stream(body, came)
            finally:
                with played.lock:
                    played.running -= 1

        def stream(self, body: dict[str, Any], came: float) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            tokens = json.loads(body["generation_config"])["max_new_tokens"] - played.missing
            text = played.texts.get(body["prompt"], played.text)
            first = 0.0
            for i in range(tokens):
                time.sleep(played.gap if i else played.first)
                first = first or time.perf_counter()
                if not played.silent or (i + 1) % played.silent:
                    self.event({"choices": [{"text": text}]})
            if played.error:
                self.event({"error": played.error})
            else:
                usage = {"prompt_tokens": len(body["prompt"].encode()), "completion_tokens": tokens}
                self.event({"choices": [{"text": "", "finish_reason": "length"}], "usage": usage})
                played.spans[body["prompt"]] = came, first, time.perf_counter()
            self.chunk(b"data: [DONE]\n\n")
            self.chunk(b"")

        def event(self, data: dict[str, Any]) -> None:
            self.chunk(f"data: {json.dumps(data)}\n\n".encode())

        def chunk(self, data: bytes) -> None:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

    return Handler


@contextmanager
def playing(played: Played) -> Iterator[str]:
    """Its address while it runs in a thread of this process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(played))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


if __name__ == "__main__":
    with playing(Played(**json.loads(sys.argv[1]))) as address:
        print(f"serving fake at {address}", file=sys.stderr, flush=True)
        threading.Event().wait()
