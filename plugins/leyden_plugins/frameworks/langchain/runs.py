"""The tree of LangChain runs that are open: from run ids to spans, roles and frames.

LangChain reports graphs, nodes, chains, prompts and parsers all as chain runs. Which is which shows late: a
chain run is a graph once a node starts below it, and a node is the first run with a new checkpoint namespace.
So a chain run gets its span when it turns out to be a graph, or the named chain around a model call.

This module imports nothing of LangChain.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from enum import StrEnum
from uuid import UUID

from leyden import context, wire
from leyden.context import Frame, OpenSpan, RolloutContext
from leyden.spans import Kind, Status, now_ns

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


class Runs:
    """The open runs of this process, shared by every handler, so that two handlers record one run once."""

    def __init__(self) -> None:
        self.by_id: weakref.WeakValueDictionary[UUID, Run] = weakref.WeakValueDictionary()
        """Weak, because a cancelled model call never ends: its parent holds it, or the frame of its task."""
        self.roots: set[Run] = set()
        """Outermost runs other than model calls; these always report their end."""

    def get(self, run_id: UUID | None) -> Run | None:
        """Return an open run."""
        return self.by_id.get(run_id) if run_id is not None else None

    def add(self, run_id: UUID, parent_id: UUID | None, name: str, metadata: Mapping[str, object] | None) -> Run | None:
        """Start to follow a run; `None` when it is followed already, or when nobody wants to know."""
        if run_id in self.by_id:
            return None
        parent = self.get(parent_id)
        run = Run(run_id, name, parent, context.current(), metadata or {})
        if run.rollout is None and wire.default_routing() is None:
            return None
        self.by_id[run_id] = run
        if parent is not None:
            parent.children.add(run)
        return run

    def start_chain(
        self, run_id: UUID, parent_id: UUID | None, name: str, metadata: Mapping[str, object] | None
    ) -> None:
        """Follow a chain run; a node gets its span and frame at once."""
        run = self.add(run_id, parent_id, name, metadata)
        if run is None:
            return
        parent = run.parent
        if parent is None:
            self.roots.add(run)
        elif run.namespace and run.namespace != parent.namespace:
            self.start_node(run, parent, metadata or {})

    def start_node(self, run: Run, graph: Run, metadata: Mapping[str, object]) -> None:
        """Give a node its role and span; its parent is a graph, which shows only now."""
        if graph.kind is RunKind.CHAIN:
            self.promote(graph)
            if not run.is_in_inner_scope(graph, run.outer):
                run.role, run.parent_span_id = graph.role, graph.span_id
        node = str(metadata.get("langgraph_node") or run.name)
        run.kind = RunKind.NODE
        is_ready_made = metadata.get("ls_integration") == "langchain_create_agent"
        speaks_for_graph = node in GENERIC_NODES and (graph.is_named or graph.parent is not None or is_ready_made)
        run.role = run.named_role or (graph.role if speaks_for_graph else node)
        run.open(Kind.AGENT, node, {"gen_ai.agent.name": run.role, "langgraph.node": node})
        if run.rollout is not None:
            run.rollout.declared_roles.add(run.role)
        context.enter(run.frame())

    def promote(self, run: Run) -> None:
        """Open the span of a graph or named chain, and decide its role.

        An unnamed graph inside a tool speaks under the tool's name: metadata would give it its caller's.
        """
        run.kind = RunKind.AGENT
        inherited = run.parent.agent_name if run.parent else None
        if run.named_role:
            run.role, run.is_named = run.named_role, True
        elif run.agent_name and run.agent_name != inherited:
            run.role, run.is_named = str(run.agent_name), True
        elif is_name(run.name):
            run.role, run.is_named = run.name, True
        else:
            tool = next((other for other in run.ancestors() if other.kind is not RunKind.CHAIN), None)
            if tool is not None and tool.kind is RunKind.TOOL:
                run.role = tool.name
        run.open(Kind.AGENT, run.name, {"gen_ai.agent.name": run.role})

    def start_tool(
        self,
        run_id: UUID,
        parent_id: UUID | None,
        name: str,
        metadata: Mapping[str, object] | None,
        attributes: Mapping[str, object],
    ) -> None:
        """Follow a tool run."""
        run = self.add(run_id, parent_id, name, metadata)
        if run is None:
            return
        if run.parent is None:
            self.roots.add(run)
        run.kind = RunKind.TOOL
        run.open(Kind.TOOL, name, {"gen_ai.tool.name": name, **attributes})
        context.enter(run.frame())

    def start_model(
        self, run_id: UUID, parent_id: UUID | None, name: str, metadata: Mapping[str, object] | None
    ) -> Run | None:
        """Follow a model call; its frame tells the wire whose HTTP request comes next."""
        run = self.add(run_id, parent_id, name, metadata)
        if run is None:
            return None
        run.kind = RunKind.MODEL
        self.name_chain_around(run)
        run.open(Kind.MODEL_CALL, name, {"gen_ai.operation.name": "chat"})
        context.enter(run.frame())
        return run

    def name_chain_around(self, run: Run) -> None:
        """Outside any graph, let the nearest chain that the user named speak."""
        around = list(run.ancestors())
        chain = next((other for other in around if is_name(other.name)), None)
        if chain is None or any(other.kind is not RunKind.CHAIN for other in around):
            return
        if (run.role, run.parent_span_id) != (chain.role, chain.span_id):
            return  # the user opened a scope in between
        self.promote(chain)
        for other in (run, *around[: around.index(chain)]):
            other.role, other.parent_span_id = chain.role, chain.span_id

    def end(self, run_id: UUID, status: Status, error: str | None, attributes: Mapping[str, object]) -> None:
        """Close a run, and before it whatever is still open inside: a cancelled model call reports no end."""
        run = self.by_id.pop(run_id, None)
        if run is None:
            return
        self.roots.discard(run)
        if run.parent is not None:
            run.parent.children.discard(run)
        self.close(run, status, error, attributes)

    def close(self, run: Run, status: Status, error: str | None, attributes: Mapping[str, object]) -> None:
        """Close a run's span after those of its children."""
        left = Status.CANCELLED if status is Status.CANCELLED else Status.ABANDONED
        for child in list(run.children):
            self.by_id.pop(child.run_id, None)
            self.close(child, left, f"still open when {run.name!r} ended", {})
        run.children.clear()
        run.is_closed = True
        if run.span is not None:
            if run.span.attributes.get("leyden.stream") == "interrupted" and status is Status.OK:
                status, error = Status.INTERRUPTED, "the stream ended before its last event"
            run.span.close(status, error, **attributes)


def is_name(name: str) -> bool:
    """Say whether a chain run bears a name that somebody gave it, rather than its class's."""
    return name != UNNAMED_GRAPH and not name.startswith("Runnable")
