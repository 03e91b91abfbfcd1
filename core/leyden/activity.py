"""What framework adapters record: agents and tools that start in one place and end in another.

One idea: an `Activity` owns its frame, so code that can only say "it ended" (an event handler, another thread, a
copied context) needs no token to leave it: once closed, its frame is stale and the one around it holds again.
One trap: a frame is never held across the `yield` of an async generator; `advancing` sets it for each step only.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from typing import ParamSpec, TypeVar

from leyden import context
from leyden.context import Frame, OpenSpan, RolloutContext, status_of
from leyden.errors import ConcurrentUseError, DeadlineExceeded
from leyden.spans import Kind, Status

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Parameters = ParamSpec("Parameters")


class Activity:
    """An agent or a tool at work. Without a rollout (a deployed app) it has no span and only names who speaks."""

    frame: Frame
    """Who calls inside it."""
    is_closed: bool

    def __init__(
        self,
        kind: Kind,
        name: str,
        *,
        role: str | None = None,
        parent: Activity | None = None,
        **attributes: object,
    ) -> None:
        """Start it.

        Args:
            kind: of its span.
            name: of its span.
            role: who speaks inside; `None` keeps the speaker around it. A new one is declared to the rollout.
            parent: what it belongs to where the context does not tell (work started in another task or thread);
                `None` takes the frame that holds now.
            attributes: of its span.
        """
        self.outer = context.current()
        around = self.outer if parent is None or parent.is_closed else parent.frame
        around = around or Frame()
        self.name = name
        self.role = role or around.role
        self.rollout = around.rollout
        self.is_closed = False
        self.span: OpenSpan | None = None
        if self.rollout is not None and not self.rollout.is_closed:
            self.span = self.rollout.open(kind, name, self.role, around.span_id)
            self.span.attributes.update(attributes)
            if role is not None:
                self.rollout.declared_roles.add(role)
        span_id = self.span.span_id if self.span else around.span_id
        self.frame = Frame(self.rollout, self.role, span_id, owner=self, outer=self.outer)

    def enter(self) -> None:
        """Make its frame hold from here on in this context, until it is closed."""
        context.enter(self.frame)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Hold its frame for the length of the block."""
        token = context.enter(self.frame)
        try:
            yield
        finally:
            context.leave(token)

    def close(self, status: Status = Status.OK, error: str | None = None, **attributes: object) -> None:
        """End it; a second end is ignored."""
        if self.is_closed:
            return
        self.is_closed = True
        if self.span is not None:
            self.span.close(status, error, **attributes)

    def fail(self, error: BaseException, **attributes: object) -> None:
        """End it with what it raised; a deadline or a reader that left makes it interrupted."""
        cut = isinstance(error, (DeadlineExceeded, GeneratorExit))
        self.close(Status.INTERRUPTED if cut else status_of(error), f"{type(error).__name__}: {error}", **attributes)

    @contextlib.contextmanager
    def running(self) -> Iterator[Activity]:
        """Hold its frame for the length of the block and end it after."""
        with self.entered():
            try:
                yield self
            except BaseException as error:
                self.fail(error)
                raise
        self.close()


async def advancing(items: AsyncIterator[Item], activity: Activity) -> AsyncGenerator[Item, None]:
    """Yield the items of an async iterator, inside `activity` while it is advanced, and end the activity with it."""
    try:
        while True:
            token = context.enter(activity.frame)  # by hand: answers come in thousands of pieces
            try:
                item = await items.__anext__()
            except StopAsyncIteration:
                break
            finally:
                context.leave(token)
            yield item
    except BaseException as error:
        try:
            with activity.entered():
                await close_items(items)
        finally:
            activity.fail(error)
        raise
    activity.close()


async def close_items(items: AsyncIterator[object]) -> None:
    """Close an async iterator that can be closed; what that raises must not hide why it is closed."""
    close = getattr(items, "aclose", None)
    try:
        if close is not None:
            await close()
    except Exception:
        logger.exception("a stream could not be closed")


def stepping(items: Iterator[Item], activity: Activity) -> Generator[Item, None, None]:
    """Yield the items of an iterator, inside `activity` while it is advanced, and end the activity with it."""
    try:
        while True:
            with activity.entered():
                try:
                    item = next(items)
                except StopIteration:
                    break
            yield item
    except BaseException as error:
        with activity.entered():
            close = getattr(items, "close", None)
            try:
                if close is not None:
                    close()
            except Exception:
                logger.exception("a stream could not be closed")
        activity.fail(error)
        raise
    activity.close()


def handoff(target: str, *, source: Activity | None = None) -> None:
    """Record that control passes from whoever speaks now (or from `source`) to the role `target`."""
    Activity(Kind.HANDOFF, f"handoff to {target}", parent=source, **{"leyden.handoff.to": target}).close()


def unbroken(record: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Make an observer that logs its own failures: recording never breaks the user's agent."""

    @functools.wraps(record)
    def observe(*args: Parameters.args, **options: Parameters.kwargs) -> None:
        try:
            record(*args, **options)
        except Exception:
            logger.exception("an event could not be recorded")

    return observe


class Exclusive:
    """Agents with a memory of their own: one that serves two rollouts at once would mix them."""

    def __init__(self) -> None:
        self._users: dict[int, list[RolloutContext]] = {}
        """By identity: agents may be equal, or have no hash."""
        self._lock = threading.Lock()

    def take(self, agent: object, name: str) -> Callable[[], None]:
        """Note that the current rollout uses `agent`; return what gives it back, which may be called twice.

        Raises:
            ConcurrentUseError: another rollout uses it now; names the cure.
        """
        frame = context.current()
        rollout = frame.rollout if frame else None
        if rollout is None:
            return lambda: None
        with self._lock:
            if id(agent) not in self._users:
                weakref.finalize(agent, self._users.pop, id(agent), None).atexit = False
            users = self._users.setdefault(id(agent), [])
            users[:] = [user for user in users if not user.is_closed]
            other = next((user for user in users if user is not rollout and not user.is_closed), None)
            if other is None:
                users.append(rollout)
        if other is not None:
            error = ConcurrentUseError(
                f"{name!r} runs in rollout {other.rollout_id!r} and was called in rollout {rollout.rollout_id!r} at "
                "the same time; it remembers its conversation, so both would read each other's. Build one for each "
                "rollout: Trainer(leyden.per_rollout(build_agent), ...)"
            )
            # Frameworks swallow what a model or agent raises; the rollout must not count whatever they do.
            rollout.infrastructure_error = error
            raise error
        left = [rollout]

        def give_back() -> None:
            with self._lock:
                if left and left[0] in users:
                    users.remove(left.pop())

        return give_back
