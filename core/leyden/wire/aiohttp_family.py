"""`aiohttp`: the hook in `ClientSession._request`, and Leyden's own sessions.

`_request` is private, but it is the one place that `get`, `post`, `request` and the module's own functions share.
One idea: a routed call has a session of its own that is let go once the answer begins, so no loop keeps one.
One trap: an answer's body is read when its reader likes, so the body is what is observed.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import Any

from leyden.errors import ConfigurationError
from leyden.wire.calls import ModelCall
from leyden.wire.patience import Patience, falls_back, timeouts
from leyden.wire.recognition import MARK, Outgoing, recognise
from leyden.wire.state import WIRE, below_the_wire


class AiohttpLibrary:
    """The original `_request`."""

    def __init__(self, module: ModuleType) -> None:
        self.module: Any = module
        self.request: Callable[..., Awaitable[Any]] = vars(module.ClientSession)["_request"]
        self.observed = observed_reader(module)
        self.refused: tuple[type[Exception], ...] = (module.ClientConnectorError, module.ConnectionTimeoutError)
        self.unreachable: tuple[type[Exception], ...] = (*self.refused, module.ClientConnectionError)

    def close(self) -> None:
        """Do nothing: no session outlives the beginning of its answer."""

    def forget(self) -> None:
        """Do nothing, likewise."""

    async def forward(self, call: ModelCall, url: Any, headers: Any) -> Any:
        """Send a routed call and return its response, unread, as the answer to the user's request.

        Args:
            call: what to send.
            url: of the user's request.
            headers: of the user's request.

        Raises:
            DeadlineExceeded: the rollout has no time left.
            Exception: the library's own transport errors.
        """
        patience = Patience(call)
        while True:
            try:
                response = await self.send(call)
            except Exception as error:
                is_late = isinstance(error, asyncio.TimeoutError)
                is_refused = isinstance(error, self.refused)
                await asyncio.sleep(patience.after_failure(error, is_refused=is_refused, is_late=is_late))
                continue
            pause = patience.after_answer(response.status, response.headers.get("retry-after"))
            if pause is None:
                # What the user's code logs or raises names its own address, and not our key.
                shown = type(response.headers)(headers)
                response._request_info = self.module.RequestInfo(url, call.method, shown, url)
                return response
            response.close()
            await asyncio.sleep(pause)

    async def send(self, call: ModelCall) -> Any:
        """Send a routed call once."""
        connect, total = timeouts(call)
        connector = self.module.TCPConnector(force_close=True)
        session = self.module.ClientSession(connector=connector, cookie_jar=self.module.DummyCookieJar())
        try:
            return await self.request(
                session,
                call.method,
                call.url(),
                data=call.content() or None,
                headers=call.headers(),
                timeout=self.module.ClientTimeout(total=None, sock_connect=connect, sock_read=total),
                allow_redirects=False,
            )
        except BaseException:
            await session.close()
            raise
        finally:
            # The answer holds its connection, and the connection closes itself.
            session.detach()

    async def send_call(self, call: ModelCall, session: Any, method: str, url: Any, options: dict[str, Any]) -> Any:
        """Send a model call and record how it went."""
        try:
            if call.route is None:
                own = own_options(call, session, options)
                with below_the_wire():
                    response = await self.request(session, method, url, **own)
            else:
                response = await self.forward(call, session._build_url(url), headers_of(session, options))
            call.answered(response.status, encoding=response.headers.get("Content-Encoding"))
            response.content = self.observed(response.content, call)
            if call.route is not None:
                await raise_for_status(session, response, options)
            return response
        except BaseException as error:
            if not isinstance(error, self.unreachable) or not falls_back(call, error):
                call.failed(error)
                raise
        with below_the_wire():
            return await self.request(session, method, url, **options)


async def raise_for_status(session: Any, response: Any, options: dict[str, Any]) -> None:
    """Raise for an error status where the user's session or request says so."""
    wanted = options.get("raise_for_status")
    wanted = session.raise_for_status if wanted is None else wanted
    if callable(wanted):
        await wanted(response)
    elif wanted:
        response.raise_for_status()


