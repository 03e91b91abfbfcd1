"""Who an agent is, which agents a workflow has, and which of them remember a conversation.

One idea: the role is the agent's name. An agent without one speaks as whoever is around it, because the framework
gives it a random id, which no policy could name.
One trap: a workflow keeps its conversation between runs, also between runs that follow each other, and says
nothing; an agent keeps none, except in a session that the caller passes.
"""

from __future__ import annotations

import contextlib
import uuid
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from agent_framework import AgentExecutor, AgentSession, BaseAgent, WorkflowAgent, WorkflowExecutor

from leyden import context
from leyden.activity import Exclusive, unbroken
from leyden.context import RolloutContext
from leyden.errors import ConcurrentUseError
from leyden.spans import Kind
from leyden_plugins.frameworks.agent_framework.runs import Run

EXCLUSIVE = Exclusive()

_served: weakref.WeakKeyDictionary[object, tuple[str, int]] = weakref.WeakKeyDictionary()
"""Workflow -> rollout and attempt whose conversation it holds."""


def role_of(agent: Any) -> str | None:
    """Return the role of an agent: its name, else the id that its author gave it, else `None`."""
    return str(agent.name) if getattr(agent, "name", None) else given_id(getattr(agent, "id", None))


def given_id(text: object) -> str | None:
    """Return an id, or `None` for a random one."""
    try:
        uuid.UUID(str(text))
    except ValueError:
        return str(text) if text else None
    return None


def agent_run(agent: Any, session: object) -> Run:
    """Start an agent.

    Raises:
        ConcurrentUseError: another rollout uses its session now.
    """
    # A workflow that poses as an agent speaks with the voices of those inside it.
    role = None if isinstance(agent, WorkflowAgent) else role_of(agent)
    name = role or role_of(agent) or type(agent).__name__
    give_back = EXCLUSIVE.take(session, f"a session of {name}") if isinstance(session, AgentSession) else None
    run = Run(agent, Kind.AGENT, name, role=role, give_back=give_back, **{"gen_ai.agent.name": role_of(agent)})
    if run.rollout is not None:
        declare(run.rollout, agents_in_tools(agent))
    return run


def workflow_run(workflow: Any) -> Run:
    """Start a workflow; its role is that of whoever is around it.

    Raises:
        ConcurrentUseError: it holds the conversation of another rollout.
    """
    name = str(getattr(workflow, "name", None) or type(workflow).__name__)
    remembers = next(agents_in_workflow(workflow), None) is not None
    give_back = take_workflow(workflow, name, remembers=remembers)
    run = Run(workflow, Kind.AGENT, name, give_back=give_back, **{"gen_ai.workflow.name": name})
    if run.rollout is not None:
        declare(run.rollout, agents_in_workflow(workflow))
    return run


def take_workflow(workflow: object, name: str, *, remembers: bool) -> Callable[[], None]:
    """Note that the current rollout uses `workflow`; return what gives it back.

    Raises:
        ConcurrentUseError: another rollout runs it now, or has left its conversation in it.
    """
    give_back = EXCLUSIVE.take(workflow, name)
    frame = context.current()
    rollout = frame.rollout if frame else None
    if rollout is None or not remembers:
        return give_back
    user = (rollout.rollout_id, rollout.attempt)
    before = _served.setdefault(workflow, user)
    if before != user:
        give_back()
        error = ConcurrentUseError(
            f"workflow {name!r} ran in rollout {before[0]!r} and still holds that conversation, which its agents "
            f"would read in rollout {rollout.rollout_id!r}. Build one for each rollout, inside the agent's function or "
            "with Trainer(leyden.per_rollout(build_agent), ...)"
        )
        rollout.infrastructure_error = error
        raise error
    return give_back


@unbroken
def declare(rollout: RolloutContext, agents: Iterator[Any]) -> None:
    """Declare the roles of agents that may speak."""
    rollout.declared_roles.update(role for role in map(role_of, agents) if role)


def agents_in_workflow(workflow: Any) -> Iterator[Any]:
    """Yield the agents of a workflow and of those inside it; a workflow written as a function tells none."""
    for executor in getattr(workflow, "executors", {}).values():
        if isinstance(executor, AgentExecutor):
            agent = executor.agent
            inner = getattr(agent, "workflow", None) if isinstance(agent, WorkflowAgent) else None
            if inner is not None:
                yield from agents_in_workflow(inner)
            else:
                yield agent
                yield from agents_in_tools(agent)
        elif isinstance(executor, WorkflowExecutor):
            yield from agents_in_workflow(executor.workflow)


def agents_in_tools(agent: Any) -> Iterator[Any]:
    """Yield the agents that an agent may call as tools: those that a tool's function closes over."""
    options = getattr(agent, "default_options", None) or {}
    for tool in options.get("tools") or ():
        for cell in getattr(getattr(tool, "func", None), "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # a cell that is not filled yet
                if isinstance(cell.cell_contents, BaseAgent):
                    yield cell.cell_contents
