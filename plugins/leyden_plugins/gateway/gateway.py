"""The trainer's door to the engine: admits rollouts, records every call, holds calls while weights change."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from leyden.errors import RolloutError
from leyden.interfaces import Access, Engine
from leyden.spans import Record
from leyden_plugins.gateway.access import AccessTable, Admission
from leyden_plugins.gateway.app import App, Limits
from leyden_plugins.gateway.call import Call
from leyden_plugins.gateway.dialects import Dialect
from leyden_plugins.gateway.dialects.spoken import DIALECTS
from leyden_plugins.gateway.recorder import Recorder
from leyden_plugins.gateway.refusal import Refusal
from leyden_plugins.gateway.server import HOST, BackgroundServer

STOP_SECONDS = 5.0
"""How long a stopped call may take to free its place in the engine before it is recorded without waiting."""


class HttpGateway:
    """Implements `leyden.interfaces.Gateway` over HTTP. Lives on the loop that calls `start`."""

    def __init__(
        self,
        *,
        dialects: Iterable[Dialect] = (),
        limits: Limits | None = None,
        port: int = 0,
        exact_continuation: bool = False,
    ) -> None:
        """Keep the options; `start` opens the door.

        Args:
            dialects: all that come with the gateway by default.
            limits: what it takes on.
            port: 0 takes a free one.
            exact_continuation: a request that extends an answered call of its rollout and role goes on from the
                recorded tokens; only the messages that were added are rendered.
        """
        self.base_url = ""
        """`http://127.0.0.1:PORT/v1`, known after `start`."""
        self._dialects = tuple(dialects) or DIALECTS
        self._limits = limits or Limits()
        self._port = port
        self._exact_continuation = exact_continuation
        self._access = AccessTable()
        self._server = BackgroundServer()
        self._app: App | None = None
        self._recorder: Recorder | None = None

    async def start(self, engine: Engine, record: Callable[[Sequence[Record]], Awaitable[None]]) -> None:
        """Serve `engine`; every call of an admitted rollout is handed to `record`.

        Raises:
            ConfigurationError: exact continuation is asked of an engine that cannot.
        """
        self._recorder = Recorder(record)
        self._app = App(
            engine=engine,
            access=self._access,
            dialects=self._dialects,
            record=self._recorder.add,
            limits=self._limits,
            exact_continuation=self._exact_continuation,
        )
        await self._server.start(self._app, self._port)
        self.base_url = f"http://{HOST}:{self._server.port}/v1"

    def admit(self, access: Access) -> str:
        """Let an attempt in; return its bearer token."""
        return self._access.admit(Admission(access))

    async def revoke(self, rollout_id: str) -> None:
        """End a rollout's access, cut its calls short, and return once all its completions were recorded."""
        self._access.revoke(rollout_id)
        app, recorder = self._running()
        over = Refusal(401, "the rollout is over", code="invalid_api_key")
        await self._cut([call for call in app.calls if call.caller.access.rollout_id == rollout_id], over)
        await recorder.flush()

    async def hold(self) -> None:
        """Keep new calls waiting; return when none is being generated."""
        await self._running()[0].gate.hold()

    def release(self) -> None:
        """Let held calls go on."""
        self._running()[0].gate.release()

    async def stop(self) -> None:
        """Cut every call short, record it, and close the server. Idempotent."""
        if self._app is None or self._recorder is None:
            return
        await self._cut(list(self._app.calls), Refusal(503, "the gateway is shutting down", code="stopped"))
        await self._server.stop()
        await self._recorder.flush()
        self._app = None

    async def _cut(self, calls: Sequence[Call], reason: Refusal) -> None:
        app = self._running()[0]
        for call in calls:
            call.stop(reason)
        if calls:
            await asyncio.wait([call.task for call in calls], timeout=STOP_SECONDS)
        for call in calls:
            app.conclude(call)

    def _running(self) -> tuple[App, Recorder]:
        if self._app is None or self._recorder is None:
            raise RolloutError("the gateway is not running; call start first")
        return self._app, self._recorder
