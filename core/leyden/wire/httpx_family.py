"""`httpx` and `httpx2`: the hook in the public `send` of both clients, and Leyden's own clients made with them.

One idea: a routed request never touches the user's client, so none of its auth, hooks, cookies, proxies or
timeouts can reach the gateway. One trap: connection pools belong to an event loop, so there is one async client
for each loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from types import ModuleType
from typing import Any

from leyden.wire.calls import ModelCall
from leyden.wire.patience import Patience, falls_back, timeouts
from leyden.wire.recognition import MARK, Outgoing, recognise
from leyden.wire.state import WIRE, below_the_wire


class HttpxLibrary:
    """One of both: its original `send` functions and Leyden's clients.

    Its classes are reached through the module object and typed `Any`, because core depends on neither library.
    """

    def __init__(self, module: ModuleType) -> None:
        self.module: Any = module
        self.send: Callable[..., Any] = module.Client.send
        self.async_send: Callable[..., Any] = module.AsyncClient.send
        self.observed = observed_stream(module)
        self.refused: tuple[type[Exception], ...] = (module.ConnectError, module.ConnectTimeout)
        self.unreachable: tuple[type[Exception], ...] = (*self.refused, module.NetworkError, module.ProtocolError)
        self.lock = threading.Lock()
        self.client: Any = None
        self.ssl_context: Any = None
        self.async_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = weakref.WeakKeyDictionary()

    def options(self) -> dict[str, Any]:
        """Return what every client of ours is made with; deadlines bound the waiting, not the pool."""
        # Idle connections are dropped before common servers (5 s) drop them under our feet.
        limits = self.module.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=3)
        # Each client would make one of its own, which takes 20 ms; an agent may have a loop for each rollout.
        self.ssl_context = self.ssl_context or self.module.create_ssl_context(trust_env=False)
        return {"trust_env": False, "follow_redirects": False, "limits": limits, "verify": self.ssl_context}

    def sync_client(self) -> Any:
        """Return the blocking client, made on first use."""
        with self.lock:
            if self.client is None:
                self.client = self.module.Client(**self.options())
            return self.client

    def async_client(self) -> Any:
        """Return the client of the running loop, made on first use."""
        loop = asyncio.get_running_loop()
        with self.lock:
            # A client refers to its loop, so no entry ends by itself. They are freed only after the lock is.
            ended = [self.async_clients.pop(other) for other in list(self.async_clients) if other.is_closed()]
            if loop not in self.async_clients:
                self.async_clients[loop] = self.module.AsyncClient(**self.options())
            client = self.async_clients[loop]
        del ended
        return client

    def forget(self) -> None:
        """Drop the clients without closing them."""
        self.lock = threading.Lock()
        self.client = None
        self.async_clients = weakref.WeakKeyDictionary()

    def close(self) -> None:
        """Close the clients, each in its own loop.

        Those whose loop is closed, or cannot run because another one runs here, are dropped.
        """
        with self.lock:
            client, self.client = self.client, None
            async_clients = list(self.async_clients.items())
            self.async_clients.clear()
        if client is not None:
            client.close()
        for loop, async_client in async_clients:
            if loop.is_running():
                asyncio.run_coroutine_threadsafe(async_client.aclose(), loop)
            elif not loop.is_closed() and not is_in_a_loop():
                loop.run_until_complete(async_client.aclose())

    # ---- a routed call -----------------------------------------------------------------------------------------

    def request(self, client: Any, call: ModelCall) -> Any:
        """Build the request of a routed call."""
        connect, total = timeouts(call)
        return client.build_request(
            call.method,
            call.url(),
            headers=call.headers(),
            content=call.content(),
            timeout=self.module.Timeout(total, connect=connect),
        )

    def forward(self, call: ModelCall, original: Any) -> Any:
        """Send a routed call and return its response, unread, as the answer to the user's `original` request.

        Raises:
            DeadlineExceeded: the rollout has no time left.
            Exception: the library's own transport errors.
        """
        client = self.sync_client()
        patience = Patience(call)
        while True:
            request = self.request(client, call)
            try:
                response = self.send(client, request, stream=True)
            except Exception as error:
                time.sleep(self.pause_after(error, original, patience))
                continue
            pause = patience.after_answer(response.status_code, response.headers.get("retry-after"))
            if pause is None:
                response.request = original
                return response
            response.close()
            time.sleep(pause)

    async def async_forward(self, call: ModelCall, original: Any) -> Any:
        """Send a routed call and return its response, unread, as the answer to the user's `original` request.

        Raises:
            DeadlineExceeded: the rollout has no time left.
            Exception: the library's own transport errors.
        """
        client = self.async_client()
        patience = Patience(call)
        while True:
            request = self.request(client, call)
            try:
                response = await self.async_send(client, request, stream=True)
            except Exception as error:
                await asyncio.sleep(self.pause_after(error, original, patience))
                continue
            pause = patience.after_answer(response.status_code, response.headers.get("retry-after"))
            if pause is None:
                response.request = original
                return response
            await response.aclose()
            await asyncio.sleep(pause)

    def pause_after(self, error: Exception, original: Any, patience: Patience) -> float:
        """Return how long to wait before a failed request is sent again.

        Raises:
            DeadlineExceeded: it failed because the rollout has no time left.
            Exception: `error`, when repeating would not help.
        """
        if isinstance(error, self.module.RequestError):
            error.request = original
        is_late = isinstance(error, self.module.TimeoutException)
        return patience.after_failure(error, is_refused=isinstance(error, self.refused), is_late=is_late)

    # ---- any call ----------------------------------------------------------------------------------------------

    def send_call(self, call: ModelCall, client: Any, request: Any, options: dict[str, Any]) -> Any:
        """Send a model call and record how it went."""
        try:
            if call.route is None:
                with below_the_wire():
                    response = self.send(client, self.own_request(call, request), **options)
                response.request = request
            else:
                response = self.forward(call, request)
            call.answered(response.status_code, encoding=response.headers.get("content-encoding"))
            if options.get("stream"):
                response.stream = self.observed(response.stream, call)
            else:
                call.finished(response.read())
            return response
        except BaseException as error:
            if not self.may_go_on(call, error):
                raise
        with below_the_wire():
            return self.send(client, request, **options)

    async def async_send_call(self, call: ModelCall, client: Any, request: Any, options: dict[str, Any]) -> Any:
        """Send a model call and record how it went."""
        try:
            if call.route is None:
                with below_the_wire():
                    response = await self.async_send(client, self.own_request(call, request), **options)
                response.request = request
            else:
                response = await self.async_forward(call, request)
            call.answered(response.status_code, encoding=response.headers.get("content-encoding"))
            if options.get("stream"):
                response.stream = self.observed(response.stream, call)
            else:
                call.finished(await response.aread())
            return response
        except BaseException as error:
            if not self.may_go_on(call, error):
                raise
        with below_the_wire():
            return await self.async_send(client, request, **options)

    def may_go_on(self, call: ModelCall, error: BaseException) -> bool:
        """Record a failure; say whether the app's own model answers instead.

        Raises:
            DeadlineExceeded: the failure is that of the deadline.
        """
        if isinstance(error, self.unreachable) and falls_back(call, error):
            return True
        call.failed(error)
        return False

    def own_request(self, call: ModelCall, request: Any) -> Any:
        """Return what goes to the user's endpoint: the same object, or a copy with the role's prompt and no marks."""
        marks = [name for name in request.headers if name.startswith(MARK)]
        if call.prompt is None and not marks:
            return request
        headers = request.headers.copy()
        for name in marks if call.prompt is None else (*marks, "content-length"):
            headers.pop(name, None)
        return self.module.Request(
            request.method, request.url, headers=headers, content=call.content(), extensions=request.extensions
        )


def is_in_a_loop() -> bool:
    """Say whether an event loop runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def patch(module: ModuleType) -> None:
    """Put the wire below both clients of `httpx` or `httpx2`."""
    if not WIRE.is_installed or getattr(module.Client.send, "is_leyden_wire", False):
        return
    library = HttpxLibrary(module)
    WIRE.libraries[module.__name__] = library

    @functools.wraps(library.send)
    def send(client: Any, request: Any, **options: Any) -> Any:
        call = recognise(outgoing(request)) if WIRE.is_installed else None
        if call is None:
            return library.send(client, request, **options)
        return library.send_call(call, client, request, options)

    @functools.wraps(library.async_send)
    async def async_send(client: Any, request: Any, **options: Any) -> Any:
        call = recognise(outgoing(request)) if WIRE.is_installed else None
        if call is None:
            return await library.async_send(client, request, **options)
        return await library.async_send_call(call, client, request, options)

    send.is_leyden_wire = True  # type: ignore[attr-defined]  # seen when one library is an alias of the other
    WIRE.patches.replace(module.Client, "send", send)
    WIRE.patches.replace(module.AsyncClient, "send", async_send)


