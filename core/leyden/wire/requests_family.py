"""`requests`: the hook in the public `Session.send`, and Leyden's own session.

One trap: `send` calls itself for redirects, which are no second model call.
"""

from __future__ import annotations

import functools
import http.cookiejar
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from leyden.wire.calls import ModelCall
from leyden.wire.patience import Patience, falls_back, timeouts
from leyden.wire.recognition import MARK, Outgoing, recognise
from leyden.wire.state import WIRE, below_the_wire

NOT_SENT = ("NewConnectionError", "ConnectTimeoutError", "NameResolutionError")
"""Reasons of urllib3 for which nothing was sent."""


class RequestsLibrary:
    """The original `send` and Leyden's session, which has nothing of the user's."""

    def __init__(self, module: ModuleType) -> None:
        self.module: Any = module
        self.send: Callable[..., Any] = module.Session.send
        self.lock = threading.Lock()
        self.session: Any = None

    def own_session(self) -> Any:
        """Return Leyden's session, made on first use; threads may share it because it keeps no cookies."""
        with self.lock:
            if self.session is None:
                self.session = self.module.Session()
                self.session.trust_env = False
                # The library's own 10 would drop connections when more threads than that wait for answers.
                for scheme in ("http://", "https://"):
                    self.session.mount(scheme, self.module.adapters.HTTPAdapter(pool_maxsize=64))
                self.session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
            return self.session

    def forget(self) -> None:
        """Drop the session without closing it."""
        self.lock = threading.Lock()
        self.session = None

    def close(self) -> None:
        """Close the session."""
        with self.lock:
            session, self.session = self.session, None
        if session is not None:
            session.close()

    def forward(self, call: ModelCall, original: Any) -> Any:
        """Send a routed call and return its response, unread, as the answer to the user's `original` request.

        Raises:
            DeadlineExceeded: the rollout has no time left.
            Exception: the library's own transport errors.
        """
        session = self.own_session()
        patience = Patience(call)
        while True:
            timeout = timeouts(call)
            made = self.module.Request(call.method, call.url(), headers=call.headers(), data=call.content())
            request = session.prepare_request(made)
            try:
                response = self.send(session, request, stream=True, timeout=timeout, allow_redirects=False)
            except Exception as error:
                if isinstance(error, self.module.RequestException):
                    error.request = original
                is_late = isinstance(error, self.module.Timeout)
                time.sleep(patience.after_failure(error, is_refused=is_refused(error), is_late=is_late))
                continue
            pause = patience.after_answer(response.status_code, response.headers.get("retry-after"))
            if pause is None:
                response.request, response.url = original, original.url
                return response
            response.close()
            time.sleep(pause)

    def send_call(self, call: ModelCall, session: Any, request: Any, options: dict[str, Any]) -> Any:
        """Send a model call and record how it went."""
        try:
            if call.route is None:
                with below_the_wire():
                    response = self.send(session, own_request(call, request), **options)
            else:
                response = self.forward(call, request)
            call.answered(response.status_code, encoding=response.headers.get("content-encoding"))
            if options.get("stream", session.stream):
                response.raw = ObservedBody(response.raw, call)
            else:
                call.finished(response.content)
            return response
        except BaseException as error:
            if not isinstance(error, self.module.ConnectionError) or not falls_back(call, error):
                call.failed(error)
                raise
        with below_the_wire():
            return self.send(session, request, **options)


def patch(module: ModuleType) -> None:
    """Put the wire below `requests`."""
    if not WIRE.is_installed:
        return
    library = RequestsLibrary(module)
    WIRE.libraries[module.__name__] = library

    @functools.wraps(library.send)
    def send(session: Any, request: Any, **options: Any) -> Any:
        call = recognise(outgoing(request)) if WIRE.is_installed else None
        if call is None:
            return library.send(session, request, **options)
        return library.send_call(call, session, request, options)

    WIRE.patches.replace(module.Session, "send", send)


def outgoing(request: Any) -> Outgoing:
    """Describe a request."""

    def read() -> bytes:
        body = request.body
        if isinstance(body, str):
            return body.encode()
        return bytes(body) if isinstance(body, (bytes, bytearray)) else b""

    address = urlsplit(request.url or "")
    return Outgoing(request.method or "", address.path, request.headers.get, read, address.query)


def own_request(call: ModelCall, request: Any) -> Any:
    """Return what goes to the user's endpoint: the same object, or a copy with the role's prompt and no marks."""
    marks = [name for name in request.headers if name.lower().startswith(MARK)]
    if call.prompt is None and not marks:
        return request
    changed = request.copy()
    for name in marks:
        del changed.headers[name]
    if call.prompt is not None:
        changed.prepare_body(call.content(), None)
    return changed


def is_refused(error: Exception) -> bool:
    """Say whether no connection was made."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return any(cls.__name__ in NOT_SENT for cls in type(reason).__mro__)


class ObservedBody:
    """The raw body of a streamed answer: passes everything on and tells a call what it saw."""

    def __init__(self, inner: Any, call: ModelCall) -> None:
        self.inner = inner
        self.call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __enter__(self) -> ObservedBody:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[bytes]:
        return self.seen(self.inner)

    def stream(self, *args: Any, **options: Any) -> Iterator[bytes]:
        """Yield the body in pieces."""
        return self.seen(self.inner.stream(*args, **options))

    def read_chunked(self, *args: Any, **options: Any) -> Iterator[bytes]:
        """Yield the body in the pieces that the server made."""
        return self.seen(self.inner.read_chunked(*args, **options))

    def seen(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Yield pieces, and tell the call of them and of their end."""
        try:
            for chunk in pieces:
                self.call.saw(chunk)
                yield chunk
        except GeneratorExit:
            raise
        except BaseException as error:
            self.call.failed(error)
            raise
        self.call.finished()

    def read(self, *args: Any, **options: Any) -> bytes:
        """Read the body, or a part of it."""
        return self.note(lambda: self.inner.read(*args, **options))

    def read1(self, *args: Any, **options: Any) -> bytes:
        """Read what is there."""
        return self.note(lambda: self.inner.read1(*args, **options))

    def readline(self, *args: Any) -> bytes:
        """Read one line."""
        return self.note(lambda: self.inner.readline(*args))

    def readlines(self, _hint: int = -1) -> list[bytes]:
        """Read the lines that are left."""
        return list(self)

    def readinto(self, buffer: Any) -> int:
        """Read into `buffer`."""
        with memoryview(buffer) as view:
            return len(self.note(lambda: bytes(view[: self.inner.readinto(view)])))

    def note(self, read: Callable[[], bytes]) -> bytes:
        """Return what `read` returns, and tell the call of it."""
        try:
            chunk = read()
            self.call.saw(chunk)
        except BaseException as error:
            self.call.failed(error)
            raise
        if not chunk or self.inner.closed:
            self.call.finished()
        return chunk

    def close(self) -> None:
        """Close the connection."""
        try:
            self.inner.close()
        finally:
            self.call.closed_early()

    def release_conn(self) -> None:
        """Give the connection back."""
        try:
            self.inner.release_conn()
        finally:
            self.call.closed_early()
