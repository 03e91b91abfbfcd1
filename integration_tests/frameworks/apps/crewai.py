"""The contract app in CrewAI: plain user code.

In the first crew the planner has no tools but its coworkers and gives the worker the task; in the second the worker
takes the critic's remark up. Crews keep what their tasks said, so every episode builds its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool

MODES = ("async", "async-stream", "sync", "sync-stream")
SHARED = False
CALLS = {"planner": 2, "worker": 4, "critic": 2}
TOOLS = {"delegate_work_to_coworker": 1, "search": 4}
HANDOFFS = {"planner->worker": 1}

os.environ.setdefault("OPENAI_API_KEY", "user-key")


@tool("search")
def search(query: str) -> str:
    """Search the archive."""
    time.sleep(0.002)
    return f"found {query}"


def team(base_url: str, *, stream: bool) -> tuple[Agent, Agent, Agent]:
    """Return planner, worker and critic."""
    llm = LLM(model="openai/user-model", base_url=base_url, api_key="user-key", max_retries=1, stream=stream)
    planner = Agent(
        role="planner",
        goal="an answer",
        backstory="[[role=planner]] You give work away.",
        allow_delegation=True,
        llm=llm,
    )
    # As it comes out of a YAML file.
    worker = Agent(role="worker\n", goal="an answer", backstory="[[role=worker]] You search.", tools=[search], llm=llm)
    critic = Agent(role="critic", goal="a verdict", backstory="[[role=critic]] Say APPROVE or REVISE.", llm=llm)
    return planner, worker, critic


def crew_of(agents: list[Agent], first: Task, critic: Agent, task: str, *, stream: bool) -> Crew:
    """Let the critic judge what comes of the first task."""
    review = Task(description=f"{task}\nJudge the answer.", expected_output="a verdict", agent=critic, context=[first])
    return Crew(agents=agents, tasks=[first, review], stream=stream)


def build(base_url: str, *, stream: bool, sync: bool) -> Callable[[str], object]:
    """Return the episode: a task in, the worker's last answer out."""
    planner, worker, critic = team(base_url, stream=stream)

    def first_crew(task: str) -> Crew:
        plan = Task(description=task, expected_output="an answer", agent=planner)
        return crew_of([planner, worker, critic], plan, critic, task, stream=stream)

    def second_crew(task: str, verdict: str) -> Crew:
        rewrite = Task(description=f"{task}\n{verdict}", expected_output="an answer", agent=worker)
        return crew_of([worker, critic], rewrite, critic, task, stream=stream)

    async def finish(crew: Crew) -> Any:
        output: Any = await crew.akickoff()
        if not stream:
            return output
        async for _ in output:
            pass
        return output.result

    def finish_sync(crew: Crew) -> Any:
        output: Any = crew.kickoff()
        if not stream:
            return output
        for _ in output:
            pass
        return output.result

    async def episode(task: str) -> str:
        output = await finish(first_crew(task))
        while "APPROVE" not in output.raw:
            output = await finish(second_crew(task, output.raw))
        return str(output.tasks_output[0].raw)

    def sync_episode(task: str) -> str:
        output = finish_sync(first_crew(task))
        while "APPROVE" not in output.raw:
            output = finish_sync(second_crew(task, output.raw))
        return str(output.tasks_output[0].raw)

    return sync_episode if sync else episode
