"""From the spans of a trace to a rollout with its records.

One idea: a trace is a rollout; who speaks in a span is the nearest agent around it.
One trap: apps are often instrumented twice (the framework and the client below it), and then a call stands in a trace
twice, one span inside the other. Only the one that says more counts as a model call.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from leyden.errors import DatasetError
from leyden.interfaces import RolloutRecords
from leyden.roles import MAIN_ROLE
from leyden.spans import Kind, Mode, Reward, Rollout, RolloutState, Span, Status
from leyden_plugins.traces.otel.dialects import Reading, read
from leyden_plugins.traces.otel.dialects.reading import INPUT, OUTPUT, items, parsed, text
from leyden_plugins.traces.otel.exact import completion
from leyden_plugins.traces.otel.ours import EVALUATION, is_ours, read_ours
from leyden_plugins.traces.otel.spans import RawSpan

NO_ROOT = "its root span never came"


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the user says of traces."""

    task_from: str | None = None
    """Attribute that holds the task; `None`: what the root span was given."""
    role_from: str | None = None
    """Attribute that names who speaks, on a span or one around it; `None`: the agents that instrumentations name."""
    role: Callable[[Span], str | None] | None = None
    """Called with every span, its `role` as it would be; returns another one, or `None` to leave it."""
    without_root: bool = False
    """A trace whose root went elsewhere is as good as any."""


@dataclass(kw_only=True)
class Assembled:
    """A rollout, and what was noticed."""

    records: RolloutRecords
    noticed: Counter[str] = field(default_factory=Counter)


def assemble(spans: Sequence[RawSpan], rules: Rules, *, known_roles: Mapping[str, str] | None = None) -> Assembled:
    """Return the rollout of a trace's spans, in any order, each id once.

    Args:
        spans: at least one, all of one trace.
        rules: of the user.
        known_roles: span id -> role of spans of this trace that are stored already.

    Raises:
        DatasetError: the trace is an export of Leyden's, and damaged; or the user's function fails.
    """
    if is_ours(spans):
        return Assembled(records=read_ours(spans))
    return _Assembly(spans, rules, known_roles or {}).result()


