"""Langfuse's SDK, whose spans are OTLP too: input and output are JSON texts of whatever the app gave."""

from __future__ import annotations

from collections.abc import Mapping

from leyden.spans import Kind
from leyden_plugins.traces.otel.dialects.reading import (
    INPUT,
    OUTPUT,
    TOOLS,
    Reading,
    answered_chat,
    asked_chat,
    given,
    parsed,
    text,
    whole,
)
from leyden_plugins.traces.otel.spans import RawSpan

TYPE = "langfuse.observation.type"
KINDS = {"generation": Kind.MODEL_CALL, "agent": Kind.AGENT, "tool": Kind.TOOL}
"""By type of the observation; all others are events."""


def read_langfuse(span: RawSpan) -> Reading:
    """Read a span with `langfuse.observation.*` or `langfuse.trace.*`."""
    known = span.attributes
    kind = str(known.get(TYPE, "")).lower()
    asked = parsed(known.get("langfuse.observation.input", known.get("langfuse.trace.input")))
    answered = parsed(known.get("langfuse.observation.output", known.get("langfuse.trace.output")))
    reading = Reading(
        kind=KINDS.get(kind, Kind.EVENT) if kind else None,
        agent=span.name if kind == "agent" else None,
        asked=asked,
        answered=answered,
    )
    if kind == "generation":
        reading.told = _call(known, asked, answered)
    elif kind == "tool":
        reading.told = given(
            {"gen_ai.tool.name": span.name, "gen_ai.tool.call.arguments": asked, "gen_ai.tool.call.result": answered}
        )
    return reading


def _call(known: Mapping[str, object], asked: object, answered: object) -> dict[str, object]:
    beside = asked if isinstance(asked, Mapping) else {}
    messages = beside.get("messages", asked)
    said = [answered] if isinstance(answered, Mapping) else answered
    if isinstance(said, str):
        said = [{"role": "assistant", "content": said}]
    usage = parsed(known.get("langfuse.observation.usage_details"))
    counts = usage if isinstance(usage, Mapping) else {}
    return given(
        {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": text(known.get("langfuse.observation.model.name")),
            INPUT: asked_chat(messages) if messages is not None else None,
            OUTPUT: answered_chat(said) if said is not None else None,
            TOOLS: beside.get("tools"),
            "gen_ai.usage.input_tokens": whole(counts.get("input", counts.get("prompt_tokens"))),
            "gen_ai.usage.output_tokens": whole(counts.get("output", counts.get("completion_tokens"))),
        }
    )
