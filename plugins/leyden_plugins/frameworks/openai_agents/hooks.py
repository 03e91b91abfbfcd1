"""The automatic form: the few methods of the SDK that know what its trace processors are not told.

One idea: `start` and `finish` of the SDK's own span classes run in every run, also where tracing is disabled and
processors hear nothing; the user's exporters keep receiving exactly what they did.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import agents
from agents.exceptions import ToolTimeoutError
from agents.models import openai_responses
from agents.run import AgentRunner
from agents.tool_context import ToolContext
from agents.tracing import spans as sdk_spans

from leyden import context, wire
from leyden.activity import Exclusive, unbroken
from leyden.context import Frame
from leyden.errors import ConfigurationError
from leyden.patching import Patches
from leyden_plugins.frameworks.openai_agents import spans

WORKING_VERSIONS = "openai-agents 0.20 to 0.24"

HOOK_POINTS: tuple[tuple[object, str, tuple[str, ...]], ...] = (
    (sdk_spans, "SpanImpl", ("start", "finish", "set_error")),
    (sdk_spans, "NoOpSpan", ("start", "finish", "set_error")),
    (openai_responses, "OpenAIResponsesModel", ("_fetch_response",)),
    (openai_responses, "OpenAIResponsesWSModel", ("_fetch_response",)),
)
"""Module, class and methods that are not of the SDK's documented interface."""


class Hooks:
    """Everything the automatic form installs."""

    def __init__(self) -> None:
        self.patches = Patches()
        self.sessions = Exclusive()
        self.is_on = False
        """False after `remove`: somebody else's patch may still call ours."""

    def install(self) -> None:
        """Install all of it.

        Raises:
            ConfigurationError: a hook point is missing in this version.
        """
        check_hook_points()
        self.is_on = True
        for kind in (sdk_spans.SpanImpl, sdk_spans.NoOpSpan):
            self.follow(kind)
        self.patch_timeouts()
        self.patch_tools()
        self.patch_runner()
        self.patch_websockets()

    def remove(self) -> None:
        """Undo `install`."""
        self.is_on = False
        self.patches.restore()

    def follow(self, kind: Any) -> None:
        """Follow every span of one of the SDK's classes, and hear of its errors while the exception is at hand."""
        start, finish, set_error = kind.start, kind.finish, kind.set_error

        @functools.wraps(start)
        def start_followed(span: Any, *args: Any, **options: Any) -> None:
            if self.is_on:
                spans.started(span)
            start(span, *args, **options)

        @functools.wraps(finish)
        def finish_followed(span: Any, *args: Any, **options: Any) -> None:
            if self.is_on:
                spans.finished(span)
            finish(span, *args, **options)

        @functools.wraps(set_error)
        def set_noted_error(span: Any, error: Any) -> None:
            if self.is_on:
                spans.failed(span, error)
            set_error(span, error)

        self.patches.replace(kind, "start", start_followed)
        self.patches.replace(kind, "finish", finish_followed)
        self.patches.replace(kind, "set_error", set_noted_error)

    def patch_timeouts(self) -> None:
        """Hear of a tool's timeout, which may become an ordinary result."""
        make: Callable[..., None] = ToolTimeoutError.__init__

        @functools.wraps(make)
        def make_noted(error: Any, *args: Any, **options: Any) -> None:
            make(error, *args, **options)
            if self.is_on:
                spans.timed_out(error)

        self.patches.replace(ToolTimeoutError, "__init__", make_noted)

    def patch_tools(self) -> None:
        """Learn the id of each tool call, which the SDK's spans do not hold."""
        make: Callable[..., Any] = ToolContext.from_agent_context.__func__  # of a classmethod

        @functools.wraps(make)
        def make_noted(kind: Any, around: Any, tool_call_id: str, *args: Any, **options: Any) -> Any:
            if self.is_on:
                spans.tool_called(tool_call_id)
            return make(kind, around, tool_call_id, *args, **options)

        self.patches.replace(ToolContext, "from_agent_context", classmethod(make_noted))

    def patch_runner(self) -> None:
        """Learn which agents a run may reach, and refuse a session that another rollout writes to."""
        run, run_streamed = AgentRunner.run, AgentRunner.run_streamed

        @functools.wraps(run)
        async def run_noted(runner: Any, starting_agent: Any, *args: Any, **options: Any) -> Any:
            self.starting(starting_agent, options.get("session"))
            return await run(runner, starting_agent, *args, **options)

        @functools.wraps(run_streamed)
        def run_streamed_noted(runner: Any, starting_agent: Any, *args: Any, **options: Any) -> Any:
            self.starting(starting_agent, options.get("session"))
            return run_streamed(runner, starting_agent, *args, **options)

        self.patches.replace(AgentRunner, "run", run_noted)
        self.patches.replace(AgentRunner, "run_streamed", run_streamed_noted)

    def starting(self, agent: Any, session: Any) -> None:
        """Take note of a run.

        Raises:
            ConcurrentUseError: another rollout that is not over uses the session.
        """
        frame = context.current()
        if not self.is_on or frame is None or frame.rollout is None:
            return
        declare_team(agent)
        if session is not None:
            # Never given back: until the rollout is over, whoever comes next would read its history. A session class
            # of the user's may be one that cannot be a key; that one goes unguarded.
            with contextlib.suppress(TypeError):
                self.sessions.take(session, f"session {getattr(session, 'session_id', session)}")

    def patch_websockets(self) -> None:
        """Send Responses over HTTP that the wire must change: what goes through a websocket does not pass it."""
        over_websocket: Callable[..., Any] = openai_responses.OpenAIResponsesWSModel._fetch_response
        over_http: Callable[..., Any] = openai_responses.OpenAIResponsesModel._fetch_response

        @functools.wraps(over_websocket)
        async def fetch(model: Any, *args: Any, **options: Any) -> Any:
            changes = self.is_on and wire_changes(context.current() or Frame())
            return await (over_http if changes else over_websocket)(model, *args, **options)

        self.patches.replace(openai_responses.OpenAIResponsesWSModel, "_fetch_response", fetch)


