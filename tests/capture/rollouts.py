"""Rollouts to capture in, without trainer or store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from leyden.context import RolloutContext, rollout_scope
from leyden.roles import Route, Routing
from leyden.spans import Kind, Mode, Record, Span

GATEWAY_TOKEN = "gateway-token"


@dataclass
class Recorded:
    """A rollout and what it recorded."""

    context: RolloutContext
    records: list[Record] = field(default_factory=list)

    def spans(self, kind: Kind) -> list[Span]:
        """Return the spans of one kind in the order they started."""
        found = [record for record in self.records if isinstance(record, Span) and record.kind is kind]
        return sorted(found, key=lambda span: span.start_ns)

    @property
    def calls(self) -> list[Span]:
        return self.spans(Kind.MODEL_CALL)

    def parent_of(self, span: Span) -> Span:
        return next(other for other in self.records if isinstance(other, Span) and other.span_id == span.parent_id)


def routing_to(base_url: str, *roles: str, **options: object) -> Routing:
    """Route `roles` to policy `sql`; no role at all routes every one."""
    route = Route(model="sql", roles=roles or None)
    return Routing(base_url=base_url, token=GATEWAY_TOKEN, routes=(route,), **options)  # type: ignore[arg-type]


@contextmanager
def rollout(
    routing: Routing | None = None, rollout_id: str = "r1", timeout_seconds: float | None = None
) -> Iterator[Recorded]:
    """Run the block as one rollout."""
    records: list[Record] = []
    context = RolloutContext(
        rollout_id=rollout_id,
        attempt=1,
        mode=Mode.TRAIN,
        sink=records.append,
        routing=routing,
        timeout_seconds=timeout_seconds,
    )
    with rollout_scope(context):
        yield Recorded(context, records)
