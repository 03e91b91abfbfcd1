"""Users' crews: they know nothing of Leyden."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool

from integration_tests.frameworks.story import Say
from integration_tests.frameworks.suites.crewai.server import Endpoint, Seen, speak


@tool("search")
def search(query: str) -> str:
    """Search the archive."""
    time.sleep(0.002)
    return f"found {query}"


@tool("search")
def failing_search(query: str) -> str:
    """Search the archive."""
    raise ValueError(f"no archive has {query}")


def llm(url: str, **options: Any) -> Any:
    return LLM(**{"model": "openai/user-model", "base_url": url, "api_key": "k", "max_retries": 0, **options})


def agent(role: str, model: Any, **options: Any) -> Agent:
    """Return an agent whose prompt names its role."""
    return Agent(role=role, goal="an answer", backstory=f"[[role={role.strip()}]]", llm=model, **options)


def task(who: Agent | None, text: str = "Count the rooms.", **options: Any) -> Task:
    return Task(description=text, expected_output="an answer", agent=who, **options)


def crew(*agents: Agent, **options: Any) -> Crew:
    """Return a crew with a task for each agent."""
    return Crew(agents=list(agents), tasks=[task(each) for each in agents], **options)


def searching(seen: Seen) -> Say | int:
    """Let the worker search twice at once before it answers."""
    if seen.role != "worker" or seen.results:
        return speak(seen)
    return Say(tool_calls=(("search", {"query": "north"}), ("search", {"query": "south"})))


def delegating(seen: Seen, tool_name: str = "delegate_work_to_coworker", coworker: str = "worker") -> Say | int:
    """Let the planner, or the crew's manager, give its task to a coworker."""
    tools = [each["function"]["name"] for each in seen.body.get("tools") or []]
    if tool_name not in tools or seen.results:
        return speak(seen)
    what = "task" if tool_name.startswith("delegate") else "question"
    return Say(tool_calls=((tool_name, {what: "Count the rooms.", "context": "a house", "coworker": coworker}),))


def slowly(seen: Seen) -> Say | int:
    time.sleep(0.25)
    return speak(seen)


async def asked(endpoint: Endpoint) -> None:
    """Wait until somebody has asked."""
    while not endpoint.seen:
        await asyncio.sleep(0.005)
