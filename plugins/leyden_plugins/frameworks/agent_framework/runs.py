"""An agent, a tool or a workflow at work: its span, and the frame that holds while it is driven.

One idea: `run()` of this framework is synchronous and returns something to await or to read; `observed` stands in
for that result and holds the frame only while it is awaited or pulled.
One trap: a stream finishes inside its last pull, where context providers may call a model. So the observer is a
stream around the framework's own, whose every pull, the finishing one too, happens inside the frame.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from agent_framework import MiddlewareTermination, ResponseStream
from agent_framework.exceptions import UserInputRequiredException

from leyden import context, wire
from leyden.activity import Activity, advancing
from leyden.spans import Kind, Status

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

CONTROL_FLOW = (MiddlewareTermination, UserInputRequiredException)
"""Exceptions by which the framework says that it stops here, or waits for the user; no errors."""


class Run(Activity):
    """An activity that knows whose it is, so that an agent's own layers do not open it twice."""

    def __init__(
        self,
        subject: object,
        kind: Kind,
        name: str,
        *,
        role: str | None = None,
        give_back: Callable[[], None] | None = None,
        **attributes: object,
    ) -> None:
        """Start it.

        Args:
            subject: the agent, tool or workflow.
            kind: of its span.
            name: of its span.
            role: who speaks inside; `None` keeps the speaker around it.
            give_back: called when it ends.
            attributes: of its span.
        """
        super().__init__(kind, name, role=role, parent=None, **attributes)
        self.subject = subject
        self.give_back = give_back

    def close(self, status: Status = Status.OK, error: str | None = None, **attributes: object) -> None:
        """End it; a second end is ignored."""
        super().close(status, error, **attributes)
        if self.give_back is not None:
            self.give_back()

    def fail(self, error: BaseException, **attributes: object) -> None:
        """End it with what it raised, which may be ordinary control flow."""
        if isinstance(error, CONTROL_FLOW):
            self.close(Status.OK, None, **{"agent_framework.control_flow": type(error).__name__, **attributes})
        else:
            super().fail(error, **attributes)

    def drop(self) -> None:
        """End it because its reader left."""
        self.fail(GeneratorExit("the reader left before the end"))

    @contextlib.contextmanager
    def pulling(self) -> Iterator[None]:
        """Hold its frame for one pull of a stream, and end it with the stream."""
        with self.entered():
            try:
                yield
            except StopAsyncIteration:
                self.close()
                raise
            except BaseException as error:
                self.fail(error)
                raise


class ObservedStream(ResponseStream):  # type: ignore[misc, type-arg, unused-ignore]  # untyped where not installed
    """A stream around the framework's own. It holds no generator, so that dropping it drops the inner one at once."""

    def __init__(self, stream: Any, run: Run) -> None:
        super().__init__(stream, finalizer=lambda _: stream.get_final_response())
        self.observed = stream
        self.run = run
        self.with_pull_context_manager(run.pulling)
        self.with_cleanup_hook(run.drop)

    def __await__(self) -> Any:
        """Prepare the inner stream, as awaiting it would."""

        async def prepared() -> ObservedStream:
            with self.run.pulling():
                await self.observed
            return self

        return prepared().__await__()

    async def close(self, *reason: Any) -> None:
        """Close the inner stream too when it was never pulled, which may be when the framework calls the model."""
        try:
            with self.run.entered():
                await self.observed.close(*reason)
        finally:
            await super().close(*reason)


def is_watching() -> bool:
    """Say whether anybody wants to know: a rollout runs here, or roles are routed."""
    return context.current() is not None or wire.default_routing() is not None


def is_running(subject: object) -> bool:
    """Say whether the innermost run here is that of `subject`: a layer of it is called, not a run of its own."""
    frame = context.current()
    return frame is not None and isinstance(frame.owner, Run) and frame.owner.subject is subject


def started(run: Run, call: Callable[[], Any]) -> Any:
    """Return the result of `call`, observed."""
    try:
        with run.entered():
            result = call()
    except BaseException as error:
        run.fail(error)
        raise
    return observed(result, run)


def observed(result: Any, run: Run) -> Any:
    """Return what stands in for the result of `run()`: a stream, an async iterator or something to await."""
    if isinstance(result, ResponseStream):
        watched: Any = ObservedStream(result, run)
    elif hasattr(result, "__aiter__"):
        watched = advancing(aiter(result), run)
    elif inspect.isawaitable(result):
        watched = awaited(result, run)
    else:
        run.close()
        return result
    # Without `close`, and when a task is cancelled before its first step, nobody else says that it is over.
    weakref.finalize(watched, run.drop).atexit = False
    return watched


async def awaited(result: Awaitable[Result], run: Run) -> Result:
    """Await `result` inside `run`."""
    with run.running():
        return await result


def tool_run(tool: Any, arguments: object, call_id: object) -> Run:
    """Start a tool."""
    name = str(tool.name)
    attributes = {
        "gen_ai.tool.name": name,
        "gen_ai.tool.call.id": None if call_id is None else str(call_id),
        "gen_ai.tool.call.arguments": plain(arguments),
    }
    return Run(tool, Kind.TOOL, name, role=None, give_back=None, **attributes)


def end_tool(run: Run, result: object) -> None:
    """Record what a tool returned."""
    if run.span is not None:
        run.close(Status.OK, None, **{"gen_ai.tool.call.result": text_of(result)})


def text_of(result: object) -> object:
    """Return a tool's result as text where it is, else as JSON values."""
    items = result if isinstance(result, list) else [result]
    texts = [getattr(item, "text", None) for item in items]
    if items and all(isinstance(text, str) for text in texts):
        return "".join(texts)  # type: ignore[arg-type]  # checked above
    return plain([item.to_dict() if hasattr(item, "to_dict") else item for item in items])


def plain(value: object) -> object:
    """Return a copy of JSON values only; what cannot be one becomes its text."""
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    try:
        return json.loads(json.dumps(value, default=str))
    except (TypeError, ValueError):
        return repr(value)
