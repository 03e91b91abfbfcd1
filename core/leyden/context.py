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
from urllib.parse import quote

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
        "when_left",
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
        self.when_left: Callable[[], None] | None = None
        """Called when the rollout ends and this is still open: it may know better what became of it."""
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


@dataclass(slots=True, eq=False)
class MadeCall:
    """A model call of a rollout, and what its caller had called before."""

    span_id: str
    role: str
    before: MadeCall | None
    """The latest call in the context that made this one: tasks and threads inherit it, and do not give theirs back."""


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
        self.root_id: str | None = None
        """The root span, once the rollout has begun."""
        self.calls: list[MadeCall] = []
        """The model calls so far, in order."""
        self.parents: dict[str, str | None] = {}
        """Span -> the one around it, of all spans so far."""
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
            self.parents[span.span_id] = parent_id
            if kind is Kind.MODEL_CALL:
                self.spoken_roles[role] = self.spoken_roles.get(role, 0) + 1
                before = _latest_call.get()
                self.calls.append(MadeCall(span.span_id, role, before))
                _latest_call.set(self.calls[-1])
        return span

    def reassign(self, call: OpenSpan, role: str) -> None:
        """Let another role have made an open model call than its adapter thought."""
        with self._lock:
            self.spoken_roles[call.role] -= 1
            if not self.spoken_roles[call.role]:
                del self.spoken_roles[call.role]
            self.spoken_roles[role] = self.spoken_roles.get(role, 0) + 1
            call.role = role
            for made in self.calls:
                if made.span_id == call.span_id:
                    made.role = role

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
            if span.when_left is not None:
                span.when_left()
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
_latest_call: ContextVar[MadeCall | None] = ContextVar("leyden_latest_call", default=None)
_active: set[RolloutContext] = set()
_active_lock = threading.Lock()


def current() -> Frame | None:
    """Return who is calling, or `None` outside any rollout or role."""
    frame = _current.get()
    while frame is not None and frame.owner is not None and frame.owner.is_closed:
        frame = frame.outer
    return frame


def latest_call() -> MadeCall | None:
    """Return the latest model call made in this context, of whichever rollout."""
    return _latest_call.get()


def enter(frame: Frame | None) -> Token[Frame | None]:
    """Set the frame; pass the token to `leave`."""
    return _current.set(frame)


def leave(token: Token[Frame | None]) -> None:
    """Undo `enter`. A token from another context (a generator closed elsewhere) is ignored."""
    try:  # noqa: SIM105 - `suppress` takes longer than the reset, and answers come in thousands of pieces
        _current.reset(token)
    except ValueError:
        pass


def active_routing() -> Routing | None:
    """Return the routing of a rollout that runs in this process; those of one run differ only in their tokens."""
    with _active_lock:
        return next((rollout.routing for rollout in _active if rollout.routing is not None), None)


def active_rollout(rollout_id: str, attempt: str | None = None) -> RolloutContext | None:
    """Return the rollout of that name that runs in this process; a given `attempt` must be its own."""
    return _running(lambda rollout: rollout.rollout_id == rollout_id, attempt)


def rollout_with_token(token: str, attempt: str | None = None) -> RolloutContext | None:
    """Return the rollout that runs in this process and whose key at the gateway is `token`; likewise."""
    return _running(lambda rollout: rollout.routing is not None and rollout.routing.token == token, attempt)


def _running(is_meant: Callable[[RolloutContext], bool], attempt: str | None) -> RolloutContext | None:
    """Return the rollout that is meant; one that is closed may linger beside its next attempt."""
    with _active_lock:
        running = [rollout for rollout in _active if not rollout.is_closed and is_meant(rollout)]
    return next((rollout for rollout in running if attempt in (None, str(rollout.attempt))), None)


@contextlib.contextmanager
def rollout_scope(context: RolloutContext, name: str = "rollout") -> Iterator[OpenSpan]:
    """Run a rollout: open its root span and set the frame to role `main`."""
    root = context.open(Kind.ROLLOUT, name, MAIN_ROLE, None)
    context.root_id = root.span_id
    with _active_lock:
        _active.add(context)
    token = enter(Frame(rollout=context, role=MAIN_ROLE, span_id=root.span_id))
    _latest_call.set(None)
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
        if role is not None:
            span.context.declared_roles.add(role)
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


def declare_roles(*names: str) -> None:
    """Say which roles there are, also those that a rollout may leave silent; does nothing outside a rollout.

    Adapters do it for their frameworks. Plain code does it where a trained role speaks only sometimes: to Leyden a
    role that never spoke and a misspelt one are the same.
    """
    frame = current()
    if frame is not None and frame.rollout is not None:
        frame.rollout.declared_roles.update(names)


def tool(name: str, **attributes: object) -> contextlib.AbstractContextManager[OpenSpan | None]:
    """Record a tool that the agent's own code runs: `with leyden.tool("search", query=query): ...`."""
    return scope(Kind.TOOL, name, role=None, **{"gen_ai.tool.name": name, **attributes})


def headers(role: str | None = None) -> dict[str, str]:
    """Return request headers that say who calls, for work that is done elsewhere.

    A queue worker that serves every rollout sends them with its request, and the call belongs to the rollout that
    asked for it, whatever the worker's own context is. Outside a rollout only `role` is named, if at all.
    """
    frame = current() or Frame()
    speaker = role or (frame.role if frame != Frame() else None)
    named: dict[str, str | None] = {"role": speaker}
    if frame.rollout is not None:
        rollout = frame.rollout
        named |= {"rollout": rollout.rollout_id, "attempt": str(rollout.attempt), "parent": frame.span_id}
    return {f"x-leyden-{name}": quote(value, safe="") for name, value in named.items() if value}


def status_of(error: BaseException) -> Status:
    """Return the span status of an exception: cancelled for cancellation, else error."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return Status.CANCELLED if names & {"CancelledError", "GeneratorExit", "KeyboardInterrupt"} else Status.ERROR
