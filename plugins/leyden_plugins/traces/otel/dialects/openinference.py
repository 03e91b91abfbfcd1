"""OpenInference: the spans of Arize's instrumentors. Messages are flattened; `output.value` is the raw answer."""

from __future__ import annotations

from collections.abc import Mapping

from leyden.spans import Kind
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

KINDS = {"LLM": Kind.MODEL_CALL, "TOOL": Kind.TOOL, "AGENT": Kind.AGENT}
"""By `openinference.span.kind`; CHAIN, RETRIEVER, EMBEDDING, RERANKER, GUARDRAIL and the like are events."""


def read_openinference(span: RawSpan) -> Reading:
    """Read a span that has `openinference.span.kind`."""
    known = span.attributes
    kind = str(known.get("openinference.span.kind", "")).upper()
    if not kind:
        return Reading()
    reading = Reading(
        kind=KINDS.get(kind, Kind.EVENT),
        agent=text(known.get("agent.name")) or text(known.get("graph.node.id")),
        asked=parsed(known.get("input.value")),
        answered=parsed(known.get("output.value")),
    )
    if kind == "LLM":
        _read_call(known, reading)
    elif kind == "TOOL":
        reading.told = given(
            {
                "gen_ai.operation.name": "execute_tool",
                "gen_ai.tool.name": known.get("tool.name"),
                "gen_ai.tool.call.id": known.get("tool_call.id") or known.get("tool.id"),
                "gen_ai.tool.call.arguments": known.get("input.value"),
                "gen_ai.tool.call.result": known.get("output.value"),
            }
        )
    return reading


def _read_call(known: Mapping[str, object], reading: Reading) -> None:
    asked = [each for one in items(nested(known, "llm.input_messages")) for each in _messages(one)]
    answered = [_message(one) for one in items(nested(known, "llm.output_messages"))]
    response = reading.answered if isinstance(reading.answered, Mapping) else {}
    choices = items(response.get("choices"))
    reading.response = response or None
    reading.told = given(
        {
            "gen_ai.operation.name": "text_completion" if known.get("llm.prompts.0.prompt.text") else "chat",
            "gen_ai.request.model": known.get("llm.model_name"),
            "gen_ai.response.model": response.get("model"),
            "gen_ai.response.id": response.get("id"),
            INPUT: asked_chat(asked) if asked else None,
            OUTPUT: answered_chat(answered) if answered else None,
            TOOLS: [
                parsed(one.get("tool.json_schema", _below(one, "tool").get("json_schema"))) for one in _tools(known)
            ],
            FINISH_REASONS: _reasons(known, choices),
            "gen_ai.usage.input_tokens": whole(known.get("llm.token_count.prompt")),
            "gen_ai.usage.output_tokens": whole(known.get("llm.token_count.completion")),
        }
    )
    # The messages are what was asked; `input.value` is a request with its settings.
    reading.asked = reading.told.get(INPUT, reading.asked)
    reading.answered = reading.told.get(OUTPUT, reading.answered)
    for prefix in ("llm.input_messages", "llm.output_messages", "llm.tools"):
        reading.consumed |= names_below(known, prefix)


def _tools(known: Mapping[str, object]) -> list[Mapping[str, object]]:
    return items(nested(known, "llm.tools"))


def _reasons(known: Mapping[str, object], choices: list[Mapping[str, object]]) -> list[object]:
    reasons = [one["finish_reason"] for one in choices if one.get("finish_reason")]
    said = known.get("llm.finish_reason")
    return reasons or ([said] if said else [])


def _below(value: Mapping[str, object], key: str) -> Mapping[str, object]:
    found = value.get(key)
    return found if isinstance(found, Mapping) else {}


def _messages(flattened: Mapping[str, object]) -> list[dict[str, object]]:
    """Return a message; AutoGen's instrumentor puts the results of several tools into one, as JSON texts."""
    results = [parsed(one) for one in _texts(_below(flattened, "message").get("function"))]
    return [
        {"role": "tool", "content": one.get("content"), "tool_call_id": one.get("call_id")}
        for one in results
        if isinstance(one, Mapping)
    ] or [_message(flattened)]


def _texts(value: object) -> list[object]:
    return list(value) if isinstance(value, list) else []


def _message(flattened: Mapping[str, object]) -> dict[str, object]:
    """Return a chat message of `message.role`, `message.content`, `message.contents`, `message.tool_calls`."""
    said = _below(flattened, "message")
    content: object = said.get("content")
    parts = [_part(_below(one, "message_content")) for one in items(said.get("contents"))]
    if parts and all(part.get("type") == "text" for part in parts):
        content = "\n".join(str(part["text"]) for part in parts)
    elif parts:
        content = parts
    message: dict[str, object] = {"role": said.get("role", "user"), "content": "" if content is None else content}
    message |= given({"name": said.get("name"), "tool_call_id": said.get("tool_call_id")})
    calls = [_call(_below(one, "tool_call")) for one in items(said.get("tool_calls"))]
    if calls:
        message["tool_calls"] = calls
    return message


def _part(part: Mapping[str, object]) -> dict[str, object]:
    if part.get("type", "text") == "text":
        return {"type": "text", "text": part.get("text", "")}
    return dict(part)


def _call(call: Mapping[str, object]) -> dict[str, object]:
    function = _below(call, "function")
    said = {"name": function.get("name"), "arguments": function.get("arguments", "{}")}
    return {"id": call.get("id"), "type": "function", "function": said}
