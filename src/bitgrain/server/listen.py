"""Binds the address before anything else is done, and runs the application on it."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from bitgrain.errors import RequestError

GRACE_SECONDS = 5  # how long open connections may go on after the order to stop


def bind(host: str, port: int) -> socket.socket:
    """A bound socket; binding first finds a wrong address before a model is loaded.

    Args:
        port: 0 lets the system choose.
    Raises:
        RequestError: the address is impossible, unknown, taken or not allowed.
    """
    if not 0 <= port <= 65535:
        raise RequestError(f"--port {port}", "no such port", "a number from 1 to 65535, or 0 for any free one", "choose another port")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise RequestError(
            f"--host {host}", f"the name cannot be resolved ({error})", "a name or address of this machine", "use 127.0.0.1 or 0.0.0.0"
        ) from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere this option would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # listening takes the port for good; clients wait in the backlog until the model is loaded
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise _refusal(host, port, error) from error
    return listener


def _refusal(host: str, port: int, error: OSError) -> RequestError:
    where = f"--host {host} --port {port}"
    if error.errno == errno.EADDRINUSE:
        return RequestError(where, "the port is in use", "a free port", "stop the other server, or choose another --port")
    if error.errno in (errno.EACCES, errno.EPERM):
        return RequestError(where, f"not allowed ({error.strerror})", "a port that this user may open", "choose a port above 1023")
    if error.errno == errno.EADDRNOTAVAIL:
        return RequestError(where, "the address is not one of this machine's", "an address of this machine", "use 127.0.0.1 or 0.0.0.0")
    return RequestError(where, f"cannot be opened ({error})", "an address that can be opened", "choose another --host or --port")


def url_of(listener: socket.socket) -> str:
    """Where clients reach a bound socket."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server that says when it serves.

    Attributes:
        interrupted: it stopped because of SIGINT; uvicorn raises the signal again when it has stopped, but whoever catches
                     it then may not be us.
    """

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start
        self.interrupted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.interrupted = self.interrupted or sig == signal.SIGINT
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._on_start()


def make_server(app: FastAPI, on_start: Callable[[], None], **options: Any) -> Server:
    """A server for sockets that are bound already: `server.run(sockets=[…])`."""
    settings = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": GRACE_SECONDS, **options}
    return Server(uvicorn.Config(app, **settings), on_start)
