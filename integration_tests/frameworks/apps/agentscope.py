"""The contract app in AgentScope 2.x: plain user code.

Where there is a `TeamPipeline` (from 2.0.9 on), the planner leads a team and assigns the work; before it, plain code
passes the plan on. The critic sends the worker back once. All three agents share one model object.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import agentscope.pipeline
from agentscope.agent import Agent, InjectionConfig
from agentscope.credential import OpenAICredential
from agentscope.message import Msg, UserMsg
from agentscope.model import OpenAIChatModel
from agentscope.permission import PermissionContext, PermissionMode
from agentscope.state import AgentState
from agentscope.tool import FunctionTool, Toolkit

HAS_TEAMS = hasattr(agentscope.pipeline, "TeamPipeline")

MODES = ("async", "async-stream")
SHARED = False
CALLS = {"planner": 2 if HAS_TEAMS else 1, "worker": 3, "critic": 2}
TOOLS = {"search": 2}
HANDOFFS = {"planner->worker": 1} if HAS_TEAMS else {}

PLAIN = InjectionConfig(inject_runtime_state=False)
"""Without it AgentScope tells every agent the time."""


async def search(query: str) -> str:
    """Search the library.

    Args:
        query (str): what for
    """
    return f"found {query}"


def build(base_url: str, *, stream: bool, sync: bool) -> Callable[[str], object]:
    """Return the episode: a task in, the worker's last answer out."""
    credential = OpenAICredential(api_key="user-key", base_url=base_url)
    model = OpenAIChatModel(credential, "user-model", stream=stream, max_retries=0, client_kwargs={"max_retries": 1})

    def agent(name: str, prompt: str, toolkit: Toolkit | None = None) -> Agent:
        state = AgentState(permission_context=PermissionContext(mode=PermissionMode.BYPASS))
        return Agent(name, f"[[role={name}]] {prompt}", model, toolkit=toolkit, state=state, injection_config=PLAIN)

    planner = agent("planner", "Assign the work, then sum up.")
    worker = agent("worker", "Search, then answer.", Toolkit(tools=[FunctionTool(search)]))
    critic = agent("critic", "Say APPROVE or REVISE.")

    async def say(speaker: Agent, text: str) -> str:
        if not stream:
            return text_of(await speaker.reply(UserMsg("user", text)))
        last = None
        async for event in speaker.reply_stream(UserMsg("user", text), yield_final_msg=True):
            last = event if isinstance(event, Msg) else last
        return text_of(last)

    async def first_draft(task: str) -> str:
        if not HAS_TEAMS:
            return await say(worker, f"{task}\nPlan: {await say(planner, task)}")
        member = agentscope.pipeline.TeamMember(agent=worker, description="answers")
        team = agentscope.pipeline.TeamPipeline(planner, [member], reset_members=False)
        async for _ in team.reply_stream(UserMsg("user", task)):
            pass
        return text_of(worker.state.context[-1])

    async def episode(task: str) -> str:
        draft = await first_draft(task)
        while True:
            await critic.observe(UserMsg("worker", f"{task}\nAnswer: {draft}"))
            review = await say(critic, "Judge the last answer.")
            if "APPROVE" in review:
                return draft
            draft = await say(worker, f"{task}\n{review}")

    return episode


def text_of(message: Any) -> str:
    """Return a message's text."""
    return str(message.get_text_content())
