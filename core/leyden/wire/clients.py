"""Leyden's own HTTP clients, one set for each patched library.

One idea: a routed request never touches the user's client, so none of its auth, hooks, cookies, proxies or
timeouts can reach the gateway. One trap: connection pools belong to an event loop, so there is one async client
for each loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from types import ModuleType
from typing import Any

from leyden.errors import DeadlineExceeded, EngineError
from leyden.wire.calls import ModelCall, Patience

HTTP_HELD = 503

CONNECT_TIMEOUT_SECONDS = 10.0


class Library:
    """One HTTP library (`httpx` or `httpx2`): its original `send` functions and Leyden's clients made with it.

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
        self.async_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = weakref.WeakKeyDictionary()

    def options(self) -> dict[str, Any]:
        """Return what every client of ours is made with; deadlines bound the waiting, not the pool."""
        # Idle connections are dropped before common servers (5 s) drop them under our feet.
        limits = self.module.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=3)
        return {"trust_env": False, "follow_redirects": False, "limits": limits}

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
            if loop not in self.async_clients:
                self.async_clients[loop] = self.module.AsyncClient(**self.options())
            return self.async_clients[loop]

    def close(self) -> None:
        """Close the clients. One of a loop that is closed, or that another thread runs, is left to that loop."""
        with self.lock:
            client, self.client = self.client, None
            async_clients = list(self.async_clients.items())
            self.async_clients.clear()
        if client is not None:
            client.close()
        for loop, async_client in async_clients:
            if loop.is_running():
                asyncio.run_coroutine_threadsafe(async_client.aclose(), loop)
            elif not loop.is_closed():
                loop.run_until_complete(async_client.aclose())

    # ---- sending -----------------------------------------------------------------------------------------------

    def request(self, client: Any, call: ModelCall) -> Any:
        """Build the request of a routed call; it may last until the rollout's deadline."""
        call.check_deadline()
        left = call.seconds_left()
        connect = CONNECT_TIMEOUT_SECONDS if left is None else min(left, CONNECT_TIMEOUT_SECONDS)
        timeout = self.module.Timeout(left, connect=connect)
        return client.build_request("POST", call.url(), headers=call.headers(), content=call.content(), timeout=timeout)

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
                time.sleep(self.pause_after(error, original, call, patience))
                continue
            pause = self.pause_of(response, call, patience)
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
                await asyncio.sleep(self.pause_after(error, original, call, patience))
                continue
            pause = self.pause_of(response, call, patience)
            if pause is None:
                response.request = original
                return response
            await response.aclose()
            await asyncio.sleep(pause)

    def pause_after(self, error: Exception, original: Any, call: ModelCall, patience: Patience) -> float:
        """Return how long to wait before a failed request is sent again.

        Raises:
            DeadlineExceeded: it failed because the rollout has no time left.
            Exception: `error`, when repeating would not help.
        """
        if isinstance(error, self.module.TimeoutException):
            try:
                call.check_deadline()
            except DeadlineExceeded as late:
                raise late from error
        pause = patience.after_refusal() if isinstance(error, self.refused) else None
        if pause is None:
            if isinstance(error, self.module.RequestError):
                error.request = original
            raise error
        return pause

    def pause_of(self, response: Any, call: ModelCall, patience: Patience) -> float | None:
        """Return how long the gateway holds requests, or `None` when `response` is the answer.

        Raises:
            DeadlineExceeded: the hold outlasts the rollout.
        """
        retry_after = response.headers.get("retry-after")
        if response.status_code != HTTP_HELD or retry_after is None:
            return None
        # Until it is answered after all; a rollout that ends without it is not the agent's failure.
        call.blame(EngineError(f"the gateway did not answer role {call.role!r}: {HTTP_HELD}, new weights or no engine"))
        pause = patience.after_hold(retry_after)
        if pause is None and call.seconds_left() is not None:
            raise DeadlineExceeded(f"requests of role {call.role!r} were held until its rollout's deadline")
        return pause


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
                    self.saw(chunk)
                    yield chunk

        async def __aiter__(self) -> AsyncIterator[bytes]:
            with self.ending():
                async for chunk in self.inner:
                    self.saw(chunk)
                    yield chunk

        def saw(self, chunk: bytes) -> None:
            """Keep a chunk for the record, and stop at the deadline."""
            self.call.chunks.append(chunk)
            self.call.check_deadline()

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
