"""The automatic form: listen where CrewAI publishes its events, and see what passes its entry points as an exception.

Inside rollouts, and only there, CrewAI's own telemetry is off: thousands of rollouts are not usage, and nothing but
model calls may leave a rollout. Tracing that the user asked CrewAI for stays on.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import crewai
from crewai.events import event_bus, event_context, stream_context
from crewai.events.listeners.tracing import utils as tracing
from crewai.events.utils.console_formatter import ConsoleFormatter
from crewai.telemetry import telemetry

from leyden import context
from leyden.errors import ConfigurationError
from leyden.patching import Patches
from leyden_plugins.frameworks.crewai import scopes
from leyden_plugins.frameworks.crewai.recorder import LISTENERS, STARTS, is_idle, record

WORKING_VERSIONS = "crewai 1.15"

PUBLISH = "publish_stream_event"
"""Called by the event bus in the thread that emits, once an event has its place and before any handler."""

ENTRIES: tuple[tuple[type, str], ...] = (
    (crewai.Crew, "kickoff"),
    (crewai.Crew, "akickoff"),
    (crewai.Agent, "kickoff"),
    (crewai.Agent, "kickoff_async"),
    (crewai.Flow, "kickoff_async"),
)
"""Where a run begins. Cancellation and deadlines leave CrewAI without an end event."""


class Hooks:
    """Everything the automatic form installs."""

    def __init__(self) -> None:
        self.patches = Patches()

    def install(self) -> None:
        """Install all of it.

        Raises:
            ConfigurationError: a hook point is missing in this version.
        """
        missing = missing_hook_points()
        if missing:
            raise ConfigurationError(
                f"crewai {crewai.__version__} lacks {', '.join(missing)}, where Leyden attaches; "
                f"versions known to work: {WORKING_VERSIONS}"
            )
        self.patches.replace(event_bus, PUBLISH, self.publishing(vars(event_bus)[PUBLISH]))
        LISTENERS.add(self)
        for owner, name in ENTRIES:
            home = home_of(owner, name)
            self.patches.replace(home, name, unwinding(vars(home)[name]))
        self.patches.replace(crewai.Task, "_execute_task_async", answering(vars(crewai.Task)["_execute_task_async"]))
        self.silence()

    def silence(self) -> None:
        """Make CrewAI send nothing about itself from inside a rollout."""
        core = telemetry.CoreTelemetry
        disabled = vars(core)["_is_telemetry_disabled"].__func__
        self.patches.replace(core, "_is_telemetry_disabled", classmethod(in_rollout(disabled, True)))
        self.patches.replace(tracing, "is_first_execution", in_rollout(tracing.is_first_execution, False))
        look = vars(ConsoleFormatter)["_show_version_update_message_if_needed"]
        self.patches.replace(ConsoleFormatter, "_show_version_update_message_if_needed", in_rollout(look, None))

    def remove(self) -> None:
        """Undo `install`."""
        LISTENERS.discard(self)
        self.patches.restore()

    def publishing(self, publish: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        """Return `publish` that tells Leyden first."""

        @functools.wraps(publish)
        def told(source: Any, event: Any) -> None:
            if self in LISTENERS:
                record(source, event)
            publish(source, event)

        return told


def missing_hook_points() -> list[str]:
    """Name what is not where it is looked for."""
    bus = vars(event_bus.CrewAIEventsBus).get("_prepare_event")
    points: dict[str, bool] = {
        f"a call of {PUBLISH} in CrewAIEventsBus._prepare_event": PUBLISH in vars(event_bus)
        and PUBLISH in getattr(getattr(bus, "__code__", None), "co_names", ()),
        "events.stream_context.add_stream_sink": hasattr(stream_context, "add_stream_sink"),
        "telemetry.CoreTelemetry._is_telemetry_disabled": isinstance(
            vars(vars(telemetry).get("CoreTelemetry", object)).get("_is_telemetry_disabled"), classmethod
        ),
        "events.listeners.tracing.utils.is_first_execution": hasattr(tracing, "is_first_execution"),
        "ConsoleFormatter._show_version_update_message_if_needed": "_show_version_update_message_if_needed"
        in vars(ConsoleFormatter),
        "Task._execute_task_async": "_execute_task_async" in vars(crewai.Task),
    }
    points |= {f"{owner.__name__}.{name}": hasattr(owner, name) for owner, name in ENTRIES}
    points |= {f"the event {start!r}": start in event_context.SCOPE_STARTING_EVENTS for start in STARTS}
    return [point for point, is_there in points.items() if not is_there]


def home_of(owner: type, name: str) -> type:
    """Return the class that defines a method: a `Flow` inherits its own."""
    return next(each for each in owner.__mro__ if name in vars(each))


def unwinding(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function, or coroutine function, that closes what an exception leaves open."""

    @functools.wraps(run)
    def sync(*args: Any, **options: Any) -> Any:
        if is_idle():
            return run(*args, **options)
        before = context.current()
        try:
            return run(*args, **options)
        except BaseException as error:
            scopes.unwind(before, error)
            raise

    @functools.wraps(run)
    async def asynchronous(*args: Any, **options: Any) -> Any:
        if is_idle():
            return await run(*args, **options)
        before = context.current()
        try:
            return await run(*args, **options)
        except BaseException as error:
            scopes.unwind(before, error)
            raise

    return asynchronous if inspect.iscoroutinefunction(run) else sync


def answering(execute: Callable[..., None]) -> Callable[..., None]:
    """Return the body of an async task's thread that also hands on what is no `Exception`.

    CrewAI 1.15 waits for ever for a task whose rollout ran out of time; goes when it sets the future for every
    exception.
    """

    @functools.wraps(execute)
    def answer(task: Any, agent: Any, given: Any, tools: Any, future: Any) -> None:
        before = context.current()
        try:
            execute(task, agent, given, tools, future)
        except BaseException as error:
            scopes.unwind(before, error)
            if future.done():
                raise
            future.set_exception(error)

    return answer


def in_rollout(function: Callable[..., Any], answer: object) -> Callable[..., Any]:
    """Return `function` that answers `answer` inside a rollout."""

    @functools.wraps(function)
    def asked(*args: Any, **options: Any) -> Any:
        frame = context.current()
        return answer if frame is not None and frame.rollout is not None else function(*args, **options)

    return asked
