"""One open LangChain run: what it is, who speaks in it, its span, and the frame for whatever starts inside.

The idea: a run owns the frame that its start callback sets, because its end callback cannot undo it. The trap: a
model that answers without any request (a cache, a fake, gRPC) looks like one that asked; `has_asked` tells them apart.

This module imports nothing of LangChain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from enum import StrEnum
from uuid import UUID

from leyden import context
from leyden.context import Frame, OpenSpan, RolloutContext
from leyden.errors import ConfigurationError
from leyden.spans import Kind, now_ns
from leyden.wire.calls import attempts_of

ROLE_KEY = "leyden_role"
"""Metadata key with which a user names the role of a runnable."""

GENERIC_NODES = frozenset(
    {
        "model",
        "agent",
        "tools",
        "call_model",
        "llm",
        "generate_structured_response",
        "pre_model_hook",
        "post_model_hook",
    }
)
"""Nodes of ready-made agents; who speaks there is the agent."""

UNNAMED_GRAPH = "LangGraph"
"""The name of a graph that was compiled without one."""


class RunKind(StrEnum):
    """What a LangChain run turned out to be."""

    CHAIN = "chain"
    AGENT = "agent"
    """A graph, or a named chain around a model call."""
    NODE = "node"
    TOOL = "tool"
    MODEL = "model"


class Run:
    """One open LangChain run. It owns the frame that its start callback sets and its end callback cannot undo."""

    __slots__ = (
        "__weakref__",
        "agent_name",
        "children",
        "has_asked",
        "is_closed",
        "is_named",
        "kind",
        "name",
        "named_role",
        "namespace",
        "outer",
        "parent",
        "parent_span_id",
        "role",
        "rollout",
        "run_id",
        "span",
        "start_ns",
    )

    def __init__(
        self, run_id: UUID, name: str, parent: Run | None, outer: Frame | None, metadata: Mapping[str, object]
    ) -> None:
        self.run_id = run_id
        self.name = name
        self.parent = parent
        self.outer = outer
        """The frame that held when this run started."""
        self.kind = RunKind.CHAIN
        self.is_named = False
        self.is_closed = False
        self.has_asked = False
        """A model call: whether a request that left from inside it was seen; granted where that cannot be known."""
        self.span: OpenSpan | None = None
        self.children: set[Run] = set()
        self.start_ns = now_ns()
        self.namespace = str(metadata.get("langgraph_checkpoint_ns") or "")
        self.agent_name = metadata.get("lc_agent_name")
        """Inherited by everything below a `create_agent(name=...)`."""
        self.rollout: RolloutContext | None
        self.role: str
        self.parent_span_id: str | None
        if parent is not None and not self.is_in_inner_scope(parent, outer):
            self.rollout, self.role, self.parent_span_id = parent.rollout, parent.role, parent.span_id
        else:
            frame = outer or Frame()
            self.rollout, self.role, self.parent_span_id = frame.rollout, frame.role, frame.span_id
        named_role = metadata.get(ROLE_KEY)
        self.named_role = str(named_role) if named_role else None
        """What the user named this run, or one around it: LangChain's metadata is inherited."""
        self.role = self.named_role or self.role

    @staticmethod
    def is_in_inner_scope(parent: Run, outer: Frame | None) -> bool:
        """Say whether the user opened a scope, such as `leyden.role`, inside `parent` and around this run."""
        return outer is not None and outer.owner is None and outer is not parent.outer

    @property
    def span_id(self) -> str | None:
        """Return the span that what starts inside this run has as its parent."""
        return self.span.span_id if self.span else self.parent_span_id

    def open(self, kind: Kind, name: str, attributes: Mapping[str, object]) -> None:
        """Open this run's span, from the run's start; a deployed app records none."""
        if self.rollout is None:
            return
        self.span = self.rollout.open(kind, name, self.role, self.parent_span_id)
        self.span.start_ns = self.start_ns
        self.span.attributes.update(attributes)

    def frame(self) -> Frame:
        """Return who calls inside this run."""
        if self.kind is RunKind.MODEL:
            return Frame(self.rollout, self.role, self.parent_span_id, self.span, owner=self, outer=self.outer)
        return Frame(self.rollout, self.role, self.span_id, owner=self, outer=self.outer)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Hold this run's frame for the length of the block, unless it holds already."""
        frame = context.current()
        if frame is not None and frame.owner is self:
            yield
            return
        token = context.enter(self.frame())
        try:
            yield
        finally:
            context.leave(token)

    def ancestors(self) -> Iterator[Run]:
        """Yield the runs around this one, nearest first."""
        run = self.parent
        while run is not None:
            yield run
            run = run.parent

    def around(self) -> Iterator[Run]:
        """Yield the runs around this one, also those that only its context knows: a model that calls another."""
        yield from self.ancestors()
        frame = self.outer
        while frame is not None:
            if isinstance(frame.owner, Run):
                yield frame.owner
            frame = frame.outer

    def note_request(self) -> None:
        """Note whether this model call was seen on the wire; a model that is made of it has then asked as well."""
        if self.rollout is not None and self.span is not None:
            self.has_asked |= self.span.span_id in attempts_of(self.rollout).bodies
        if self.has_asked:
            for other in self.around():
                other.has_asked |= other.kind is RunKind.MODEL


def never_asked(run: Run) -> ConfigurationError | None:
    """Return what is wrong with an answer that came from nowhere, when the call's role is routed."""
    routing = run.rollout.routing if run.rollout else None
    route = routing.route_of(run.span.role) if routing and run.span else None
    if route is None or run.span is None:
        return None
    return ConfigurationError(
        f"role {run.span.role!r} is routed to {route.model!r}, but its model {run.name!r} answered without a request "
        "that Leyden saw. Either an LLM cache answered: give the model cache=False, or leave the attaching to the "
        "trainer, which goes around caches. Or the model calls no HTTP API (a fake or local model, gRPC): give this "
        "role an OpenAI-compatible client, or take it out of the policy"
    )


def is_name(name: str) -> bool:
    """Say whether a chain run bears a name that somebody gave it, rather than its class's."""
    return name != UNNAMED_GRAPH and not name.startswith("Runnable")
