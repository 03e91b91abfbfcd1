"""Run an ASGI app with uvicorn on the caller's loop, bound to this machine alone."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

from leyden.errors import ConfigurationError
from leyden.extras import extra

with extra("gateway"):
    import uvicorn

HOST = "127.0.0.1"

KEEP_ALIVE_SECONDS = 75
"""Above what clients use (httpx 5 s, aiohttp 15 s): a server that closes first makes a client's next request fail."""

SHUTDOWN_SECONDS = 2


class Server(uvicorn.Server):
    """Leaves signals to the program it runs in."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class BackgroundServer:
    """Serves until `stop`, as a task of the loop that called `start`."""

    def __init__(self) -> None:
        self.port = 0
        self._server: Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, app: Any, port: int = 0) -> None:
        """Bind and serve; `port=0` takes a free one.

        Raises:
            ConfigurationError: the port is taken.
        """
        listener = bind(port)
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            http="auto",
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        self._server = Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0)
        if self._task.done():
            await self._task

    async def stop(self) -> None:
        """Close every connection and return; calls still running are cancelled after a moment. Idempotent."""
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            await self._task
            self._server = self._task = None


def bind(port: int) -> socket.socket:
    """Return a bound socket.

    Raises:
        ConfigurationError: the port is taken.
    """
    # With its protocol named, asyncio switches Nagle's algorithm off, which would hold back an answer's body for the
    # 40 ms that clients delay their acknowledgement of its head.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"port {port!r} cannot be used ({error}); choose another or 0") from error
    return listener
