"""Spans as instrumentations send them, with few words."""

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan

from leyden_plugins.traces.otel.spans import RawEvent, RawSpan, write_attributes

TRACE = "0af7651916cd43dd8448eb211c80319c"


def number(value: int) -> str:
    """Return a span id."""
    return f"{value:016x}"


def a_raw(span: int, parent: int | None = None, *, trace: str = TRACE, **changes: object) -> RawSpan:
    """Return a span that lasts from its number to ten times that."""
    fields: dict[str, object] = {
        "trace_id": trace,
        "span_id": number(span),
        "parent_id": None if parent is None else number(parent),
        "name": f"span {span}",
        "start_ns": 1000 + span,
        "end_ns": 2000 + span,
        "attributes": {},
    }
    return RawSpan(**(fields | changes))  # type: ignore[arg-type]


def a_call(span: int, parent: int | None = None, *, said: str = "fine", **changes: object) -> RawSpan:
    """Return a model call in the GenAI conventions."""
    attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.input.messages": '[{"role": "user", "parts": [{"type": "text", "content": "How are you?"}]}]',
        "gen_ai.output.messages": f'[{{"role": "assistant", "parts": [{{"type": "text", "content": "{said}"}}]}}]',
    }
    return a_raw(span, parent, **({"attributes": attributes} | changes))


def an_evaluation(value: object, name: str = "helpful") -> RawEvent:
    """Return a score that an evaluator has put on a span."""
    told = {"gen_ai.evaluation.name": name, "gen_ai.evaluation.score.value": value}
    return RawEvent(name="gen_ai.evaluation.result", time_ns=1, attributes=told)


def a_request(*spans: RawSpan) -> ExportTraceServiceRequest:
    """Return spans as a sender's request."""
    written = [
        ProtoSpan(
            trace_id=bytes.fromhex(one.trace_id),
            span_id=bytes.fromhex(one.span_id),
            parent_span_id=bytes.fromhex(one.parent_id or ""),
            name=one.name,
            start_time_unix_nano=one.start_ns,
            end_time_unix_nano=one.end_ns,
            attributes=write_attributes(one.attributes),
        )
        for one in spans
    ]
    return ExportTraceServiceRequest(resource_spans=[ResourceSpans(scope_spans=[ScopeSpans(spans=written)])])
