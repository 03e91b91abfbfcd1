"""The server's sockets send at once: Nagle's algorithm would add 40 ms to every call on a kept-open connection."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from leyden_plugins.gateway.server import HOST, BackgroundServer

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_an_answer_s_body_does_not_wait_until_its_head_is_acknowledged() -> None:
    sends_at_once: list[int] = []
    server = BackgroundServer()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        (connection,) = server._server.server_state.connections  # type: ignore[union-attr]  # it runs
        accepted = connection.transport.get_extra_info("socket")
        sends_at_once.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    await server.start(app)
    reader, writer = await asyncio.open_connection(HOST, server.port)
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()
    await writer.wait_closed()
    await server.stop()
    assert sends_at_once == [1]
