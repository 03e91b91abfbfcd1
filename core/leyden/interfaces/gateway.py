"""The door through which agents reach the engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from leyden.interfaces.engine import Engine
from leyden.roles import Route, Sampling
from leyden.spans import Record


@dataclass(frozen=True, kw_only=True)
class Access:
    """What one attempt at a rollout may do at the gateway."""

    rollout_id: str
    attempt: int
    models: Mapping[str, Sampling]
    """Policy name -> the sampling that replaces the agent's own values."""
    routes: Sequence[Route] = ()
    """Role -> policy for callers that name a role in the URL instead of a model."""
    timeout_seconds: float | None = None


class Gateway(Protocol):
    """The OpenAI-compatible door of the engine; records a `Completion` for every call of an admitted rollout."""

    base_url: str
    """`http://127.0.0.1:PORT/v1`, known after `start`."""

    async def start(self, engine: Engine, record: Callable[[Sequence[Record]], Awaitable[None]]) -> None: ...

    def admit(self, access: Access) -> str:
        """Let a rollout in; return its bearer token."""
        ...

    async def revoke(self, rollout_id: str) -> None:
        """End a rollout's access; returns once every completion of it has been handed to `record`."""
        ...

    async def hold(self) -> None:
        """Keep new requests waiting; returns when none is in flight."""
        ...

    def release(self) -> None:
        """Let held requests go on."""
        ...

    async def stop(self) -> None: ...
