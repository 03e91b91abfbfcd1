"""CrewAI's events as scopes: called in order, in the thread and context that emits them.

Handlers of CrewAI's event bus will not do: they run later, in threads of their own, so they cannot say who makes
the HTTP request that comes next.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from crewai.events.event_context import VALID_EVENT_PAIRS
from crewai.utilities.agent_utils import DELEGATION_TOOL_NAMES
from crewai.utilities.i18n import I18N_DEFAULT

from leyden import activity, context, wire
from leyden.activity import Activity, Exclusive
from leyden.errors import ConcurrentUseError
from leyden.roles import MAIN_ROLE
from leyden.spans import Kind, Status
from leyden_plugins.frameworks.crewai import scopes
from leyden_plugins.frameworks.crewai.scopes import Scope, Speaking

logger = logging.getLogger(__name__)

AGENT = "agent_execution_started"
KICKOFF = "lite_agent_execution_started"
"""An agent that is started without a crew."""
CREW = "crew_kickoff_started"
TOOL = "tool_usage_started"
FLOW = "flow_started"
CALL = "llm_call_started"

SUMMARY = "context summary"
"""Name of the span around a call that shortens a conversation: not the agent's own words on its task."""

USERS = Exclusive()

LISTENERS: set[object] = set()
"""The automatic forms in force; beside one, the explicit form has nothing to add."""


def record(source: Any, event: Any) -> None:
    """Take an event.

    Raises:
        ConcurrentUseError: another rollout uses this flow, crew or agent now.
    """
    handle = HANDLERS.get(event.type)
    if handle is None or is_idle():
        return
    try:
        handle(source, event)
    except ConcurrentUseError:
        raise
    except Exception:
        logger.exception("an event of CrewAI could not be recorded: %r", event.type)


def is_idle() -> bool:
    """Say whether nothing is to be recorded or changed here."""
    frame = context.current()
    return (frame is None or frame.rollout is None) and wire.default_routing() is None


# ---- starts ------------------------------------------------------------------------------------------------------


def begin_flow(flow: Any, event: Any) -> None:
    """Follow a flow; those that CrewAI builds agents and memory of are its own business."""
    if not getattr(flow, "suppress_flow_events", False):
        give_back = take(flow, event.flow_name)
        Scope(FLOW, id(flow), Kind.AGENT, event.flow_name).give_back = give_back


def begin_crew(crew: Any, event: Any) -> None:
    """Follow a crew and declare its agents."""
    name = crew.name or "crew"
    give_back = take(crew, name, f"{name}.copy()")
    Scope(CREW, id(crew), Kind.AGENT, name).give_back = give_back
    frame = context.current()
    if frame is not None and frame.rollout is not None:
        agents = [*crew.agents, crew.manager_agent, *(task.agent for task in crew.tasks)]
        frame.rollout.declared_roles.update(role_of(agent) for agent in agents if agent is not None)


def begin_agent(agent: Any, event: Any) -> None:
    """Follow an agent at work on a task."""
    task = {"crewai.task": event.task.name} if event.task.name else {}
    start_agent(AGENT, agent, role_of(agent), task)


def begin_kickoff(agent: Any, event: Any) -> None:
    """Follow an agent that was started alone."""
    start_agent(KICKOFF, agent, str(event.agent_info["role"]).strip(), {})


def start_agent(started: str, agent: Any, role: str, attributes: dict[str, object]) -> None:
    """Open an agent's scope, after the handoff when a coworker gave it the work."""
    give_back = take(agent, role, f"{role}.copy()")
    giver = next(scopes.around(), None)
    if isinstance(giver, Scope) and giver.started == TOOL and giver.name in DELEGATION_TOOL_NAMES:
        activity.handoff(role, source=giver)
    attributes = {"gen_ai.agent.name": role, **attributes}
    Scope(started, id(agent), Kind.AGENT, role, role=role, attributes=attributes).give_back = give_back


def begin_tool(source: Any, event: Any) -> None:
    """Follow a tool."""
    Scope(TOOL, id(source), Kind.TOOL, event.tool_name, attributes=tool_attributes(source, event))


def refuse_tool(agent: Any, event: Any) -> None:
    """Record a tool call whose arguments are no JSON: CrewAI then reports a failure and starts nothing."""
    if isinstance(event.tool_args, str):
        attributes = tool_attributes(getattr(agent, "agent_executor", None), event)
        tool = Activity(Kind.TOOL, event.tool_name, role=None, parent=None, **attributes)
        tool.close(Status.ERROR, event.failure.message)


