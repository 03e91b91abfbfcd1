"""The explicit form: `Agent(..., middleware=[LeydenMiddleware()])`, by the framework's public middleware.

One idea: the middleware of an agent adds the one for its tools to the run, so that the user names a single object.
One trap: middleware of the same agent that stands before it is outside the agent's span; put it first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from agent_framework import AgentContext, AgentMiddleware, FunctionInvocationContext, FunctionMiddleware
from agent_framework import MiddlewareTermination as Termination

from leyden import activity, wire
from leyden.activity import unbroken
from leyden_plugins.frameworks.agent_framework.agents import agent_run
from leyden_plugins.frameworks.agent_framework.runs import end_tool, is_running, is_watching, observed, tool_run

logger = logging.getLogger(__name__)

HANDOFF_PREFIX = "handoff_to_"
"""How the tools begin that `HandoffBuilder` gives its agents; the workflow answers them and runs nothing."""


class LeydenMiddleware(AgentMiddleware):  # type: ignore[misc, unused-ignore]  # untyped where not installed
    """Records the runs, tools and handoffs of the agents it is given to.

    It patches no class of the framework; it does install Leyden's hook into the HTTP clients `httpx` and `httpx2`,
    because only there can a trained role be sent to the gateway. Unlike the automatic form it sees no workflow, no
    executor without an agent, and no agent that it was not given to.
    """

    def __init__(self) -> None:
        if not wire.is_installed():
            logger.info(
                "LeydenMiddleware installs Leyden's hook into httpx and httpx2; leyden.uninstrument() undoes it"
            )
            wire.install()

    async def process(self, context: AgentContext, call_next: Callable[[], Awaitable[None]]) -> None:
        """Run the agent inside its span."""
        # With the automatic form, or a second middleware of ours, the agent's run is open already.
        if not is_watching() or is_running(context.agent):
            await call_next()
            return
        others = [each for each in context.client_kwargs.get("middleware", ()) if each is not TOOLS]
        context.client_kwargs = {**context.client_kwargs, "middleware": [TOOLS, *others]}
        run = agent_run(context.agent, context.session)
        if not context.stream:
            with run.running():
                await call_next()
            return
        try:
            with run.entered():
                await call_next()
        except BaseException as error:
            run.fail(error)
            raise
        context.result = observed(context.result, run)


class ToolMiddleware(FunctionMiddleware):  # type: ignore[misc, unused-ignore]  # untyped where not installed
    """Records the tools of an agent that has `LeydenMiddleware`."""

    async def process(self, context: FunctionInvocationContext, call_next: Callable[[], Awaitable[None]]) -> None:
        """Call the tool inside its span; a handoff is no tool."""
        if not is_watching():
            await call_next()
        elif context.function.name.startswith(HANDOFF_PREFIX):
            try:
                await call_next()
            except Termination:
                record_handoff(context)
                raise
        else:
            run = tool_run(context.function, context.arguments, context.metadata.get("call_id"))
            with run.running():
                await call_next()
                end_tool(run, context.result)


TOOLS = ToolMiddleware()


@unbroken
def record_handoff(context: Any) -> None:
    """Record to whom the speaker has handed over."""
    activity.handoff(str(json.loads(context.result[0].text)["handoff_to"]))
