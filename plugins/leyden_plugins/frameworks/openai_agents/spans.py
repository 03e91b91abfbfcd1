"""From the SDK's spans to Leyden's: agents, tools, guardrails and handoffs.

One idea: the SDK starts and ends a span in the context of the code that the span is about, so an activity that is
entered at its start names who speaks in every HTTP request made inside; neither trace ids nor parent ids are needed.
One trap: the SDK does not note cancellation, hides what a tool raised, and in a run without tracing forgets errors
altogether; so how something ended is read from the exception at hand.

This module imports nothing of the SDK; it goes by `span_data.type`.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from leyden import context, wire
from leyden.activity import Activity, unbroken
from leyden.spans import Kind, Status


class SpanActivity(Activity):
    """What an open span of the SDK is about."""

    around: BaseException | None = None
    """The exception that was being handled when it started, which is not its own."""
    error: str | None = None
    """What the SDK said went wrong inside, although the run may have gone on."""


FOLLOWED: weakref.WeakKeyDictionary[object, SpanActivity] = weakref.WeakKeyDictionary()
"""The SDK's open spans, shared by both forms, so that together they record each once."""


def start_agent(data: Any) -> SpanActivity:
    """Let an agent speak."""
    attributes: dict[str, Any] = {"gen_ai.agent.name": data.name}
    agent = SpanActivity(Kind.AGENT, data.name, role=data.name, **attributes)
    agent.enter()
    declare(data.handoffs or ())
    return agent


def start_tool(data: Any) -> SpanActivity:
    """Begin a tool; a model called directly inside answers to the agent that uses the tool."""
    tool = SpanActivity(Kind.TOOL, data.name, **{"gen_ai.tool.name": data.name})
    tool.enter()
    return tool


def start_guardrail(data: Any) -> SpanActivity:
    """Begin a guardrail under its own name: what it says is not said by the agent that it judges."""
    attributes: dict[str, Any] = {"openai_agents.span": "guardrail"}
    guardrail = SpanActivity(Kind.TOOL, data.name, role=data.name, **attributes)
    guardrail.enter()
    return guardrail


def start_handoff(data: Any) -> SpanActivity:
    """Begin a handoff, whose target shows at its end."""
    return SpanActivity(Kind.HANDOFF, "handoff")


STARTS: Mapping[str, Callable[[Any], SpanActivity]] = {
    "agent": start_agent,
    "function": start_tool,
    "guardrail": start_guardrail,
    "handoff": start_handoff,
}
"""By `span_data.type`. Model calls are recorded by the wire; tasks, turns and custom spans are not."""


@unbroken
def started(span: Any) -> None:
    """Follow a span of the SDK from here on."""
    if context.current() is None and wire.default_routing() is None:
        return
    start = STARTS.get(span.span_data.type)
    if start is None or span in FOLLOWED:
        return
    activity = start(span.span_data)
    activity.around = sys.exc_info()[1]
    FOLLOWED[span] = activity


@unbroken
def failed(span: Any, error: Mapping[str, Any]) -> None:
    """Note what went wrong inside a span: the exception at hand, else the SDK's words, which may be redacted."""
    activity = FOLLOWED.get(span)
    if activity is not None:
        raised = new_exception(activity)
        activity.error = error_text(error) if raised is None else f"{type(raised).__name__}: {raised}"


@unbroken
def finished(span: Any) -> None:
    """End what a span is about."""
    activity = FOLLOWED.pop(span, None)
    if activity is None:
        return
    error = activity.error or (error_text(span.error) if span.error else None)
    raised = new_exception(activity)
    attributes: dict[str, object] = {}
    try:
        attributes = attributes_of(activity, span.span_data)
    finally:
        if raised is not None:
            activity.fail(raised, **attributes)
        else:
            activity.close(Status.ERROR if error else Status.OK, error, **attributes)


def new_exception(activity: SpanActivity) -> BaseException | None:
    """Return the exception that is being handled now and was not when the activity began."""
    raised = sys.exc_info()[1]
    return raised if raised is not activity.around else None


def attributes_of(activity: SpanActivity, data: Any) -> dict[str, object]:
    """Return what a span's data says at its end."""
    if data.type == "function":
        found = {"gen_ai.tool.call.arguments": arguments(data.input), "gen_ai.tool.call.result": plain(data.output)}
        return {name: value for name, value in found.items() if value is not None}
    if data.type == "guardrail":
        return {"openai_agents.guardrail.triggered": data.triggered}
    if data.type == "handoff" and data.to_agent is not None:
        declare((data.to_agent,))
        if activity.span is not None:
            activity.span.name = f"handoff to {data.to_agent}"
        return {"leyden.handoff.to": data.to_agent}
    return {}


def declare(roles: Iterable[str]) -> None:
    """Tell the rollout of agents that may never speak."""
    frame = context.current()
    if frame is not None and frame.rollout is not None:
        frame.rollout.declared_roles.update(roles)


@unbroken
def tool_called(call_id: str) -> None:
    """Note the id of the call that the current tool answers."""
    tool = current_tool()
    if tool is not None and tool.span is not None:
        tool.span.attributes.setdefault("gen_ai.tool.call.id", call_id)


@unbroken
def timed_out(error: BaseException) -> None:
    """Note that the current tool had no time left, which the SDK may turn into an ordinary result."""
    tool = current_tool()
    if tool is not None:
        tool.error = f"{type(error).__name__}: {error}"


def current_tool() -> SpanActivity | None:
    """Return the tool that the running code belongs to, unless an agent works inside it."""
    frame = context.current()
    owner = frame.owner if frame else None
    is_tool = isinstance(owner, SpanActivity) and owner.span is not None and owner.span.kind is Kind.TOOL
    return owner if is_tool else None  # type: ignore[return-value]  # narrowed by `is_tool`


def error_text(error: Mapping[str, Any]) -> str:
    """Put an error of the SDK in a line."""
    data = error.get("data")
    return f"{error.get('message')}: {data}" if data else str(error.get("message"))


def arguments(text: str | None) -> object:
    """Return a tool's arguments, as they came when they are no JSON."""
    try:
        return json.loads(text) if text is not None else None
    except ValueError:
        return text


def plain(value: object) -> object:
    """Return a value that any store can keep."""
    return msgspec.to_builtins(value, str_keys=True, enc_hook=plain_object)


def plain_object(value: Any) -> object:
    """Return what stands for an object that is no container: a pydantic model's fields, else its text."""
    dump = getattr(value, "model_dump", None)
    return dump(mode="json") if dump is not None else str(value)