def tool_attributes(executor: Any, event: Any) -> dict[str, object]:
    """Return what a tool's span says of its call."""
    return {
        "gen_ai.tool.name": event.tool_name,
        "gen_ai.tool.call.id": call_id_of(executor, event),
        "gen_ai.tool.call.arguments": plain(arguments_of(event.tool_args)),
    }


def begin_call(model: Any, event: Any) -> None:
    """Name who speaks where no agent is at work yet, and put a span around a call that shortens a conversation.

    The wire makes the span of the call itself.
    """
    frame = context.current()
    if is_summary(event.messages):
        Scope(CALL, event.call_id, Kind.EVENT, SUMMARY, attributes={"crewai.purpose": "context_summary"})
        return
    role = (event.agent_role or "").strip()
    nearest = next(scopes.around(), None)
    speaks = isinstance(nearest, Speaking) or (nearest is not None and nearest.started in (AGENT, KICKOFF))
    named_by_user = frame is not None and frame.owner is None and frame.role != MAIN_ROLE
    if role and not speaks and not named_by_user:
        Speaking(CALL, event.call_id, role)


STARTS: dict[str, Callable[[Any, Any], None]] = {
    FLOW: begin_flow,
    CREW: begin_crew,
    AGENT: begin_agent,
    KICKOFF: begin_kickoff,
    TOOL: begin_tool,
    CALL: begin_call,
}

# ---- ends --------------------------------------------------------------------------------------------------------


def end(started: str, source: Any, event: Any) -> None:
    """Close what an end event is about."""
    key = event.call_id if started == CALL else id(source)
    error = getattr(event, "error", None)
    if error is None and started == TOOL:
        failure = getattr(event, "failure", None)
        error = getattr(failure, "message", None) if failure is not None else None
    attributes: dict[str, object] = {}
    if started == TOOL:
        attributes["gen_ai.tool.call.result"] = plain(getattr(event, "output", None))
    text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else error
    scopes.end(started, key, Status.OK if error is None else Status.ERROR, text and str(text), **attributes)


HANDLERS: dict[str, Callable[[Any, Any], None]] = {
    **STARTS,
    **{ending: partial(end, start) for ending, start in VALID_EVENT_PAIRS.items() if start in STARTS},
    "tool_failure_detected": refuse_tool,
}

# ---- what events say ---------------------------------------------------------------------------------------------


def take(owner: Any, name: str, copy: str | None = None) -> Callable[[], None]:
    """Note that this rollout uses a flow, a crew or an agent.

    Raises:
        ConcurrentUseError: another rollout uses it now; names the cures.
    """
    try:
        return USERS.take(owner, name)
    except ConcurrentUseError as error:
        if copy is not None:
            error.args = (f"{error}; or run a copy in each: {copy}",)
        raise


def role_of(agent: Any) -> str:
    """Return an agent's role; one that stands in a YAML file often ends with a line break."""
    return str(agent.role).strip()


def is_summary(messages: Any) -> bool:
    """Say whether a model is asked to shorten a conversation that outgrew its context window."""
    first = messages[0] if isinstance(messages, list) and messages else None
    return isinstance(first, dict) and first.get("content") == I18N_DEFAULT.slice("summarizer_system_message").rstrip()


def call_id_of(executor: Any, event: Any) -> str | None:
    """Return the id of the model's tool call, which events leave out: the first equal one without a span."""
    agent = next((scope for scope in scopes.around() if isinstance(scope, Scope) and scope.started != TOOL), None)
    messages = getattr(getattr(executor, "state", None), "messages", None)
    if agent is None or not messages:
        return None
    calls: list[Any] = next((each["tool_calls"] for each in reversed(list(messages)) if each.get("tool_calls")), [])
    for call in calls:
        function = call["function"]
        if function["name"] == event.tool_name and arguments_of(function["arguments"]) == arguments_of(event.tool_args):
            with agent.lock:
                if call["id"] not in agent.call_ids:
                    agent.call_ids.add(call["id"])
                    return str(call["id"])
    return None


def arguments_of(given: Any) -> Any:
    """Return the arguments of a tool call, which may stand in JSON."""
    try:
        return json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return given


def plain(value: Any) -> object:
    """Return a JSON value."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return str(value)
