"""What CrewAI is doing, from a start event to its end event.

One idea: scopes hold on to each other through their frames, so an end event finds its start by walking outwards from
the frame that holds. CrewAI's own pairing is not used: an end event that it emits twice (`llm_call_failed`) closes a
stranger there.
One trap: what is cancelled has no end event. Whoever sees the exception calls `unwind`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping

from leyden import context
from leyden.activity import Activity
from leyden.context import Frame
from leyden.spans import Kind, Status

Key = int | str
"""Names the work that a start and an end event are about: the id of the object that emits them, or of a call."""


class Scope(Activity):
    """Work with a span: a flow, a crew, an agent, a tool."""

    def __init__(
        self,
        started: str,
        key: Key,
        kind: Kind,
        name: str,
        *,
        role: str | None = None,
        attributes: Mapping[str, object] | None = None,
    ) -> None:
        """Start it and make its frame hold."""
        super().__init__(kind, name, role=role, parent=None, **(attributes or {}))
        self.started = started
        self.key = key
        self.give_back: Callable[[], None] | None = None
        """Lets another rollout use the crew or agent."""
        self.call_ids: set[str] = set()
        """Of an agent: the model's tool calls that have a span."""
        self.lock = threading.Lock()
        self.enter()

    def close(self, status: Status = Status.OK, error: str | None = None, **attributes: object) -> None:
        """End it; a second end is ignored."""
        super().close(status, error, **attributes)
        if self.give_back is not None:
            self.give_back()


class Speaking:
    """A model call made on behalf of an agent that is not at work; the wire makes its span."""

    def __init__(self, started: str, key: Key, role: str) -> None:
        """Start it and make its frame hold."""
        self.started = started
        self.key = key
        self.is_closed = False
        outer = context.current()
        around = outer or Frame()
        self.frame = Frame(around.rollout, role, around.span_id, owner=self, outer=outer)
        context.enter(self.frame)

    def close(self, status: Status = Status.OK, error: str | None = None) -> None:
        """End it."""
        self.is_closed = True

    def fail(self, error: BaseException) -> None:
        """End it."""
        self.is_closed = True


def around() -> Iterator[Scope | Speaking]:
    """Yield the open scopes that hold here, innermost first."""
    frame = context.current()
    while frame is not None:
        if isinstance(frame.owner, (Scope, Speaking)) and not frame.owner.is_closed:
            yield frame.owner
        frame = frame.outer


def end(started: str, key: Key, status: Status, error: str | None, **attributes: object) -> None:
    """Close a scope, and before it those inside that never got their own end; one that is not open is ignored."""
    scopes = list(around())
    found = next((scope for scope in scopes if (scope.started, scope.key) == (started, key)), None)
    if found is None:
        return
    for scope in scopes[: scopes.index(found)]:
        scope.close(Status.ABANDONED, "its work ended without saying so")
    if isinstance(found, Scope):
        found.close(status, error, **attributes)
    else:
        found.close()


def unwind(before: Frame | None, error: BaseException) -> None:
    """Close what was opened here since `before` held and has not ended: an exception passed through it."""
    frame = context.current()
    while frame is not None and frame is not before:
        if isinstance(frame.owner, (Scope, Speaking)):
            frame.owner.fail(error)
        frame = frame.outer
