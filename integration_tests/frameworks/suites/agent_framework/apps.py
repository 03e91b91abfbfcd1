"""Users' agents: they know nothing of Leyden. Their prompts hold the truth about who speaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agent_framework import Agent, tool
from agent_framework.openai import OpenAIChatClient, OpenAIChatCompletionClient
from openai import AsyncOpenAI

from integration_tests.frameworks.story import Ask, Say
from integration_tests.frameworks.suites.server import Endpoint
from leyden.spans import Kind, Span
from tests.capture.rollouts import Recorded

TASK = "[[rollout=r1]] do it"


def client(endpoint: Endpoint, *, responses: bool = False) -> Any:
    """Return a chat client of the user's endpoint."""
    user = AsyncOpenAI(base_url=endpoint.base_url, api_key="user-key", max_retries=0)
    kind: Any = OpenAIChatClient if responses else OpenAIChatCompletionClient
    return kind(model="user-model", async_client=user)


def agent(endpoint: Endpoint, name: str, *, responses: bool = False, **options: Any) -> Any:
    """Return an agent whose prompt names it."""
    # Handoff workflows ask for the last option; it changes nothing elsewhere.
    options.setdefault("require_per_service_call_history_persistence", not responses)
    chat = client(endpoint, responses=responses)
    named = options.pop("named", name)
    return Agent(chat, f"[[role={name}]] Work.", name=named, description=name, **options)


@tool(approval_mode="never_require")
async def search(query: str) -> str:
    """Search the library."""
    return f"found {query}"


async def run(runnable: Any, task: Any = TASK, *, stream: bool = False, **options: Any) -> Any:
    """Run an agent or a workflow to the end, reading all of a stream."""
    if not stream:
        return await runnable.run(task, **options)
    result = runnable.run(task, stream=True, **options)
    async for _ in result:
        pass
    return await result.get_final_response()


def calling(role: str, *calls: tuple[str, dict[str, object]]) -> Callable[[Ask], Say]:
    """Return a script by which one role calls tools until a tool has answered, and everyone else just speaks."""

    def script(ask: Ask) -> Say:
        if ask.role == role and not any(message.get("role") == "tool" for message in ask.messages):
            return Say(tool_calls=calls)
        return Say(text=f"{ask.role} speaks")

    return script


def tree(recorded: Recorded) -> list[tuple[str, str, str, str, str]]:
    """Return (parent's name, kind, name, role, status) of every span, in the order of their starts."""
    spans = sorted((each for each in recorded.records if isinstance(each, Span)), key=lambda span: span.start_ns)
    names = {span.span_id: span.name for span in spans}
    return [
        (names.get(span.parent_id, "rollout"), span.kind.value, span.name, span.role, span.status.value)
        for span in spans
        if span.parent_id
    ]


def speakers(recorded: Recorded) -> list[tuple[str, str]]:
    """Return (role, name of the agent's span) of every model call, in their order."""
    return [(call.role, recorded.parent_of(call).name) for call in recorded.calls]


def only(recorded: Recorded, kind: Kind, name: str) -> Span:
    """Return the one span of a kind and name."""
    (span,) = (each for each in recorded.spans(kind) if each.name == name)
    return span
