"""OpenLLMetry (Traceloop) in its older form: `gen_ai.prompt.N.*` and `gen_ai.completion.N.*`, flattened."""

from __future__ import annotations

from collections.abc import Mapping

from leyden.spans import Kind
from leyden_plugins.traces.otel.dialects.genai import parsed_content
from leyden_plugins.traces.otel.dialects.reading import (
    FINISH_REASONS,
    INPUT,
    OUTPUT,
    TOOLS,
    Reading,
    answered_chat,
    asked_chat,
    given,
    items,
    names_below,
    nested,
    parsed,
    text,
    whole,
)
from leyden_plugins.traces.otel.spans import RawSpan

KINDS = {"agent": Kind.AGENT, "tool": Kind.TOOL, "task": Kind.EVENT, "workflow": Kind.EVENT}
"""By `traceloop.span.kind`."""
CALLS = {"chat": "chat", "completion": "text_completion"}
"""By `llm.request.type`."""


def read_traceloop(span: RawSpan) -> Reading:
    """Read a span with `traceloop.span.kind` or `llm.request.type`."""
    known = span.attributes
    said = str(known.get("traceloop.span.kind", "")).lower()
    request = str(known.get("llm.request.type", "")).lower()
    name = text(known.get("traceloop.entity.name"))
    if said:
        reading = Reading(
            kind=KINDS.get(said, Kind.EVENT),
            agent=name if said == "agent" else None,
            asked=parsed(known.get("traceloop.entity.input")),
            answered=parsed(known.get("traceloop.entity.output")),
        )
        if said == "tool":
            reading.told = given(
                {
                    "gen_ai.tool.name": name,
                    "gen_ai.tool.call.arguments": known.get("traceloop.entity.input"),
                    "gen_ai.tool.call.result": known.get("traceloop.entity.output"),
                }
            )
        return reading
    asked = items(nested(known, "gen_ai.prompt"))
    if request not in CALLS and not asked:
        return Reading(kind=Kind.EVENT if request else None)
    answered = items(nested(known, "gen_ai.completion"))
    told = {
        "gen_ai.operation.name": CALLS.get(request, "chat"),
        INPUT: asked_chat([_message(one, "user") for one in asked]) if asked else None,
        OUTPUT: answered_chat([_message(one, "assistant") for one in answered]) if answered else None,
        TOOLS: [_tool(one) for one in items(nested(known, "llm.request.functions"))],
        FINISH_REASONS: [one["finish_reason"] for one in answered if one.get("finish_reason")],
        "gen_ai.usage.input_tokens": whole(known.get("gen_ai.usage.prompt_tokens")),
        "gen_ai.usage.output_tokens": whole(known.get("gen_ai.usage.completion_tokens")),
    }
    consumed = set().union(
        *(names_below(known, prefix) for prefix in ("gen_ai.prompt", "gen_ai.completion", "llm.request.functions"))
    )
    return Reading(kind=Kind.MODEL_CALL, told=given(told), consumed=consumed, asked=told[INPUT], answered=told[OUTPUT])


def _message(said: Mapping[str, object], role: str) -> dict[str, object]:
    message: dict[str, object] = {"role": said.get("role", role), "content": parsed_content(said) or ""}
    calls = [
        {
            "id": one.get("id"),
            "type": "function",
            "function": {"name": one.get("name"), "arguments": one.get("arguments", "{}")},
        }
        for one in items(said.get("tool_calls"))
    ]
    if calls:
        message["tool_calls"] = calls
    return message | given({"tool_call_id": said.get("tool_call_id")})


def _tool(said: Mapping[str, object]) -> dict[str, object]:
    return {"type": "function", "function": {**said, "parameters": parsed(said.get("parameters"))}}
