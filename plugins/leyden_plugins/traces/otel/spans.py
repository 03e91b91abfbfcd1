"""OTLP's spans as plain values: what dialects read, and what protobuf and JSON become.

One idea: a request is decoded once, into `RawSpan`s; nothing behind it knows protobuf. One trap: OTLP's JSON writes ids
in hex, where the JSON of protobuf means base64, and numbers of 64 bits as strings.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from leyden.errors import DatasetError
from leyden.extras import extra

with extra("otel"):
    from google.protobuf import json_format
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
    from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan
    from opentelemetry.proto.trace.v1.trace_pb2 import Status as ProtoStatus

Attributes = dict[str, object]

HEX_IDS = ("traceId", "spanId", "parentSpanId", "trace_id", "span_id", "parent_span_id")
IS_REMOTE = 0x200
"""Bit of `Span.flags`: the parent is in another process."""


@dataclass(frozen=True, kw_only=True)
class RawEvent:
    """Something that happened inside a span."""

    name: str
    time_ns: int
    attributes: Attributes


@dataclass(frozen=True, kw_only=True)
class RawSpan:
    """A span as it came."""

    trace_id: str
    """32 hex digits."""
    span_id: str
    """16 hex digits."""
    parent_id: str | None
    name: str
    start_ns: int
    end_ns: int
    is_error: bool = False
    error: str | None = None
    has_remote_parent: bool = False
    """Its parent is said to be in another process, whose spans may go elsewhere."""
    attributes: Attributes = field(default_factory=dict)
    events: Sequence[RawEvent] = ()
    links: Sequence[Attributes] = ()
    resource: Attributes = field(default_factory=dict)
    """The process: `service.name` and the like."""
    scope: str = ""
    """The library that recorded it."""
    dropped: int = 0
    """Attributes and events that the sender left out for its own limits."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What a request held."""

    spans: Sequence[RawSpan]
    refused: Sequence[str]
    """Why spans of it cannot be kept, one a span."""


def decode_protobuf(body: bytes) -> ExportTraceServiceRequest:
    """Read a request in protobuf.

    Raises:
        DatasetError: it is none.
    """
    try:
        found: ExportTraceServiceRequest = ExportTraceServiceRequest.FromString(body)
    except DecodeError as error:
        raise DatasetError(f"it is no OTLP trace request in protobuf: {error}") from error
    return found


def decode_json(body: bytes | str) -> ExportTraceServiceRequest:
    """Read a request in OTLP's JSON; unknown fields are ignored, as the protocol asks.

    Raises:
        DatasetError: it is none.
    """
    try:
        value = json.loads(body)
        if not isinstance(value, dict):
            raise ValueError(f"a JSON object is needed, not {type(value).__name__}")
        found = ExportTraceServiceRequest()
        json_format.ParseDict(_with_base64_ids(value), found, ignore_unknown_fields=True)
    except (ValueError, RecursionError, json_format.ParseError) as error:
        raise DatasetError(f"it is no OTLP trace request in JSON: {error!s:.300}") from error
    return found


def encode_json(request: ExportTraceServiceRequest) -> str:
    """Write a request as one line of OTLP's JSON, as a collector's file exporter does."""
    value = json_format.MessageToDict(request, use_integers_for_enums=True)
    return json.dumps(_with_hex_ids(value), ensure_ascii=False, separators=(",", ":"))


def _with_base64_ids(value: object) -> object:
    if isinstance(value, dict):
        return {
            key: base64.b64encode(bytes.fromhex(item)).decode()
            if key in HEX_IDS and isinstance(item, str)
            else _with_base64_ids(item)
            for key, item in value.items()
        }
    return [_with_base64_ids(item) for item in value] if isinstance(value, list) else value


def _with_hex_ids(value: object) -> object:
    if isinstance(value, dict):
        return {
            key: base64.b64decode(item).hex() if key in HEX_IDS and isinstance(item, str) else _with_hex_ids(item)
            for key, item in value.items()
        }
    return [_with_hex_ids(item) for item in value] if isinstance(value, list) else value


def read_request(request: ExportTraceServiceRequest) -> Decoded:
    """Return the spans of a request; one without valid ids is refused alone."""
    spans: list[RawSpan] = []
    refused: list[str] = []
    for group in request.resource_spans:
        resource = read_attributes(group.resource.attributes)
        for scoped in group.scope_spans:
            for span in scoped.spans:
                if len(span.trace_id) != 16 or len(span.span_id) != 8 or not any(span.trace_id):
                    refused.append(f"span {span.name!r:.80} has no valid trace id and span id")
                else:
                    spans.append(_read_span(span, resource, scoped.scope.name))
    return Decoded(spans=spans, refused=refused)


def _read_span(span: ProtoSpan, resource: Attributes, scope: str) -> RawSpan:
    return RawSpan(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex() if any(span.parent_span_id) else None,
        name=span.name,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        is_error=span.status.code == ProtoStatus.STATUS_CODE_ERROR,
        error=span.status.message or None,
        has_remote_parent=bool(span.flags & IS_REMOTE),
        attributes=read_attributes(span.attributes),
        events=[
            RawEvent(name=one.name, time_ns=one.time_unix_nano, attributes=read_attributes(one.attributes))
            for one in span.events
        ],
        links=[
            {
                "trace_id": one.trace_id.hex(),
                "span_id": one.span_id.hex(),
                "attributes": read_attributes(one.attributes),
            }
            for one in span.links
        ],
        resource=resource,
        scope=scope,
        dropped=span.dropped_attributes_count + span.dropped_events_count,
    )


def read_attributes(found: Iterable[KeyValue]) -> Attributes:
    """Return attributes as JSON values; bytes become base64."""
    return {one.key: _read_value(one.value) for one in found}


def _read_value(value: AnyValue) -> object:
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    if kind == "array_value":
        return [_read_value(one) for one in value.array_value.values]
    if kind == "kvlist_value":
        return read_attributes(value.kvlist_value.values)
    if kind == "bytes_value":
        return base64.b64encode(value.bytes_value).decode()
    found: object = getattr(value, kind)
    return found


def write_attributes(found: Mapping[str, object]) -> list[KeyValue]:
    """Return attributes for the wire. Strings, numbers and truths go as they are, all else as JSON text."""
    return [KeyValue(key=key, value=_write_value(value)) for key, value in found.items()]


def _write_value(value: object) -> AnyValue:
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    if isinstance(value, str):
        # A lone surrogate is no text that protobuf can carry.
        return AnyValue(string_value=value.encode("utf-8", "replace").decode())
    return AnyValue(string_value=json.dumps(value))
