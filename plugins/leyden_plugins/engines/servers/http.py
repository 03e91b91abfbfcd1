"""JSON and event streams from a model server.

One idea: an engine may be used from several event loops (a trainer's, and that of an endpoint beside it), so there is a
session of connections for each.
One trap: a server that is gone and one that says no are different errors: the first may be asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec

from leyden.errors import EngineError
from leyden.extras import extra

with extra("vllm"):
    import aiohttp

CONNECT_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 3.0
"""Shorter than servers keep a connection, which uvicorn does for 5: one that is just being closed loses a request."""
SHOWN = 600
"""How many characters of a server's refusal stand in an error."""


class Unreachable(EngineError):
    """The server does not answer, or stopped in the middle."""


class Refused(EngineError):
    """The server said no."""

    def __init__(self, status: int, what: str, said: str) -> None:
        super().__init__(f"the server refused {what} with status {status}: {said}")
        self.status = status
        self.said = said


class Http:
    """One server."""

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None) -> None:
        self.url = url.rstrip("/")
        self._headers = dict(headers or {})
        self._sessions: dict[asyncio.AbstractEventLoop, aiohttp.ClientSession] = {}

    async def get(self, path: str, *, seconds: float | None = CONNECT_SECONDS) -> Any:
        """Return what the server says at a path: JSON, or `None` for an empty answer.

        Raises:
            Unreachable: there is no answer within the time.
            Refused: the answer is an error.
        """
        return await self._ask("GET", path, None, seconds)

    async def post(self, path: str, body: object = None, *, seconds: float | None = None) -> Any:
        """Send JSON; return the answer as `get` does, without a limit of time unless one is given."""
        return await self._ask("POST", path, body, seconds)

    async def events(self, path: str, body: object) -> AsyncIterator[bytes]:
        """Send JSON; yield the data of each server-sent event up to `[DONE]`. Closing ends the request.

        Raises:
            Unreachable: the connection breaks before the end.
            Refused: the answer is an error.
        """
        with self._told(path):
            async with await self._send("POST", path, msgspec.json.encode(body)) as reply:
                await self._check(reply, path)
                async for line in reply.content:
                    if line.startswith(b"data:"):
                        data = line[5:].strip()
                        if data == b"[DONE]":
                            return
                        yield data
        raise Unreachable(f"{self.url}{path} ended its stream before it was complete")

    async def close(self) -> None:
        """Close all connections. Idempotent."""
        here = asyncio.get_running_loop()
        sessions, self._sessions = self._sessions, {}
        for loop, session in sessions.items():
            if loop is here:
                await session.close()
            elif loop.is_running():
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(session.close(), loop))
            elif session.connector is not None:
                await session.connector.close()  # its loop is gone: this only marks it

    async def _ask(self, method: str, path: str, body: object, seconds: float | None) -> Any:
        data = None if body is None else msgspec.json.encode(body)
        with self._told(path):
            async with asyncio.timeout(seconds):
                async with await self._send(method, path, data) as reply:
                    await self._check(reply, path)
                    content = await reply.read()
        try:
            return msgspec.json.decode(content) if content.strip() else None
        except msgspec.DecodeError:
            return content.decode(errors="replace")

    async def _send(self, method: str, path: str, data: bytes | None) -> aiohttp.ClientResponse:
        session = await self._session()
        try:
            return await session.request(method, self.url + path, data=data)
        except aiohttp.ServerDisconnectedError:
            # After a failure of theirs, servers close the connection without a word, and this request may have gone out
            # on it. If the server itself is gone, the second time says so.
            return await session.request(method, self.url + path, data=data)

    async def _session(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        for old in [one for one in self._sessions if one.is_closed()]:
            connector = self._sessions.pop(old).connector
            if connector is not None:
                await connector.close()
        if loop not in self._sessions:
            self._sessions[loop] = aiohttp.ClientSession(
                headers={"content-type": "application/json", **self._headers},
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
                read_bufsize=2**20,
            )
        return self._sessions[loop]

    async def _check(self, reply: aiohttp.ClientResponse, path: str) -> None:
        if reply.status >= 400:
            raise Refused(reply.status, f"{self.url}{path}", message_of(await reply.read()))

    @contextlib.contextmanager
    def _told(self, path: str) -> Any:
        try:
            yield
        except (aiohttp.ClientError, OSError) as error:  # a TimeoutError is an OSError
            raise Unreachable(f"{self.url}{path} does not answer: {error!r}") from error


def message_of(content: bytes) -> str:
    """Return the words of an error's body, in whichever of the usual forms."""
    text = content.decode(errors="replace")
    try:
        found: Any = msgspec.json.decode(content)
    except msgspec.DecodeError:
        return text[:SHOWN]
    if isinstance(found, dict):
        inner = found.get("error", found)
        said = inner.get("message") if isinstance(inner, dict) else inner
        return str(said or text)[:SHOWN]
    return text[:SHOWN]