def patch(module: ModuleType) -> None:
    """Put the wire below `aiohttp`.

    Raises:
        ConfigurationError: the hook point is missing in this version.
    """
    if not WIRE.is_installed:
        return
    if not {"_request", "_build_url"} <= set(vars(module.ClientSession)):
        raise ConfigurationError(
            f"aiohttp {module.__version__} has no ClientSession._request, through which Leyden sees its requests; "
            "versions 3.10 to 3.14 have it"
        )
    library = AiohttpLibrary(module)
    WIRE.libraries[module.__name__] = library

    @functools.wraps(library.request)
    async def request(session: Any, method: str, str_or_url: Any, **options: Any) -> Any:
        call = recognise(outgoing(session, method, str_or_url, options)) if WIRE.is_installed else None
        if call is None:
            return await library.request(session, method, str_or_url, **options)
        return await library.send_call(call, session, method, str_or_url, options)

    WIRE.patches.replace(module.ClientSession, "_request", request)


def outgoing(session: Any, method: str, url: Any, options: dict[str, Any]) -> Outgoing:
    """Describe a request."""

    def read() -> bytes:
        body = options.get("data")
        if options.get("json") is not None:
            serialize = getattr(session, "_json_serialize_bytes", None) or session.json_serialize
            body = serialize(options["json"])
        if isinstance(body, str):
            return body.encode()
        return bytes(body) if isinstance(body, (bytes, bytearray, memoryview)) else b""

    try:
        address = session._build_url(url)
        if options.get("params"):
            address = address.update_query(options["params"])
        path, query = address.path, address.raw_query_string
    except (TypeError, ValueError, AssertionError):
        path = query = ""  # an address that the library will refuse itself
    return Outgoing(method.upper(), path, lambda name: headers_of(session, options).get(name), read, query)


def headers_of(session: Any, options: dict[str, Any]) -> Any:
    """Return the headers that a request will have, without those of the library."""
    headers = session.headers.copy()
    headers.update(options.get("headers") or {})
    return headers


def own_options(call: ModelCall, session: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return what the user's session is called with: as it was, or with the role's prompt and no marks.

    Marks among the session's own headers stay: it would add them again.
    """
    given = headers_of(session, options)
    marks = [name for name in given if name.lower().startswith(MARK)]
    if call.prompt is None and not marks:
        return options
    for name in marks:
        given.popall(name, None)
    changed = {**options, "headers": given}
    if call.prompt is not None:
        given.popall("content-length", None)
        given["content-type"] = "application/json"
        changed |= {"json": None, "data": call.content()}
    return changed


def observed_reader(module: Any) -> Any:
    """Return a class that stands for a `StreamReader` of `module` and tells a call what was read."""
    reader = module.StreamReader

    class ObservedReader:
        """An answer on its way to the user's code."""

        __aiter__ = reader.__aiter__
        iter_any = reader.iter_any
        iter_chunked = reader.iter_chunked
        iter_chunks = reader.iter_chunks

        def __init__(self, inner: Any, call: ModelCall) -> None:
            self.inner = inner
            self.call = call

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        async def read(self, n: int = -1) -> Any:
            return await self.seen(self.inner.read(n))

        async def readany(self) -> Any:
            return await self.seen(self.inner.readany())

        async def readexactly(self, n: int) -> Any:
            return await self.seen(self.inner.readexactly(n))

        async def readline(self, **options: Any) -> Any:
            return await self.seen(self.inner.readline(**options))

        async def readuntil(self, separator: bytes = b"\n", **options: Any) -> Any:
            return await self.seen(self.inner.readuntil(separator, **options))

        async def readchunk(self) -> Any:
            return await self.seen(self.inner.readchunk(), lambda pair: pair[0])

        def read_nowait(self, n: int = -1) -> bytes:
            return self.note(self.inner.read_nowait(n))

        async def seen(self, reading: Awaitable[Any], data_of: Callable[[Any], bytes] = lambda piece: piece) -> Any:
            """Return what was read, and tell the call of it."""
            try:
                piece = await reading
                self.note(data_of(piece))
            except BaseException as error:
                self.call.failed(error)
                raise
            return piece

        def note(self, data: bytes) -> bytes:
            """Tell the call of a piece, and of the end."""
            self.call.saw(data)
            if self.inner.at_eof():
                self.call.finished()
            return data

        def set_exception(self, *args: Any) -> None:
            """Take notice that the response was closed: it says so to its reader."""
            try:
                self.inner.set_exception(*args)
            finally:
                self.call.closed_early()

    return ObservedReader
