"""The tree of LangChain runs that are open: from run ids to spans, roles and frames.

LangChain reports graphs, nodes, chains, prompts and parsers all as chain runs. Which is which shows late: a
chain run is a graph once a node starts below it, and a node is the first run with a new checkpoint namespace.
So a chain run gets its span when it turns out to be a graph, or the named chain around a model call.

This module imports nothing of LangChain.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from uuid import UUID

from leyden import context, wire
from leyden.spans import Kind, Status
from leyden_plugins.frameworks.langchain.run import GENERIC_NODES, Run, RunKind, is_name, never_asked

logger = logging.getLogger(__name__)


class Runs:
    """The open runs of this process, shared by every handler, so that two handlers record one run once."""

    def __init__(self) -> None:
        self.by_id: weakref.WeakValueDictionary[UUID, Run] = weakref.WeakValueDictionary()
        """Weak, because a cancelled model call never ends: its parent holds it, or the frame of its task."""
        self.roots: set[Run] = set()
        """Outermost runs other than model calls; these always report their end."""
        self.are_hooked = False
        """Whether the automatic form is installed, without which completion models are asked outside their frames."""

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

    def end_model(self, run: Run, attributes: Mapping[str, object]) -> None:
        """Close a model call that was answered; when nobody on its route was asked, its rollout must not count."""
        run.note_request()
        if not run.has_asked:
            # Runs that were started together may have told the wire each other's names.
            for other in [reference() for reference in self.by_id.valuerefs()]:
                if other is not None and run in other.around():
                    other.note_request()
        error = None if run.has_asked else never_asked(run)
        if error is None or run.rollout is None:
            self.end(run.run_id, Status.OK, None, attributes)
            return
        logger.error("%s", error)
        run.rollout.infrastructure_error = error
        self.end(run.run_id, Status.ERROR, str(error), attributes)

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
        if run.kind is RunKind.MODEL:
            run.note_request()
        if run.span is not None:
            if run.span.attributes.get("leyden.stream") == "interrupted" and status is Status.OK:
                status, error = Status.INTERRUPTED, "the stream ended before its last event"
            run.span.close(status, error, **attributes)
