"""Traces while their spans arrive: split over requests, out of order, twice, or late.

One idea: a trace is closed when its root has come and nothing has for a while. One trap: a root may never come, and
spans may come when their trace is long closed; both are counted and kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from leyden_plugins.traces.otel.spans import RawSpan


@dataclass(kw_only=True)
class OpenTrace:
    """A trace whose spans still arrive."""

    trace_id: str
    offset: int
    """Where the first of its spans stands in the journal."""
    last_seen: float = 0.0
    """Seconds of a clock that never goes back."""
    has_root: bool = False
    spans: dict[str, RawSpan] = field(default_factory=dict)


class Collector:
    """Sorts spans by trace until their traces are due."""

    def __init__(self, *, quiet_seconds: float, rootless_seconds: float, most_spans: int) -> None:
        self._quiet_seconds = quiet_seconds
        self._rootless_seconds = rootless_seconds
        self._most_spans = most_spans
        self._open: dict[str, OpenTrace] = {}
        self._count = 0
        self.duplicates = 0
        """Spans that came twice; the first stands, unless the second has ended and the first had not."""

    def add(self, spans: Iterable[RawSpan], *, offset: int, now: float) -> None:
        """Take spans as they come."""
        for span in spans:
            trace = self._open.get(span.trace_id)
            if trace is None:
                trace = self._open[span.trace_id] = OpenTrace(trace_id=span.trace_id, offset=offset)
            trace.last_seen = now
            trace.has_root |= span.parent_id is None or span.has_remote_parent
            earlier = trace.spans.get(span.span_id)
            if earlier is None:
                self._count += 1
            else:
                self.duplicates += 1
            if earlier is None or earlier.end_ns < earlier.start_ns <= span.end_ns:
                trace.spans[span.span_id] = span

    def due(self, now: float) -> list[OpenTrace]:
        """Take out the traces that are over; where there are too many spans, those that are quiet longest, too."""
        found = [
            one
            for one in self._open.values()
            if now - one.last_seen >= (self._quiet_seconds if one.has_root else self._rootless_seconds)
        ]
        kept = self._count - sum(len(one.spans) for one in found)
        if kept > self._most_spans:
            over = {one.trace_id for one in found}
            for one in sorted(self._open.values(), key=lambda each: each.last_seen):
                if kept > self._most_spans and one.trace_id not in over:
                    found.append(one)
                    kept -= len(one.spans)
        return self._taken(found)

    def all(self) -> list[OpenTrace]:
        """Take out every trace."""
        return self._taken(list(self._open.values()))

    def put_back(self, traces: Iterable[OpenTrace]) -> None:
        """Take traces again that could not be stored."""
        for one in traces:
            newer = self._open.get(one.trace_id)
            if newer is not None:
                self._count -= len(newer.spans)
                one.spans = {**newer.spans, **one.spans}
                one.has_root |= newer.has_root
            one.last_seen = max(one.last_seen, newer.last_seen) if newer else one.last_seen
            self._open[one.trace_id] = one
            self._count += len(one.spans)

    def first_offset(self, end: int) -> int:
        """Return where in the journal the oldest span stands that is not stored; `end` when all are."""
        return min((one.offset for one in self._open.values()), default=end)

    def _taken(self, traces: list[OpenTrace]) -> list[OpenTrace]:
        for one in traces:
            del self._open[one.trace_id]
            self._count -= len(one.spans)
        return traces
