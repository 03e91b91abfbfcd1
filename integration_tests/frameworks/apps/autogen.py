"""A user's AutoGen app: in a swarm a planner hands over to a worker with tools; a critic sends the work back once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import TaskResult
from autogen_agentchat.conditions import SourceMatchTermination, TextMentionTermination
from autogen_agentchat.messages import TextMessage
from autogen_agentchat.teams import RoundRobinGroupChat, Swarm
from autogen_ext.models.openai import OpenAIChatCompletionClient

MODES = ("async", "async-stream")
SHARED = False
CALLS = {"planner": 1, "worker": 3, "critic": 2}
TOOLS = {"search": 2, "transfer_to_worker": 1}
HANDOFFS = {"planner->worker": 1}

PLANNER = "[[role=planner]] You plan how to answer a question, then hand over to the worker."
WORKER = "[[role=worker]] You follow the plan and answer the question."
CRITIC = "[[role=critic]] You say APPROVE, or REVISE and why."


async def search(query: str) -> str:
    """Search the archive."""
    await asyncio.sleep(0.002)
    return f"found {query}"


def build(base_url: str, *, stream: bool, sync: bool) -> Callable[[str], Awaitable[object]]:
    """Return the app as one function of the task."""
    client = OpenAIChatCompletionClient(
        model="user-model",
        base_url=base_url,
        api_key="user-key",
        max_retries=1,
        model_info={
            "vision": False,
            "function_calling": True,
            "json_output": True,
            "structured_output": True,
            "family": "unknown",
        },
    )
    options: dict[str, Any] = {"model_client": client, "model_client_stream": stream}
    planner = AssistantAgent("planner", handoffs=["worker"], system_message=PLANNER, **options)
    worker = AssistantAgent("worker", tools=[search], max_tool_iterations=2, system_message=WORKER, **options)
    critic = AssistantAgent("critic", system_message=CRITIC, **options)
    authors = Swarm([planner, worker], name="authors", termination_condition=SourceMatchTermination(["worker"]))
    team = RoundRobinGroupChat(
        [authors, critic], termination_condition=TextMentionTermination("APPROVE", sources=["critic"])
    )

    async def episode(task: str) -> object:
        if not stream:
            return answer_of(await team.run(task=task))
        async for message in team.run_stream(task=task):
            if isinstance(message, TaskResult):
                return answer_of(message)
        raise AssertionError("a stream ends with its result")

    return episode


def answer_of(result: TaskResult) -> str:
    """Return the worker's last draft."""
    drafts = [each for each in result.messages if isinstance(each, TextMessage) and each.source == "worker"]
    return drafts[-1].content