def outgoing(request: Any) -> Outgoing:
    """Describe a request."""

    def read() -> bytes:
        try:
            return bytes(request.content)
        except RuntimeError:  # a streamed upload, which no SDK uses for a model call
            return b""

    return Outgoing(request.method, request.url.path, request.headers.get, read, request.url.query.decode())


def observed_stream(module: Any) -> Any:
    """Return a stream class of `module` that passes bytes on unbuffered and tells a call what it saw."""

    class ObservedStream(module.SyncByteStream, module.AsyncByteStream):  # type: ignore[misc]
        """An answer on its way to the user's code."""

        def __init__(self, inner: Any, call: ModelCall) -> None:
            self.inner = inner
            self.call = call

        @property
        def elapsed(self) -> Any:
            """Return what `httpx2` reads as the response's elapsed time."""
            return getattr(self.inner, "elapsed", None)

        def __iter__(self) -> Iterator[bytes]:
            with self.ending():
                for chunk in self.inner:
                    self.call.saw(chunk)
                    yield chunk

        async def __aiter__(self) -> AsyncIterator[bytes]:
            with self.ending():
                async for chunk in self.inner:
                    self.call.saw(chunk)
                    yield chunk

        @contextlib.contextmanager
        def ending(self) -> Iterator[None]:
            """Tell the call how the iteration ended; a reader that stops early calls `close`."""
            try:
                yield
            except GeneratorExit:
                raise
            except BaseException as error:
                self.call.failed(error)
                raise
            self.call.finished()

        def close(self) -> None:
            try:
                self.inner.close()
            finally:
                self.call.closed_early()

        async def aclose(self) -> None:
            try:
                await self.inner.aclose()
            finally:
                self.call.closed_early()

    return ObservedStream