class _Assembly:
    def __init__(self, spans: Sequence[RawSpan], rules: Rules, known_roles: Mapping[str, str]) -> None:
        self.spans = sorted(spans, key=lambda one: one.start_ns)
        self.rules = rules
        self.known_roles = known_roles
        self.by_id = {one.span_id: one for one in self.spans}
        self.readings = {one.span_id: read(one) for one in self.spans}
        self.noticed: Counter[str] = Counter()
        self.tops = [one for one in self.spans if one.parent_id not in self.by_id]
        roots = [one for one in self.tops if one.parent_id is None or one.has_remote_parent]
        self.has_root = bool(roots) or rules.without_root
        self.root = next(iter(roots or self.tops or self.spans))  # all others: parents in a circle
        self.wrappers = self._wrappers()

    def result(self) -> Assembled:
        spans = [self._span(one) for one in self.spans]
        roles = {one.span_id: one.role for one in spans}
        rollout_id = self.root.trace_id
        found = [
            completion(one, reading.response, rollout_id=rollout_id, role=roles[one.span_id])
            for one in self.spans
            if (reading := self.readings[one.span_id]).response and self._kind(one) is Kind.MODEL_CALL
        ]
        for one in self.spans:
            if one.dropped:
                self.noticed["attributes and events that senders had cut off"] += one.dropped
        return Assembled(
            records=RolloutRecords(
                rollout=self._rollout(),
                spans=spans,
                completions=[one for one in found if one is not None],
                rewards=self._rewards(),
            ),
            noticed=self.noticed,
        )

    # ---- the rollout

    def _rollout(self) -> Rollout:
        task = self._task()
        key = hashlib.sha256(msgspec.json.encode(task, order="sorted")).hexdigest()[:16]
        failed = next((one for one in self.tops if one.is_error), None)
        error: str | None = None
        error_type: str | None = None
        if failed is not None:
            error, error_type = _error(failed) or "it failed", _error_type(failed)
        elif not self.has_root:
            error, error_type = NO_ROOT, "Incomplete"
            self.noticed["traces without their root span, which count as failed (see --without-root)"] += 1
        return Rollout(
            rollout_id=self.root.trace_id,
            task=task,
            task_id=key,
            group_id=key,
            mode=Mode.RECORDED,
            step=0,
            state=RolloutState.SUCCEEDED if error is None else RolloutState.FAILED,
            attempt=1,
            output=_plain(self.readings[self.root.span_id].answered),
            error=error,
            error_type=error_type,
            started_ns=self.root.start_ns,
            ended_ns=max(self.root.end_ns, self.root.start_ns),
        )

    def _task(self) -> object:
        name = self.rules.task_from
        if name is not None:
            for one in [self.root, *self.spans]:
                for where in (one.attributes, one.resource):
                    if name in where:
                        return parsed(where[name])
            self.noticed[f"traces without the attribute {name!r}, each a task of its own"] += 1
            return {"trace_id": self.root.trace_id}
        asked = self.readings[self.root.span_id].asked
        if asked is None:
            calls = [one for one in self.spans if self._kind(one) is Kind.MODEL_CALL]
            asked = next((found for one in calls if (found := self.readings[one.span_id].told.get(INPUT))), None)
        if asked is None:
            self.noticed["traces that do not say what was asked, each a task of its own"] += 1
            return {"trace_id": self.root.trace_id}
        return _plain(asked)

    def _rewards(self) -> list[Reward]:
        """Return evaluations that came as events, of several equal ones each with an index."""
        seen: Counter[tuple[str, str | None]] = Counter()
        found = []
        for one in self.spans:
            for event in one.events:
                value = event.attributes.get("gen_ai.evaluation.score.value")
                if event.name != EVALUATION or isinstance(value, bool) or not isinstance(value, int | float):
                    continue
                if value != value or value in (float("inf"), float("-inf")):
                    continue
                target = one.span_id if self._kind(one) is Kind.MODEL_CALL else None
                name = text(event.attributes.get("gen_ai.evaluation.name")) or "reward"
                found.append(
                    Reward(
                        rollout_id=self.root.trace_id,
                        attempt=1,
                        name=name,
                        value=float(value),
                        target_span=target,
                        index=seen[name, target],
                    )
                )
                seen[name, target] += 1
        return found

    # ---- spans

    def _span(self, raw: RawSpan) -> Span:
        reading = self.readings[raw.span_id]
        kind = self._kind(raw)
        if raw is self.root and kind is Kind.EVENT:
            kind = Kind.ROLLOUT
        attributes = {name: value for name, value in raw.attributes.items() if name not in reading.consumed}
        attributes |= reading.told
        attributes |= self._beside(raw)
        is_open = raw.end_ns < raw.start_ns
        status = Status.ERROR if raw.is_error else Status.ABANDONED if is_open else Status.OK
        span = Span(
            span_id=raw.span_id,
            parent_id=raw.parent_id,
            rollout_id=raw.trace_id,
            attempt=1,
            kind=kind,
            name=raw.name,
            role=self._role(raw),
            start_ns=raw.start_ns,
            end_ns=max(raw.end_ns, raw.start_ns),
            status=status,
            error=_error(raw) if raw.is_error else None,
            attributes=attributes,
        )
        role = self._users_role(span)
        return msgspec.structs.replace(span, role=role) if role else span

    def _users_role(self, span: Span) -> str | None:
        if self.rules.role is None:
            return None
        try:
            role = self.rules.role(span)
        except Exception as error:
            raise DatasetError(f"the function of --role-from raised {type(error).__name__}: {error}") from error
        if role is not None and not isinstance(role, str):
            raise DatasetError(f"the function of --role-from returned {role!r:.80}; return a role or None")
        return role

    def _kind(self, raw: RawSpan) -> Kind:
        if raw.span_id in self.wrappers:
            return Kind.EVENT
        return self.readings[raw.span_id].kind or Kind.EVENT

    def _beside(self, raw: RawSpan) -> dict[str, object]:
        """Return what our spans have no field for."""
        parent = self.by_id.get(raw.parent_id or "")
        found: dict[str, object] = {}
        if raw.span_id in self.wrappers:
            found["otel.wraps"] = self.wrappers[raw.span_id]
        if raw.resource and (parent is None or parent.resource != raw.resource):
            found["otel.resource"] = raw.resource
        if raw.scope:
            found["otel.scope.name"] = raw.scope
        if raw.events:
            found["otel.events"] = [
                {"name": one.name, "time_ns": one.time_ns, "attributes": one.attributes} for one in raw.events
            ]
        if raw.links:
            found["otel.links"] = list(raw.links)
        return found

    def _around(self, raw: RawSpan) -> list[RawSpan]:
        """Return a span and those around it, innermost first; parents in a circle end where they began."""
        found: dict[str, RawSpan] = {}
        one: RawSpan | None = raw
        while one is not None and one.span_id not in found:
            found[one.span_id] = one
            one = self.by_id.get(one.parent_id or "")
        return list(found.values())

    def _role(self, raw: RawSpan) -> str:
        around = self._around(raw)
        for one in around:
            reading = self.readings[one.span_id]
            said = text(one.attributes.get(self.rules.role_from)) if self.rules.role_from else _agent(one, reading)
            if said:
                return said
        return self.known_roles.get(around[-1].parent_id or "", MAIN_ROLE)

    def _wrappers(self) -> dict[str, str]:
        """Return model calls that are recorded by another span too: span id -> the other's."""
        found: dict[str, str] = {}
        for one in self.spans:
            for each in self._around(one)[1:]:
                if not self._is_same(one, each):
                    continue
                if self._says(one) >= self._says(each):
                    found[each.span_id] = one.span_id
                else:
                    found[one.span_id] = each.span_id
        self.noticed["spans of model calls and tools that another span records too"] += len(found)
        self.noticed = +self.noticed
        return found

    def _is_same(self, inner: RawSpan, outer: RawSpan) -> bool:
        """Say whether a span inside another one is the same operation; a tool may well call another tool."""
        kind = self.readings[inner.span_id].kind
        if kind is not self.readings[outer.span_id].kind:
            return False
        return kind is Kind.MODEL_CALL or (kind is Kind.TOOL and self._tool(inner) == self._tool(outer))

    def _tool(self, raw: RawSpan) -> object:
        return self.readings[raw.span_id].told.get("gen_ai.tool.name", raw.attributes.get("gen_ai.tool.name"))

    def _says(self, raw: RawSpan) -> int:
        said = {**raw.attributes, **self.readings[raw.span_id].told}
        return sum(name in said for name in (INPUT, OUTPUT, "gen_ai.tool.call.arguments", "gen_ai.tool.call.result"))


def _agent(raw: RawSpan, reading: Reading) -> str | None:
    if reading.agent is None and reading.kind is Kind.AGENT:
        return raw.name.removeprefix("invoke_agent").strip() or None
    return reading.agent


def _error(raw: RawSpan) -> str | None:
    told = [text(one.attributes.get("exception.message")) for one in raw.events if one.name == "exception"]
    return raw.error or next((one for one in told if one), None)


def _error_type(raw: RawSpan) -> str | None:
    told = [text(one.attributes.get("exception.type")) for one in raw.events if one.name == "exception"]
    return text(raw.attributes.get("error.type")) or next((one for one in told if one), None)


def _plain(value: object) -> object:
    """Return a conversation of a single message, instructions aside, as its text; all else as it is."""
    messages = [one for one in items(value) if one.get("role") != "system"]
    if isinstance(value, list) and len(messages) == 1 and isinstance(messages[0].get("content"), str):
        return messages[0]["content"]
    return value
