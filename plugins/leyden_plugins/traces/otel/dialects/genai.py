"""OpenTelemetry's GenAI conventions: messages as attributes, as one event, or in older form an event a message."""

from __future__ import annotations

from collections.abc import Mapping

from leyden.spans import Kind
from leyden_plugins.traces.otel.dialects.reading import (
    FINISH_REASONS,
    INPUT,
    INSTRUCTIONS,
    OUTPUT,
    TOOLS,
    Reading,
    answered_chat,
    asked_chat,
    given,
    items,
    parsed,
    text,
)
from leyden_plugins.traces.otel.spans import RawSpan

KINDS = {
    "chat": Kind.MODEL_CALL,
    "generate_content": Kind.MODEL_CALL,
    "text_completion": Kind.MODEL_CALL,
    "execute_tool": Kind.TOOL,
    "invoke_agent": Kind.AGENT,
    "create_agent": Kind.EVENT,
    "invoke_workflow": Kind.EVENT,
    "embeddings": Kind.EVENT,
    "retrieval": Kind.EVENT,
}
"""By `gen_ai.operation.name`."""

DETAILS = "gen_ai.client.inference.operation.details"
MESSAGES = {
    "gen_ai.system.message": "system",
    "gen_ai.user.message": "user",
    "gen_ai.assistant.message": "assistant",
    "gen_ai.tool.message": "tool",
}
CHOICE = "gen_ai.choice"


def read_genai(span: RawSpan) -> Reading:
    """Read a span that has `gen_ai.operation.name`, or an agent's name."""
    known = dict(span.attributes)
    for event in span.events:
        if event.name == DETAILS:
            known = {**event.attributes, **known}
    told: dict[str, object] = {}
    asked = parsed(known.get(INPUT)) or _asked_in_events(span)
    answered = parsed(known.get(OUTPUT)) or _answered_in_events(span)
    if asked is not None:
        told[INPUT] = asked_chat(asked, parsed(known.get(INSTRUCTIONS)))
    if answered is not None:
        told[OUTPUT] = answered_chat(answered)
        told[FINISH_REASONS] = parsed(known.get(FINISH_REASONS)) or [
            one["finish_reason"] for one in items(answered) if one.get("finish_reason")
        ]
    told[TOOLS] = parsed(known.get(TOOLS))
    operation = text(known.get("gen_ai.operation.name")) or ""
    return Reading(
        kind=KINDS.get(operation, Kind.EVENT if operation else None),
        agent=text(known.get("gen_ai.agent.name")),
        told=given(told),
        # Instructions alone, of a call whose messages were not recorded, stay where they are.
        consumed={INSTRUCTIONS} & known.keys() if asked is not None else set(),
        asked=told.get(INPUT) if operation not in ("execute_tool",) else known.get("gen_ai.tool.call.arguments"),
        answered=told.get(OUTPUT) if operation not in ("execute_tool",) else known.get("gen_ai.tool.call.result"),
    )


def _asked_in_events(span: RawSpan) -> list[dict[str, object]] | None:
    found = [_message(event.attributes, MESSAGES[event.name]) for event in span.events if event.name in MESSAGES]
    return found or None


def _answered_in_events(span: RawSpan) -> list[dict[str, object]] | None:
    found = []
    for event in span.events:
        if event.name == CHOICE:
            message = parsed(event.attributes.get("message"))
            said = message if isinstance(message, Mapping) else event.attributes
            reason = event.attributes.get("finish_reason")
            found.append({**_message(said, "assistant"), **({"finish_reason": reason} if reason else {})})
    return found or None


def _message(said: Mapping[str, object], role: str) -> dict[str, object]:
    message: dict[str, object] = {"role": text(said.get("role")) or role, "content": parsed_content(said)}
    calls = parsed(said.get("tool_calls"))
    if isinstance(calls, list) and calls:
        message["tool_calls"] = calls
    if role == "tool" and text(said.get("id")):
        message["tool_call_id"] = said["id"]
    return message


def parsed_content(said: Mapping[str, object]) -> object:
    """Return a message's content; only a list of parts is JSON, a JSON object in words is the words."""
    content = said.get("content")
    found = parsed(content)
    is_parts = isinstance(found, list) and bool(found) and all("type" in one for one in items(found) or [{}])
    return found if is_parts else content