def wire_changes(frame: Frame) -> bool:
    """Say whether a model call made in `frame` goes elsewhere or gets another prompt."""
    routing = frame.rollout.routing if frame.rollout else wire.default_routing()
    return routing is not None and (wire.is_routed(frame) or frame.role in routing.prompts)


def check_hook_points() -> None:
    """Look for everything that `install` replaces.

    Raises:
        ConfigurationError: something is missing; names it and the versions that have it.
    """
    for module, kind, methods in HOOK_POINTS:
        for method in methods:
            if method not in vars(getattr(module, kind, object)):
                version = getattr(agents, "__version__", "unknown")
                raise ConfigurationError(
                    f"openai-agents {version!r} has no {kind}.{method} in {getattr(module, '__name__', module)!r}, "
                    f"where Leyden attaches; versions known to work: {WORKING_VERSIONS}"
                )


@unbroken
def declare_team(agent: Any) -> None:
    """Declare every agent that a run may reach: by handoff, and as a tool."""
    left, seen = [agent], set[str]()
    while left:
        member = left.pop()
        name = getattr(member, "name", None) or getattr(member, "agent_name", None)
        if not isinstance(name, str) or name in seen:
            continue
        seen.add(name)
        left.extend(reachable(member))
    spans.declare(seen)


def reachable(agent: Any) -> list[Any]:
    """Return the agents that an agent may hand over to or call as tools; one known by name only stands for itself."""
    found: list[Any] = []
    for handoff in getattr(agent, "handoffs", None) or ():
        target = getattr(handoff, "_agent_ref", None)
        found.append((target() if target is not None else None) or handoff)
    found.extend(getattr(tool, "_agent_instance", None) for tool in getattr(agent, "tools", None) or ())
    return found
