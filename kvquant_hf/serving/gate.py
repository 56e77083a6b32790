"""What stands before the application: who may ask, how many at once, and what happens when a client goes away."""

import asyncio
import hmac
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .ledger import Entry, Ledger

_log = logging.getLogger("kvquant_hf")

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[MutableMapping[str, Any], _Receive, _Send], Awaitable[None]]

GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_ENDED = GENERATING[:2]  # whose streams end with a word, which transformers leaves out and some clients wait for
_DONE = b"data: [DONE]\n\n"
OPEN = ("/health",)  # what asks whether the server lives has no key
MOST_BYTES = 16 * 2**20  # of a body
_ID = b"x-request-id"


class Gate:
    """The outermost application (ASGI).

    A request that generates gets an entry in the ledger, or 429 where there is no room.  While it runs its connection
    is watched: when the client has gone the request ends, streamed or not, and its pages are free.

    Args:
        app: what answers.
        ledger: of the requests that generate.
        release: called with the name of a request whose connection is over.
        api_key: what requests must bear, or None.
    """

    def __init__(self, app: _App, ledger: Ledger, release: Callable[[str], object], api_key: str | None = None) -> None:
        self.app, self.ledger, self.release = app, ledger, release
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        preflight = scope["method"] == "OPTIONS"  # browsers ask without a key whether they may ask
        if self._key is not None and scope["path"] not in OPEN and not preflight and not self._bears_key(scope):
            headers = [(b"www-authenticate", b"Bearer")]
            await _refuse(send, 401, "the API key is missing or wrong; send it as: Authorization: Bearer KEY.", headers)
        elif scope["method"] == "POST" and scope["path"] in GENERATING:
            await self._generate(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _bears_key(self, scope: MutableMapping[str, Any]) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, b"Bearer " + (self._key or b""))

    async def _generate(self, scope: MutableMapping[str, Any], receive: _Receive, send: _Send) -> None:
        name = next((value.decode("latin-1") for key, value in scope["headers"] if key == _ID), "")
        if not name or name in self.ledger.live:  # two requests of one name would get each other's tokens
            name = str(uuid.uuid4())
        scope["headers"] = [x for x in scope["headers"] if x[0] != _ID] + [(_ID, name.encode("latin-1"))]
        entry = self.ledger.open(name)
        if entry is None:
            seconds = self.ledger.retry_after()
            headers = [(b"retry-after", str(seconds).encode())]
            text = f"{self.ledger.room} requests are running or waiting, no more are taken; try again in {seconds} s."
            await _refuse(send, 429, text, headers)
            return
        outcome = "failed"
        try:
            outcome = await self._run(scope, receive, send, entry)
        except asyncio.CancelledError:  # which is how Ray says that the client has gone
            outcome = "cancelled"
            raise
        finally:
            self.release(name)
            self.ledger.close(entry, outcome)

    async def _run(self, scope: MutableMapping[str, Any], receive: _Receive, send: _Send, entry: Entry) -> str:
        """Have a request answered unless its client goes away; what became of it."""
        body = await _read(receive)
        if body is None:
            return "cancelled"
        if len(body) > MOST_BYTES:
            await _refuse(send, 413, f"the request has more than {MOST_BYTES >> 20} MiB.")
            return "refused"
        status, sent, done = 0, False, b""

        async def replay() -> _Message:
            nonlocal body
            if body is not None:
                whole, body = body, None
                return {"type": "http.request", "body": whole, "more_body": False}
            await asyncio.Event().wait()  # the application has nobody to wait for: this does
            raise AssertionError

        async def note(message: Any) -> None:
            nonlocal status, sent, done
            if message["type"] == "http.response.start":
                status = message["status"]
                done = _DONE if _is_stream(message) and scope["path"] in _ENDED else b""
            sent = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message | {"body": message.get("body", b"") + done} if sent and done else message)

        answer = asyncio.ensure_future(self.app(scope, replay, note))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not sent and not answer.done():
                return "cancelled"
            await answer  # when all is sent, servers say that the client is gone
            return "refused" if 400 <= status < 500 else "finished" if 0 < status < 400 else "failed"
        except Exception:  # of which the client was told, and whoever runs the server is now
            _log.exception("a request failed")
            return "failed"
        finally:
            for task in (answer, gone):
                task.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)


def _is_stream(start: _Message) -> bool:
    """Whether a response is a stream of events."""
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in start["headers"])


async def _read(receive: _Receive) -> bytes | None:
    """A request's body, at most a little more than ``MOST_BYTES`` of it; None if its client has gone."""
    parts: list[bytes] = []
    while sum(map(len, parts)) <= MOST_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            break
    return b"".join(parts)


async def _gone(receive: _Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def error_body(status: int, text: str) -> dict[str, Any]:
    """An error as OpenAI's servers say it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": text, "type": kind, "param": None, "code": status}}


async def _refuse(send: _Send, status: int, text: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    body = json.dumps(error_body(status, text)).encode()
    sized = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*sized, *(headers or [])]})
    await send({"type": "http.response.body", "body": body})
