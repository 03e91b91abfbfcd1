"""The automatic form: four methods of `Agent`, around whatever middlewares an agent has.

One idea: `_reply` and `_acting` are where AgentScope itself starts its chains of middlewares. Wrapping them needs no
hand in an agent's construction: it sees the agents that a script made before Leyden came, and leaves none behind.
Pipelines are wrapped only to declare the agents that have not spoken yet.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import AsyncGenerator
from types import ModuleType
from typing import Any

from leyden.errors import ConfigurationError
from leyden.patching import Patches, forget_import, when_imported
from leyden_plugins.frameworks.agentscope.recorder import RECORDER, declare, is_wanted

AGENT_METHODS = ("_reply", "_acting", "compress_context", "observe")

PIPELINES = (("agentscope.pipeline", ("GoalPipeline", "TeamPipeline")), ("agentscope.sop", ("SOPEngine",)))
"""Module -> its classes; older versions have not all of them."""

WORKING_VERSIONS = "agentscope 2.0.7 to 2.0.10"


class Hooks:
    """Everything the automatic form installs."""

    def __init__(self) -> None:
        self.is_on = True
        """False after `remove`: somebody may have patched on top of us and still call our functions."""
        self.patches = Patches()

    def install(self) -> None:
        """Install all of it.

        Raises:
            ConfigurationError: a hook point is missing in this version.
        """
        agent = agent_class()
        self.patch_replies(agent)
        self.patch_tools(agent)
        self.patch_context(agent)
        for module, _ in PIPELINES:
            when_imported(module, self.patch_pipelines)

    def remove(self) -> None:
        """Undo `install`."""
        self.is_on = False
        for module, _ in PIPELINES:
            forget_import(module, self.patch_pipelines)
        self.patches.restore()

    def patch_replies(self, agent_type: Any) -> None:
        """Record every reply, whichever of the public methods asks for it."""
        reply = vars(agent_type)["_reply"]

        @functools.wraps(reply)
        def recorded(agent: Any, *args: Any, **options: Any) -> AsyncGenerator[Any, None]:
            events: AsyncGenerator[Any, None] = reply(agent, *args, **options)
            return RECORDER.reply(agent, events) if self.is_on else events

        self.patches.replace(agent_type, "_reply", recorded)

    def patch_tools(self, agent_type: Any) -> None:
        """Record every tool call that is run."""
        acting = vars(agent_type)["_acting"]

        @functools.wraps(acting)
        def recorded(agent: Any, tool_call: Any) -> AsyncGenerator[Any, None]:
            chunks: AsyncGenerator[Any, None] = acting(agent, tool_call)
            return RECORDER.act(agent, tool_call, chunks) if self.is_on else chunks

        self.patches.replace(agent_type, "_acting", recorded)

    def patch_context(self, agent_type: Any) -> None:
        """Name the agent that sums up its context outside any reply, and see what else fills its memory."""
        compress, observe = vars(agent_type)["compress_context"], vars(agent_type)["observe"]

        @functools.wraps(compress)
        async def named(agent: Any, *args: Any, **options: Any) -> None:
            if self.is_on:
                await RECORDER.compress(agent, lambda: compress(agent, *args, **options))
            else:
                await compress(agent, *args, **options)

        @functools.wraps(observe)
        async def claimed(agent: Any, *args: Any, **options: Any) -> None:
            if self.is_on:
                RECORDER.claim(agent)
            await observe(agent, *args, **options)

        self.patches.replace(agent_type, "compress_context", named)
        self.patches.replace(agent_type, "observe", claimed)

    def patch_pipelines(self, module: ModuleType) -> None:
        """Declare the agents of a pipeline when it starts, also those that will be silent."""
        for name in dict(PIPELINES)[module.__name__]:
            pipeline_type = vars(module).get(name)
            if pipeline_type is not None and "reply_stream" in vars(pipeline_type):
                self.patches.replace(pipeline_type, "reply_stream", self.declaring(vars(pipeline_type)["reply_stream"]))

    def declaring(self, reply_stream: Any) -> Any:
        """Return `reply_stream` of a pipeline, which also declares its roles."""

        @functools.wraps(reply_stream)
        def declared(pipeline: Any, *args: Any, **options: Any) -> Any:
            if self.is_on and is_wanted():
                declare(pipeline)
            return reply_stream(pipeline, *args, **options)

        return declared


def agent_class() -> Any:
    """Return AgentScope's `Agent`, once it is sure that it has the hook points.

    Raises:
        ConfigurationError: a hook point is missing in this version; names it and the versions that work.
    """
    agent = vars(importlib.import_module("agentscope.agent")).get("Agent")
    missing = [f"Agent.{name}" for name in AGENT_METHODS if name not in vars(agent)] if agent else ["Agent"]
    if missing:
        version = getattr(importlib.import_module("agentscope"), "__version__", "of an unknown version")
        raise ConfigurationError(
            f"agentscope {version} has no {', '.join(missing)} in agentscope.agent, where Leyden attaches; "
            f"versions known to work: {WORKING_VERSIONS}. AgentScope 1.x has other agents (ReActAgent), which Leyden "
            "does not follow"
        )
    return agent
