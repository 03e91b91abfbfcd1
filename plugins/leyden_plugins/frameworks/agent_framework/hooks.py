"""The automatic form: the few public methods through which every agent, tool and workflow passes.

One idea: class patches see what middleware cannot: agents that the user wrote from `BaseAgent`, executors without an
agent, workflows, and tools exactly as they run.
One trap: `Agent.run` passes through three more `run` methods of its own layers, each of which may also be somebody's
outermost; so all are wrapped, and a run inside a run of the same agent is no new one.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from agent_framework import BaseAgent, Executor, FunctionalWorkflow, FunctionTool, Workflow, WorkflowContext

from leyden import context
from leyden.activity import Activity, unbroken
from leyden.context import Frame
from leyden.errors import ConfigurationError
from leyden.patching import Patches
from leyden.spans import Kind
from leyden_plugins.frameworks.agent_framework.agents import agent_run, given_id, workflow_run
from leyden_plugins.frameworks.agent_framework.runs import end_tool, is_running, is_watching, started, tool_run

WORKING_VERSIONS = "agent-framework-core 1.23 with agent-framework-openai 1.17 and agent-framework-orchestrations 1.4"

HOOK_POINTS = (
    ("BaseAgent", "__init__"),
    ("Executor", "execute"),
    ("FunctionTool", "invoke"),
    ("FunctionalWorkflow", "run"),
    ("ResponseStream", "with_pull_context_manager"),
    ("Workflow", "run"),
    ("WorkflowContext", "add_event"),
)
"""Class and method that must be there."""


def check(framework: ModuleType) -> None:
    """See that every hook point is there.

    Raises:
        ConfigurationError: one is missing; names it and the versions that work.
    """
    missing = [f"{owner}.{name}" for owner, name in HOOK_POINTS if name not in vars(getattr(framework, owner, object))]
    if missing:
        raise ConfigurationError(
            f"agent-framework has no {', '.join(missing)} where Leyden attaches; "
            f"versions known to work: {WORKING_VERSIONS}"
        )


class Hooks:
    """Everything the automatic form installs."""

    def __init__(self) -> None:
        self.patches = Patches()
        self.watched: set[type] = set()
        """Classes whose `run` is wrapped."""

    def install(self) -> None:
        """Wrap everything, the agent classes that exist and those to come."""
        self.watch_new_agents()
        for cls in (BaseAgent, *subclasses(BaseAgent)):
            self.watch_agents(cls)
        for workflow in (Workflow, FunctionalWorkflow):
            self.patches.replace(workflow, "run", watched_workflow(vars(workflow)["run"]))
        self.patches.replace(FunctionTool, "invoke", watched_tool(vars(FunctionTool)["invoke"]))
        self.patches.replace(Executor, "execute", named_executor(vars(Executor)["execute"]))
        self.patches.replace(WorkflowContext, "add_event", watched_events(vars(WorkflowContext)["add_event"]))

    def remove(self) -> None:
        """Undo `install`."""
        self.patches.restore()
        self.watched.clear()

    def watch_new_agents(self) -> None:
        """Wrap the class of an agent that was defined after `install` when its first object is made."""
        original: Callable[..., None] = vars(BaseAgent)["__init__"]
        watch = unbroken(self.watch_agents)

        @functools.wraps(original)
        def init(agent: Any, *args: Any, **options: Any) -> None:
            watch(type(agent))
            original(agent, *args, **options)

        self.patches.replace(BaseAgent, "__init__", init)

    def watch_agents(self, cls: type) -> None:
        """Wrap each `run` that a class of agents has or inherits."""
        for owner in cls.__mro__:
            method = vars(owner).get("run")
            if owner not in self.watched and inspect.isfunction(method):
                self.watched.add(owner)
                self.patches.replace(owner, "run", watched_agent(method))


def subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    """Yield every class below `cls`."""
    for each in cls.__subclasses__():
        yield each
        yield from subclasses(each)


def watched_agent(original: Callable[..., Any]) -> Callable[..., Any]:
    """Record a run of an agent."""

    # The framework inspects the signature of `run`, which `wraps` keeps.
    @functools.wraps(original)
    def run(agent: Any, *args: Any, **options: Any) -> Any:
        if not is_watching() or is_running(agent) or not isinstance(agent, BaseAgent):
            return original(agent, *args, **options)
        run = agent_run(agent, options.get("session"))
        return started(run, lambda: original(agent, *args, **options))

    return run


def watched_workflow(original: Callable[..., Any]) -> Callable[..., Any]:
    """Record a run of a workflow."""

    @functools.wraps(original)
    def run(workflow: Any, *args: Any, **options: Any) -> Any:
        if not is_watching():
            return original(workflow, *args, **options)
        return started(workflow_run(workflow), lambda: original(workflow, *args, **options))

    return run


def watched_tool(original: Callable[..., Any]) -> Callable[..., Any]:
    """Record a call of a tool, with the exception that the framework turns into text for the model."""

    @functools.wraps(original)
    async def invoke(tool: Any, *args: Any, **options: Any) -> Any:
        if not is_watching():
            return await original(tool, *args, **options)
        run = tool_run(tool, options.get("arguments"), options.get("tool_call_id"))
        with run.running():
            result = await original(tool, *args, **options)
            end_tool(run, result)
        return result

    return invoke


def named_executor(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let an executor that calls a model itself speak under its id; an agent inside has a name of its own."""

    @functools.wraps(original)
    async def execute(executor: Any, *args: Any, **options: Any) -> Any:
        role = given_id(executor.id) if is_watching() else None
        if role is None:
            return await original(executor, *args, **options)
        token = context.enter(dataclasses.replace(context.current() or Frame(), role=role))
        try:
            return await original(executor, *args, **options)
        finally:
            context.leave(token)

    return execute


def watched_events(original: Callable[..., Any]) -> Callable[..., Any]:
    """Record a handoff when the workflow says that it has happened."""

    @functools.wraps(original)
    async def add_event(workflow_context: Any, event: Any, *args: Any, **options: Any) -> Any:
        if getattr(event, "type", None) == "handoff_sent" and is_watching():
            record_handoff(event.data)
        return await original(workflow_context, event, *args, **options)

    return add_event


@unbroken
def record_handoff(sent: Any) -> None:
    """Record a handoff; its source has finished speaking, so it is named here."""
    target = given_id(sent.target) or str(sent.target)
    role = given_id(sent.source)
    Activity(Kind.HANDOFF, f"handoff to {target}", role=role, parent=None, **{"leyden.handoff.to": target}).close()
