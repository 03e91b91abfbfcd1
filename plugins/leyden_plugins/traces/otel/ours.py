"""Leyden's own records as OTLP spans and back, exactly.

One idea: every span says everything twice: in the names that viewers read (GenAI conventions, OpenInference's kinds),
and as the record itself below `leyden.export.`, which alone is read back. What viewers make of the first cannot harm
the second.
One trap: ids of ours need not be hex, so those of OTLP are derived from them; equal ids in, equal ids out, so a second
export overwrites or is dropped by whoever keeps one span an id.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import msgspec

from leyden.errors import DatasetError
from leyden.extras import extra
from leyden.interfaces import RolloutRecords
from leyden.spans import Completion, Kind, Reward, Rollout, RolloutState, Span, Status
from leyden_plugins.traces.otel.spans import RawSpan, write_attributes

with extra("otel"):
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans
    from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan
    from opentelemetry.proto.trace.v1.trace_pb2 import Status as ProtoStatus

OWN = "leyden.export."
"""Begins what is read back; attributes of the app's that do so are in the record only."""
RECORD = f"{OWN}span"
ROLLOUT = f"{OWN}rollout"
COMPLETIONS = f"{OWN}completions"
REWARDS = f"{OWN}rewards"
EVALUATION = "gen_ai.evaluation.result"

OPENINFERENCE = {
    Kind.ROLLOUT: "CHAIN",
    Kind.AGENT: "AGENT",
    Kind.MODEL_CALL: "LLM",
    Kind.TOOL: "TOOL",
    Kind.REWARD: "EVALUATOR",
}
"""Our kinds in OpenInference's words; all others are CHAIN."""
OPERATIONS = {Kind.AGENT: "invoke_agent", Kind.TOOL: "execute_tool", Kind.MODEL_CALL: "chat"}

Of = TypeVar("Of")


# ---- out -------------------------------------------------------------------------------------------------------


def to_otlp(records: Sequence[RolloutRecords]) -> ExportTraceServiceRequest:
    """Return rollouts as one OTLP request, a trace each."""
    spans = [span for one in records for span in _trace(one)]
    resource = ResourceSpans(scope_spans=[ScopeSpans(spans=spans)])
    resource.resource.attributes.extend(write_attributes({"service.name": "leyden"}))
    resource.scope_spans[0].scope.name = "leyden"
    return ExportTraceServiceRequest(resource_spans=[resource])


def _trace(records: RolloutRecords) -> list[ProtoSpan]:
    """Return a rollout's spans under one that stands for the rollout itself."""
    rollout = records.rollout
    known = {span.span_id for span in records.spans}
    trace_id = _trace_id(rollout)
    root_id = _span_id(f"rollout:{rollout.rollout_id}:{rollout.attempt}", is_ours=False)

    def about(span_id: str | None) -> tuple[list[Completion], list[Reward]]:
        """Return what belongs to a span; the root has what belongs to none that is here."""
        return (
            [one for one in records.completions if (one.span_id if one.span_id in known else None) == span_id],
            [one for one in records.rewards if (one.target_span if one.target_span in known else None) == span_id],
        )

    completions, rewards = about(None)
    found = [_root(rollout, records.spans, completions, rewards)]
    found[0].trace_id, found[0].span_id = trace_id, root_id
    for span in records.spans:
        completions, rewards = about(span.span_id)
        written = _span(span, completions, rewards)
        written.trace_id, written.span_id = trace_id, _span_id(span.span_id)
        written.parent_span_id = _span_id(span.parent_id) if span.parent_id in known else root_id
        found.append(written)
    return found


def _root(
    rollout: Rollout, spans: Sequence[Span], completions: Sequence[Completion], rewards: Sequence[Reward]
) -> ProtoSpan:
    start = rollout.started_ns or min((span.start_ns for span in spans), default=0)
    end = rollout.ended_ns or max((span.end_ns for span in spans), default=start)
    attributes = {
        "openinference.span.kind": "CHAIN",
        "input.value": _shown(rollout.task),
        "output.value": _shown(rollout.output),
        "leyden.rollout.id": rollout.rollout_id,
        "leyden.group.id": rollout.group_id,
        "leyden.mode": rollout.mode.value,
        "leyden.step": rollout.step,
        "leyden.state": rollout.state.value,
        "leyden.reward": rollout.reward,
        ROLLOUT: _text(rollout),
    }
    is_bad = rollout.state in (RolloutState.FAILED, RolloutState.TIMED_OUT, RolloutState.LOST)
    return _proto(
        f"rollout {rollout.rollout_id}", start, max(start, end), attributes, completions, rewards,
        error=(rollout.error or rollout.state.value) if is_bad else None,
    )  # fmt: skip


def _span(span: Span, completions: Sequence[Completion], rewards: Sequence[Reward]) -> ProtoSpan:
    attributes = {
        **{name: value for name, value in span.attributes.items() if not name.startswith(OWN)},
        "openinference.span.kind": OPENINFERENCE.get(span.kind, "CHAIN"),
        "gen_ai.agent.name": span.role,
        "leyden.kind": span.kind.value,
        **_seen(span),
        RECORD: _text(span),
    }
    if span.kind in OPERATIONS:
        attributes.setdefault("gen_ai.operation.name", OPERATIONS[span.kind])
    return _proto(
        span.name, span.start_ns, span.end_ns, attributes, completions, rewards,
        error=None if span.status is Status.OK else span.error or span.status.value,
    )  # fmt: skip


