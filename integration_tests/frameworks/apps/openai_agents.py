"""The contract app in the OpenAI Agents SDK: plain user code.

The planner hands over to the worker inside one run; the critic sends the worker back once. Planner and worker speak
chat completions, the critic speaks Responses, which is the SDK's default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agents import Agent, OpenAIProvider, RunConfig, Runner, function_tool
from openai import AsyncOpenAI

MODES = ("async", "async-stream", "sync")
SHARED = True
CALLS = {"planner": 1, "worker": 3, "critic": 2}
TOOLS = {"search": 2}
HANDOFFS = {"planner->worker": 1}


@function_tool
async def search(query: str) -> str:
    """Search the library."""
    return f"found {query}"


def team() -> tuple[Agent[Any], Agent[Any], Agent[Any]]:
    """Return planner, worker and critic; agents keep nothing between runs."""
    worker = Agent[Any](
        name="worker", model="user-model", instructions="[[role=worker]] Search, then answer.", tools=[search]
    )
    planner = Agent[Any](
        name="planner", model="user-model", instructions="[[role=planner]] Hand over to the worker.", handoffs=[worker]
    )
    critic = Agent[Any](name="critic", model="user-model", instructions="[[role=critic]] Say APPROVE or REVISE.")
    return planner, worker, critic


def connect(base_url: str) -> AsyncOpenAI:
    """Return a client for one episode, because it belongs to one event loop."""
    return AsyncOpenAI(base_url=base_url, api_key="user-key", max_retries=1)


def configs(client: AsyncOpenAI) -> tuple[RunConfig, RunConfig]:
    """Return how to run agents with chat completions, and with Responses."""
    chat, responses = (OpenAIProvider(openai_client=client, use_responses=each) for each in (False, True))
    return RunConfig(model_provider=chat), RunConfig(model_provider=responses)


def build(base_url: str, *, stream: bool, sync: bool) -> Callable[[str], object]:
    """Return the episode: a task in, the worker's last answer out."""
    planner, worker, critic = team()

    async def run(agent: Agent[Any], items: Any, config: RunConfig) -> Any:
        if not stream:
            return await Runner.run(agent, items, run_config=config)
        result = Runner.run_streamed(agent, items, run_config=config)
        async for _ in result.stream_events():
            pass
        return result

    async def episode(task: str) -> str:
        async with connect(base_url) as client:
            chat, responses = configs(client)
            work = await run(planner, task, chat)
            while True:
                review = await run(critic, f"{task}\nAnswer: {work.final_output}", responses)
                if "APPROVE" in review.final_output:
                    return str(work.final_output)
                remark = {"role": "user", "content": review.final_output}
                work = await run(worker, [*work.to_input_list(), remark], chat)

    def sync_episode(task: str) -> str:
        chat, responses = configs(connect(base_url))
        work = Runner.run_sync(planner, task, run_config=chat)
        while True:
            review = Runner.run_sync(critic, f"{task}\nAnswer: {work.final_output}", run_config=responses)
            if "APPROVE" in review.final_output:
                return str(work.final_output)
            remark: Any = {"role": "user", "content": review.final_output}
            work = Runner.run_sync(worker, [*work.to_input_list(), remark], run_config=chat)

    return sync_episode if sync else episode
