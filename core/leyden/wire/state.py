"""What is installed in this process; there is one, because what it patches is the process's."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

from leyden.context import Frame
from leyden.patching import Patches
from leyden.roles import Routing
from leyden.spans import Mode


class Library(Protocol):
    """One patched HTTP library."""

    def close(self) -> None:
        """Close Leyden's clients made with it."""
        ...

    def forget(self) -> None:
        """Drop the clients of the process that this one was forked from, and locks that its threads may hold."""
        ...


class Wire:
    """What is patched, and what holds for all requests of the process."""

    def __init__(self) -> None:
        self.is_installed = False
        self.patches = Patches()
        self.libraries: dict[str, Library] = {}
        self.lock = threading.Lock()
        self.default_routing: Routing | None = None
        """Of a deployed app: used where no rollout brings its own."""
        self.lost_calls = 0


WIRE = Wire()

_below: ContextVar[bool] = ContextVar("leyden_below_the_wire", default=False)


@contextlib.contextmanager
def below_the_wire() -> Iterator[None]:
    """Send a request that has been looked at: a redirect, or the library that carries it, is no second call."""
    token = _below.set(True)
    try:
        yield
    finally:
        _below.reset(token)


def is_below_the_wire() -> bool:
    """Say whether the request being sent is part of one that was looked at."""
    return _below.get()


def set_default_routing(routing: Routing | None) -> None:
    """Route calls made outside any rollout: a deployed app."""
    WIRE.default_routing = routing


def default_routing() -> Routing | None:
    """Return the routing of a deployed app."""
    return WIRE.default_routing


def lost_calls() -> int:
    """Return how many model calls were refused here because their rollout was unknown."""
    return WIRE.lost_calls


def is_routed(frame: Frame) -> bool:
    """Say whether a model call made in `frame` goes to the gateway."""
    routing = routing_of(frame)
    return routing is not None and routing.route_of(frame.role) is not None


def routing_of(frame: Frame | None) -> Routing | None:
    """Return the routing of the frame's rollout, else the deployed app's; one that is only recorded has none."""
    if frame is not None and frame.rollout is not None and frame.rollout.mode is not Mode.RECORDED:
        return frame.rollout.routing
    return WIRE.default_routing
