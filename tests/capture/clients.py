"""Six ways to send one request: every HTTP library that the wire knows, behind one call.

`send(kind, ...)` does what a plain user of that library would do; what comes back is the same for all of them.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

KINDS = tuple(
    kind
    for kind in ("httpx", "httpx-async", "httpx2", "httpx2-async", "requests", "aiohttp")
    if importlib.util.find_spec(kind.removesuffix("-async"))
)
"""The ways that are installed: aiohttp comes with the frameworks, and their environments run these tests too."""


@dataclass(frozen=True)
class Reply:
    """What the user's code got."""

    status: int
    content: bytes
    url: str
    sent_headers: Mapping[str, str]
    """Headers of the request that the library says this answers."""


def library_of(kind: str) -> Any:
    return importlib.import_module(kind.removesuffix("-async"))


def transport_error(kind: str) -> type[Exception]:
    """Return what the library raises when nobody listens."""
    library = library_of(kind)
    error: type[Exception] = {"requests": "ConnectionError", "aiohttp": "ClientConnectionError"}.get(
        kind, "ConnectError"
    )
    return getattr(library, error)  # type: ignore[no-any-return]


def cut(pieces: Iterable[bytes], stop_after: int | None) -> bytes:
    """Join pieces, the first ones only where a reader stops."""
    found: list[bytes] = []
    for piece in pieces:
        found.append(piece)
        if stop_after is not None and b"".join(found).count(b"\n\n") >= stop_after:
            break
    return b"".join(found)


def send(
    kind: str,
    url: str,
    content: bytes,
    headers: Mapping[str, str] | None = None,
    *,
    stream: bool = False,
    stop_after: int | None = None,
    method: str = "POST",
    timeout: float = 20,
) -> Reply:
    """Send a request and read its answer, or `stop_after` that many events of its stream."""
    options: dict[str, Any] = {"headers": {"content-type": "application/json", **(headers or {})}}
    if kind.endswith("-async") or kind == "aiohttp":
        sending = send_aiohttp if kind == "aiohttp" else send_httpx
        made = sending(kind, method, url, content, options, stream=stream, stop_after=stop_after, timeout=timeout)
        return asyncio.run(made)
    library = library_of(kind)
    if kind == "requests":
        with library.Session() as session:
            response = session.request(method, url, data=content, stream=stream, timeout=timeout, **options)
            with response:
                read = cut(response.iter_content(None), stop_after) if stream else response.content
            return Reply(response.status_code, read, response.url, response.request.headers)
    with library.Client(timeout=timeout) as client:
        if not stream:
            response = client.request(method, url, content=content, **options)
            return Reply(response.status_code, response.content, str(response.url), response.request.headers)
        with client.stream(method, url, content=content, **options) as response:
            read = cut(response.iter_bytes(), stop_after)
        return Reply(response.status_code, read, str(response.url), response.request.headers)


async def send_httpx(
    kind: str,
    method: str,
    url: str,
    content: bytes,
    options: dict[str, Any],
    *,
    stream: bool,
    stop_after: int | None,
    timeout: float,
) -> Reply:
    async with library_of(kind).AsyncClient(timeout=timeout) as client:
        if not stream:
            response = await client.request(method, url, content=content, **options)
            return Reply(response.status_code, response.content, str(response.url), response.request.headers)
        read = b""
        async with client.stream(method, url, content=content, **options) as response:
            async for piece in response.aiter_bytes():
                read += piece
                if stop_after is not None and read.count(b"\n\n") >= stop_after:
                    break
        return Reply(response.status_code, read, str(response.url), response.request.headers)


async def send_aiohttp(
    kind: str,
    method: str,
    url: str,
    content: bytes,
    options: dict[str, Any],
    *,
    stream: bool,
    stop_after: int | None,
    timeout: float,
) -> Reply:
    library = library_of(kind)
    total = library.ClientTimeout(total=timeout)
    async with (
        library.ClientSession(timeout=total) as session,
        session.request(method, url, data=content, **options) as response,
    ):
        if not stream:
            read = await response.read()
        else:
            read = b""
            async for piece in response.content.iter_any():
                read += piece
                if stop_after is not None and read.count(b"\n\n") >= stop_after:
                    break
        info = response.request_info
        return Reply(response.status, read, str(info.url), info.headers)
