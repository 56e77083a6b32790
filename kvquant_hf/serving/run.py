"""The process: a socket, uvicorn, and one line when it listens."""

import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from ..errors import ServingError

_GRACE = 5


def bind(host: str, port: int) -> socket.socket:
    """A socket, before anything that takes long.

    Args:
        host: a name or address of this machine.
        port: 0 is any that is free.

    Raises:
        ServingError: the port is taken, or the host is not of this machine.
    """
    found = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        if found is not None:
            found.close()
        raise ServingError(
            f"cannot listen at {host}:{port}: {error.strerror}; choose another --port or --host."
        ) from error
    return found


def url_of(listening: socket.socket) -> str:
    """Where a socket can be reached."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn, which says when it listens.

    Args:
        config: of uvicorn.
        listening: called then.
    """

    def __init__(self, config: uvicorn.Config, listening: Callable[[], object]) -> None:
        super().__init__(config)
        self._listening = listening

    async def startup(self, sockets: Any = None) -> None:
        """As uvicorn's."""
        await super().startup(sockets)
        if self.started:
            self._listening()


def run(
    app: Any,
    listening: socket.socket,
    ready: Callable[[], object],
    log_level: str = "warning",
    grace: int = _GRACE,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        app: an ASGI application.
        listening: a bound socket.
        ready: called when requests are answered.
        log_level: of uvicorn: "info" has a line for each request.
        grace: seconds that answers have to end when the server is told to.
    """
    config = uvicorn.Config(app, log_level=log_level, timeout_graceful_shutdown=grace)
    _Server(config, ready).run(sockets=[listening])
