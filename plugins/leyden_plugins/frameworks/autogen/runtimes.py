"""Runtimes that several teams share: a message is handled as whoever sent it.

One idea: a message's id travels with it, so an id that is more than a string brings the sender's frame along. One trap:
a runtime's loop keeps the context in which it was started, which may be that of no rollout or of another. A team's own
runtime is started by each run of it and needs nothing, so only a shared one is hooked, while teams run on it.
"""

from __future__ import annotations

import contextlib
import uuid
import weakref
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from autogen_core import SingleThreadedAgentRuntime

from leyden import context
from leyden.context import Frame

Method = Callable[..., Any]


class FramedId(str):
    """The id of a message, which remembers who sent it."""

    frame: Frame | None = None


def observed_sending(send: Method) -> Method:
    """Return a runtime's `send_message` or `publish_message`, which notes who sends."""

    async def observe(runtime: Any, *args: Any, message_id: str | None = None, **options: Any) -> Any:
        message_id = FramedId(message_id or uuid.uuid4())
        message_id.frame = context.current()
        return await send(runtime, *args, message_id=message_id, **options)

    return observe


def observed_processing(process: Method) -> Method:
    """Return a runtime's `_process_send` or `_process_publish`, which runs as the sender; it has a task of its own."""

    async def observe(runtime: Any, message_envelope: Any) -> Any:
        if isinstance(message_envelope.message_id, FramedId):
            context.enter(message_envelope.message_id.frame)
        return await process(runtime, message_envelope)

    return observe


RUNTIME_METHODS = {
    "send_message": observed_sending,
    "publish_message": observed_sending,
    "_process_send": observed_processing,
    "_process_publish": observed_processing,
}

_conversations: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""Shared runtime -> how many conversations run on it now."""


@contextlib.contextmanager
def carrying_senders(team: Any) -> Iterator[None]:
    """Hook the runtime that `team` shares for the length of the block; nothing where it has its own."""
    runtime = team._runtime
    if team._embedded_runtime or not isinstance(runtime, SingleThreadedAgentRuntime):
        yield
        return
    running = _conversations.get(runtime, 0)
    _conversations[runtime] = running + 1
    if not running:
        for name, observed in RUNTIME_METHODS.items():
            setattr(runtime, name, MethodType(observed(getattr(type(runtime), name)), runtime))
    try:
        yield
    finally:
        _conversations[runtime] -= 1
        if not _conversations[runtime]:
            for name in RUNTIME_METHODS:
                vars(runtime).pop(name, None)