def _seen(span: Span) -> dict[str, object]:
    """Return what viewers show as input and output."""
    known = span.attributes
    if span.kind is Kind.TOOL:
        asked, answered = known.get("gen_ai.tool.call.arguments"), known.get("gen_ai.tool.call.result")
    else:
        asked, answered = known.get("gen_ai.input.messages"), known.get("gen_ai.output.messages")
    shown = {"input.value": _shown(asked), "output.value": _shown(answered)}
    return {name: value for name, value in shown.items() if value and name not in known}


def _proto(
    name: str,
    start: int,
    end: int,
    attributes: Mapping[str, object],
    completions: Sequence[Completion],
    rewards: Sequence[Reward],
    *,
    error: str | None,
) -> ProtoSpan:
    beside = dict(attributes)
    if completions:
        beside[COMPLETIONS] = json.dumps([_packed(one) for one in completions])
    if rewards:
        beside[REWARDS] = json.dumps([msgspec.to_builtins(one) for one in rewards])
    code = ProtoStatus.STATUS_CODE_OK if error is None else ProtoStatus.STATUS_CODE_ERROR
    clean = (error or "").encode("utf-8", "replace").decode()
    span = ProtoSpan(
        name=name.encode("utf-8", "replace").decode(),
        kind=ProtoSpan.SPAN_KIND_INTERNAL,
        start_time_unix_nano=max(0, start),
        end_time_unix_nano=max(0, end),
        attributes=write_attributes({key: value for key, value in beside.items() if value is not None}),
        status=ProtoStatus(code=code, message=clean),
    )
    for one in rewards:
        told = {"gen_ai.evaluation.name": one.name, "gen_ai.evaluation.score.value": one.value}
        span.events.add(name=EVALUATION, time_unix_nano=span.end_time_unix_nano, attributes=write_attributes(told))
    return span


def _trace_id(rollout: Rollout) -> bytes:
    if rollout.attempt <= 1 and re.fullmatch("[0-9a-f]{32}", rollout.rollout_id) and int(rollout.rollout_id, 16):
        return bytes.fromhex(rollout.rollout_id)
    return hashlib.blake2b(f"{rollout.rollout_id}:{rollout.attempt}".encode(), digest_size=16).digest()


def _span_id(span_id: str | None, *, is_ours: bool = True) -> bytes:
    assert span_id is not None
    if is_ours and re.fullmatch("[0-9a-f]{16}", span_id) and int(span_id, 16):
        return bytes.fromhex(span_id)
    return hashlib.blake2b(span_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _shown(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=repr)


def _text(record: Rollout | Span) -> str:
    """Return a record as JSON in ASCII, which carries what protobuf's texts cannot (lone surrogates)."""
    return json.dumps(msgspec.to_builtins(record))


def _packed(completion: Completion) -> dict[str, Any]:
    """Return a completion with its numbers as base64: int32 and float64, little-endian."""
    found = cast("dict[str, Any]", msgspec.to_builtins(completion))
    found["prompt_token_ids"] = _base64("i", completion.prompt_token_ids)
    for choice in found["choices"]:
        choice["token_ids"] = _base64("i", choice["token_ids"])
        choice["logprobs"] = _base64("d", choice["logprobs"])
    return found


def _base64(code: str, numbers: Sequence[float]) -> str:
    return base64.b64encode(array(code, list(numbers)).tobytes()).decode()


# ---- back ------------------------------------------------------------------------------------------------------


def is_ours(spans: Sequence[RawSpan]) -> bool:
    """Say whether a trace is one that Leyden exported."""
    return any(RECORD in span.attributes or ROLLOUT in span.attributes for span in spans)


def read_ours(spans: Sequence[RawSpan]) -> RolloutRecords:
    """Return the records of an exported rollout as they were; in store order.

    Raises:
        DatasetError: a record is damaged, or the rollout's own span is missing.
    """
    rollouts = [_record(one.attributes[ROLLOUT], Rollout) for one in spans if ROLLOUT in one.attributes]
    if not rollouts:
        raise DatasetError(f"trace {spans[0].trace_id!r} was exported by Leyden, but the rollout's own span is missing")
    completions = [
        _unpacked(one) for span in spans for one in cast("list[dict[str, Any]]", _listed(span.attributes, COMPLETIONS))
    ]
    rewards = [_convert(one, Reward) for span in spans for one in _listed(span.attributes, REWARDS)]
    return RolloutRecords(
        rollout=rollouts[0],
        spans=sorted(
            (_record(one.attributes[RECORD], Span) for one in spans if RECORD in one.attributes),
            key=lambda one: one.sequence,
        ),
        completions=sorted(completions, key=lambda one: one.sequence),
        rewards=rewards,
    )


def _listed(attributes: Mapping[str, object], name: str) -> list[object]:
    found = _json(attributes.get(name))
    return found if isinstance(found, list) else []


def _record(value: object, kind: type[Of]) -> Of:
    return _convert(_json(value), kind)


def _json(value: object) -> object:
    try:
        return json.loads(value) if isinstance(value, str) else value  # some backends give JSON texts back as values
    except ValueError as error:
        raise DatasetError(f"a record of Leyden's is damaged: {error}") from error


def _convert(value: object, kind: type[Of]) -> Of:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise DatasetError(f"a {kind.__name__} of Leyden's is damaged: {error}") from error


def _unpacked(found: dict[str, Any]) -> Completion:
    try:
        numbers = {"prompt_token_ids": _numbers("i", found["prompt_token_ids"])}
        choices = [
            {**one, "token_ids": _numbers("i", one["token_ids"]), "logprobs": _numbers("d", one["logprobs"])}
            for one in found["choices"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"a Completion of Leyden's is damaged: {error!r}") from error
    return _convert({**found, **numbers, "choices": choices}, Completion)


def _numbers(code: str, text: str) -> list[float]:
    return list(array(code, base64.b64decode(text, validate=True)))
