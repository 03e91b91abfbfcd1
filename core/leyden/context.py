"""Who is calling: one ContextVar with the rollout, the role and the parent span.

One idea: a `Frame` is an immutable value that adapters set while a named agent or node runs; whatever starts
inside reads it. It is right under asyncio tasks, `asyncio.to_thread` and copied contexts.
One trap: a frame is never held across the `yield` of an async generator (the consumer would see it);
adapters set it only while the generator is being advanced.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Protocol

from leyden.roles import MAIN_ROLE, Routing
from leyden.spans import Kind, Mode, Record, Span, Status, new_id, now_ns

Sink = Callable[[Record], None]
"""Takes a record; must not block or raise."""


class OpenSpan:
    """A span that has started and not ended. Closing twice keeps the first end."""

    __slots__ = (
        "_closed",
        "attributes",
        "context",
        "kind",
        "name",
        "parent_id",
        "role",
        "span_id",
        "start_ns",
    )

    def __init__(self, context: RolloutContext, kind: Kind, name: str, role: str, parent_id: str | None) -> None:
        self.context = context
        self.kind = kind
        self.name = name
        self.role = role
        self.parent_id = parent_id
        self.span_id = new_id()
        self.start_ns = now_ns()
        self.attributes: dict[str, object] = {}
        self._closed = False

    @property
    def is_closed(self) -> bool:
        return self._closed

    def close(self, status: Status = Status.OK, error: str | None = None, **attributes: object) -> None:
        """Record the span; does nothing when it is closed already."""
        if not self.context.forget(self):
            return
        self._closed = True
        self.attributes.update(attributes)
        self.context.record(
            Span(
                span_id=self.span_id,
                parent_id=self.parent_id,
                rollout_id=self.context.rollout_id,
                attempt=self.context.attempt,
                kind=self.kind,
                name=self.name,
                role=self.role,
                start_ns=self.start_ns,
                end_ns=now_ns(),
                status=status,
                error=error,
                attributes=self.attributes,
            )
        )


class RolloutContext:
    """One attempt at a rollout, in the process where the agent runs. Thread-safe."""

    def __init__(
        self,
        *,
        rollout_id: str,
        attempt: int,
        mode: Mode,
        sink: Sink,
        routing: Routing | None = None,
        timeout_seconds: float | None = None,
    ) -> None:
        self.rollout_id = rollout_id
        self.attempt = attempt
        self.mode = mode
        self.routing = routing
        self.deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        """`time.monotonic()` after which no request may start; `None` for no limit."""
        self.declared_roles: set[str] = set()
        """Roles the adapters know of, silent or not."""
        self.spoken_roles: dict[str, int] = {}
        """Role -> model calls."""
        self.infrastructure_error: BaseException | None = None
        """Set by the wire when the rollout must not count (lost context, gateway unreachable)."""
        self.is_closed = False
        self._sink = sink
        self._open: dict[str, OpenSpan] = {}
        self._lock = threading.Lock()

    def record(self, record: Record) -> None:
        """Hand a record to the sink."""
        self._sink(record)

    def open(self, kind: Kind, name: str, role: str, parent_id: str | None) -> OpenSpan:
        """Start a span."""
        span = OpenSpan(self, kind, name, role, parent_id)
        with self._lock:
            self._open[span.span_id] = span
            if kind is Kind.MODEL_CALL:
                self.spoken_roles[role] = self.spoken_roles.get(role, 0) + 1
        return span

    def forget(self, span: OpenSpan) -> bool:
        """Take `span` from the open ones; False when it was closed before."""
        with self._lock:
            return self._open.pop(span.span_id, None) is not None

    def close(self) -> int:
        """Close what is still open as abandoned; return how many spans that were."""
        self.is_closed = True
        with self._lock:
            left = sorted(self._open.values(), key=lambda span: span.start_ns, reverse=True)
        for span in left:
            span.close(Status.ABANDONED, "still open when the rollout ended")
        return len(left)

    def seconds_left(self) -> float | None:
        """Return the seconds until the deadline, or `None` without one."""
        return None if self.deadline is None else self.deadline - time.monotonic()


class Owner(Protocol):
    """What a frame lives as long as: an open span, or an adapter's own record of a run."""

    @property
    def is_closed(self) -> bool: ...


