"""Agents, teams and tool calls at work, and which rollout they belong to.

One idea: a `Work` knows the object that does it, so that a method which calls another of the same object, or a class
hook below an instance hook, records nothing twice. One trap: AutoGen's agents and teams remember every conversation,
so an agent belongs to a rollout until that rollout ends, not just for the length of a call.

This module imports nothing of AutoGen.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from leyden import context, wire
from leyden.activity import Activity, Exclusive
from leyden.context import RolloutContext
from leyden.spans import Kind

Active = Callable[[], bool]
"""Says whether a hook has anything to do; otherwise it calls the original and nothing else."""


ENDED = object()
"""What a step returns after the last item."""


class Work(Activity):
    """What one agent, team or tool call does, from its start to its end."""

    def __init__(
        self, subject: object, kind: Kind, name: str, *, role: str | None = None, **attributes: object
    ) -> None:
        """Start it, in the frame that holds now."""
        super().__init__(kind, name, role=role, parent=None, **attributes)
        self.subject = subject
        self.handoffs: set[str] = set()
        """Ids of handoff messages that something inside has recorded."""

    async def step(self, items: AsyncIterator[Any]) -> Any:
        """Return the next item inside this work, or `ENDED`."""
        token = context.enter(self.frame)
        try:
            return await items.__anext__()
        except StopAsyncIteration:
            return ENDED
        finally:
            context.leave(token)

    def answered(self) -> None:
        """End its span, because readers leave when they have the answer; its frame holds until it ends."""
        if self.span is not None:
            self.span.close()

    def around(self) -> Work | None:
        """Return the work that this one was started in."""
        owner = self.outer.owner if self.outer else None
        return owner if isinstance(owner, Work) else None


def is_watched() -> bool:
    """Say whether a rollout or a deployed app asks who speaks."""
    return context.current() is not None or wire.default_routing() is not None


def is_at_work(subject: object) -> bool:
    """Say whether the innermost work here is that of `subject`."""
    frame = context.current()
    owner = frame.owner if frame else None
    return isinstance(owner, Work) and owner.subject is subject


class Claims:
    """Which rollout each agent and team belongs to."""

    def __init__(self) -> None:
        self.exclusive = Exclusive()
        self.owners: weakref.WeakKeyDictionary[object, weakref.ref[RolloutContext]] = weakref.WeakKeyDictionary()
        self.lock = threading.Lock()

    def take(self, subjects: Iterable[object]) -> bool:
        """Note that the current rollout uses these; say whether it had not used one of them before.

        Raises:
            ConcurrentUseError: another rollout that still runs has used one; names the cure.
        """
        frame = context.current()
        rollout = frame.rollout if frame else None
        if rollout is None or rollout.is_closed:
            return False
        is_new = False
        for subject in subjects:
            if type(subject).__hash__ is None:
                is_new = True
                continue  # a dataclass cannot be told from its equals
            with self.lock:
                owner = self.owners.get(subject)
                if owner is None or owner() is not rollout:
                    # Never given back: it remembers this rollout's conversation, whoever calls it next.
                    self.exclusive.take(subject, str(getattr(subject, "name", subject)))
                    self.owners[subject] = weakref.ref(rollout)
                    is_new = True
        return is_new


CLAIMS = Claims()
"""Shared by both forms."""
