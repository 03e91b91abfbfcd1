"""One HTTP request and its answer, over plain ASGI.

Plain ASGI because there are few routes: a framework would add a dependency and its import for a routing
table (its own cost a request, 12 µs of CPU, would not matter).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import msgspec

from leyden_plugins.gateway.refusal import Refusal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"


class Disconnected(Exception):
    """The client went away before its answer was complete."""


class Exchange:
    """Reads a request's headers and body, and writes its answer once."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope.get("raw_path", scope["path"].encode()).decode("latin-1").partition("?")[0]
        """Still percent-encoded: a role may hold a slash."""
        self.has_begun = False
        """The answer's status is on its way and cannot be changed."""
        self.is_streaming = False
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self._receive = receive
        self._send = send

    def header(self, name: str) -> str | None:
        """Return a header's value; names are lower case."""
        value = self._headers.get(name.encode())
        return None if value is None else value.decode("latin-1")

    @property
    def keys(self) -> list[str]:
        """Return the keys that the request brings: OpenAI's bearer token, Anthropic's `x-api-key`, or both."""
        scheme, _, token = (self.header("authorization") or "").partition(" ")
        found = [token if scheme.lower() == "bearer" else "", self.header("x-api-key") or ""]
        return [key.strip() for key in found if key.strip()]

    async def body(self, limit: int) -> bytes:
        """Return the whole body.

        Raises:
            Refusal: it is longer than `limit` bytes.
            Disconnected: the client went away while sending.
        """
        declared = self.header("content-length") or ""
        if declared.isdigit() and (len(declared) > 15 or int(declared) > limit):
            raise too_long(limit)
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Disconnected("the client went away while it sent its request")
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise too_long(limit)
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    async def json(self, limit: int) -> dict[str, object]:
        """Return the body's JSON object.

        Raises:
            Refusal: it is longer than `limit` bytes, not JSON, not an object, or nested too deep.
            Disconnected: the client went away while sending.
        """
        try:
            value = msgspec.json.decode(await self.body(limit))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Refusal(400, f"the body is not JSON: {error}", code="invalid_json") from error
        except RecursionError as error:
            raise Refusal(400, "the body's JSON is nested too deep", code="invalid_json") from error
        if not isinstance(value, dict):
            raise Refusal(400, "the body must be a JSON object", code="invalid_json")
        return value

    async def disconnect(self) -> None:
        """Return when the client is gone; call it after the body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def reply(
        self,
        status: int,
        body: bytes,
        *,
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        """Write a whole JSON answer."""
        self.has_begun = True
        length = str(len(body)).encode()
        head = [(b"content-type", JSON), (b"content-length", length), *headers]
        await self._send({"type": "http.response.start", "status": status, "headers": head})
        await self._send({"type": "http.response.body", "body": body})

    async def write(self, events: bytes, *, last: bool = False) -> None:
        """Write server-sent events, beginning the stream with the first; `last` ends it."""
        if not self.is_streaming:
            self.is_streaming = self.has_begun = True
            head = [(b"content-type", EVENT_STREAM), (b"cache-control", b"no-cache")]
            await self._send({"type": "http.response.start", "status": 200, "headers": head})
        await self._send({"type": "http.response.body", "body": events, "more_body": not last})


def too_long(limit: int) -> Refusal:
    """Return the refusal of a body over `limit` bytes."""
    return Refusal(413, f"the request is longer than {limit} bytes; send less", code="request_too_large")
