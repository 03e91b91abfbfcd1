"""The contract app in Microsoft Agent Framework: plain user code.

The planner hands over to the worker in a handoff workflow; the critic, an agent of its own, sends the worker back once.
Planner and worker speak chat completions, the critic speaks Responses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agent_framework import Agent, AgentResponse, AgentResponseUpdate, Message, tool
from agent_framework.openai import OpenAIChatClient, OpenAIChatCompletionClient
from agent_framework.orchestrations import HandoffBuilder
from openai import AsyncOpenAI

MODES = ("async", "async-stream")
SHARED = True
CALLS = {"planner": 1, "worker": 3, "critic": 2}
TOOLS = {"search": 2}
HANDOFFS = {"planner->worker": 1}


@tool(approval_mode="never_require")
async def search(query: str) -> str:
    """Search the library."""
    return f"found {query}"


def team(base_url: str) -> tuple[Agent[Any], Agent[Any], Agent[Any]]:
    """Return planner, worker and critic; agents keep nothing between runs."""
    user = AsyncOpenAI(base_url=base_url, api_key="user-key", max_retries=1)
    chat = OpenAIChatCompletionClient(model="user-model", async_client=user)
    responses = OpenAIChatClient(model="user-model", async_client=user)
    planner = Agent(
        chat,
        "[[role=planner]] Hand over to the worker.",
        name="planner",
        require_per_service_call_history_persistence=True,
    )
    worker = Agent(
        chat,
        "[[role=worker]] Search, then answer.",
        name="worker",
        tools=[search],
        require_per_service_call_history_persistence=True,
    )
    critic = Agent(responses, "[[role=critic]] Say APPROVE or REVISE.", name="critic", default_options={"store": False})
    return planner, worker, critic


def is_answered(conversation: list[Message]) -> bool:
    """Say whether the worker has spoken."""
    return any(message.author_name == "worker" and message.text for message in conversation)


def build(base_url: str, *, stream: bool, sync: bool) -> Callable[[str], object]:
    """Return the episode: a task in, the worker's last answer out."""
    planner, worker, critic = team(base_url)

    async def run(agent: Agent[Any], messages: list[Message]) -> str:
        if not stream:
            return (await agent.run(messages)).text
        updates = agent.run(messages, stream=True)
        return "".join([update.text async for update in updates])

    async def hand_over(task: str) -> str:
        # A workflow remembers its conversation, so each episode builds one.
        handoff = HandoffBuilder(participants=[planner, worker], termination_condition=is_answered)
        workflow = handoff.with_start_agent(planner).add_handoff(planner, [worker]).build()
        if not stream:
            outputs = (await workflow.run(task)).get_outputs()
            return next(each.text for each in reversed(outputs) if isinstance(each, AgentResponse) and each.text)
        texts = []
        async for event in workflow.run(task, stream=True):
            if event.type == "output" and isinstance(event.data, AgentResponseUpdate):
                texts.append(event.data.text)
        return "".join(texts)

    async def episode(task: str) -> str:
        answer = await hand_over(task)
        while True:
            review = await run(critic, [Message("user", [f"{task}\nAnswer: {answer}"])])
            if "APPROVE" in review:
                return answer
            answer = await run(
                worker, [Message("user", [task]), Message("assistant", [answer]), Message("user", [review])]
            )

    return episode