@dataclass(frozen=True)
class Frame:
    """Who is calling right now."""

    rollout: RolloutContext | None = None
    """`None` in a deployed app, where only roles matter."""
    role: str = MAIN_ROLE
    span_id: str | None = None
    """Parent of whatever starts now."""
    call: OpenSpan | None = None
    """The open model-call span whose HTTP request comes next, when an adapter made one."""
    owner: Owner | None = None
    """For adapters whose end callbacks run in another context and cannot `leave`: once the owner is closed the
    frame is stale, and `outer` holds again."""
    outer: Frame | None = None


_current: ContextVar[Frame | None] = ContextVar("leyden_frame", default=None)
_active: set[RolloutContext] = set()
_active_lock = threading.Lock()


def current() -> Frame | None:
    """Return who is calling, or `None` outside any rollout or role."""
    frame = _current.get()
    while frame is not None and frame.owner is not None and frame.owner.is_closed:
        frame = frame.outer
    return frame


def enter(frame: Frame | None) -> Token[Frame | None]:
    """Set the frame; pass the token to `leave`."""
    return _current.set(frame)


def leave(token: Token[Frame | None]) -> None:
    """Undo `enter`. A token from another context (a generator closed elsewhere) is ignored."""
    with contextlib.suppress(ValueError):
        _current.reset(token)


def active_routing() -> Routing | None:
    """Return the routing of a rollout that runs in this process; those of one run differ only in their tokens."""
    with _active_lock:
        return next((rollout.routing for rollout in _active if rollout.routing is not None), None)


@contextlib.contextmanager
def rollout_scope(context: RolloutContext, name: str = "rollout") -> Iterator[OpenSpan]:
    """Run a rollout: open its root span and set the frame to role `main`."""
    root = context.open(Kind.ROLLOUT, name, MAIN_ROLE, None)
    with _active_lock:
        _active.add(context)
    token = enter(Frame(rollout=context, role=MAIN_ROLE, span_id=root.span_id))
    try:
        yield root
    except BaseException as error:
        root.close(status_of(error), f"{type(error).__name__}: {error}")
        raise
    finally:
        leave(token)
        with _active_lock:
            _active.discard(context)
        root.close()
        context.close()


@contextlib.contextmanager
def scope(kind: Kind, name: str, *, role: str | None = None, **attributes: object) -> Iterator[OpenSpan | None]:
    """Open a span below the current one for the length of the block; `role` also changes who speaks.

    Without a rollout (a deployed app) no span is made and only the role is set.
    """
    frame = current() or Frame()
    speaker = role or frame.role
    span = frame.rollout.open(kind, name, speaker, frame.span_id) if frame.rollout else None
    if span:
        span.attributes.update(attributes)
    parent = span.span_id if span else frame.span_id
    token = enter(Frame(rollout=frame.rollout, role=speaker, span_id=parent))
    try:
        yield span
    except BaseException as error:
        if span:
            span.close(status_of(error), f"{type(error).__name__}: {error}")
        raise
    finally:
        leave(token)
        if span:
            span.close()


def role(name: str) -> contextlib.AbstractContextManager[OpenSpan | None]:
    """Name who speaks: `with leyden.role("planner"): client.chat.completions.create(...)`."""
    return scope(Kind.AGENT, name, role=name)


def status_of(error: BaseException) -> Status:
    """Return the span status of an exception: cancelled for cancellation, else error."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return Status.CANCELLED if names & {"CancelledError", "GeneratorExit", "KeyboardInterrupt"} else Status.ERROR
