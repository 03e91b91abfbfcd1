"""The user's side of the tests: clients, agents and what was recorded of them. Knows nothing of Leyden's adapter."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import MaxMessageTermination, TextMentionTermination
from autogen_ext.models.openai import OpenAIChatCompletionClient

from integration_tests.frameworks.story import Say
from leyden.spans import Kind, Span
from tests.capture.rollouts import Recorded

Result = TypeVar("Result")

INFO: Any = {
    "vision": False,
    "function_calling": True,
    "json_output": True,
    "structured_output": True,
    "family": "unknown",
}


def client(base_url: str, **options: Any) -> OpenAIChatCompletionClient:
    options = {"max_retries": 0, **options}
    return OpenAIChatCompletionClient(
        model="user-model", base_url=base_url, api_key="user-key", model_info=INFO, **options
    )


def agent(name: str, base_url: str, **options: Any) -> AssistantAgent:
    return AssistantAgent(name, client(base_url), system_message=f"[[role={name}]] You are {name}.", **options)


def until_done(messages: int = 20) -> Any:
    return TextMentionTermination("DONE") | MaxMessageTermination(messages)


def say(text: str) -> Say:
    return Say(text=text)


def call(*names: str, **arguments: object) -> Say:
    return Say(tool_calls=tuple((name, arguments) for name in names))


def run(make: Callable[[], Awaitable[Result]], seconds: float = 5.0) -> Result:
    """Run a coroutine on a loop of its own; one that hangs fails, even where cancellation does not free it."""

    async def bounded() -> Result:
        task = asyncio.ensure_future(make())
        done, _ = await asyncio.wait({task}, timeout=seconds)
        assert done, f"hangs after {seconds} s"
        return task.result()

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(bounded())
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def tree(recorded: Recorded) -> set[tuple[str, str, str]]:
    """Return kind, role and the parent's name of each span below the root."""
    names = {span.span_id: span.name for span in recorded.records if isinstance(span, Span)}
    return {
        (span.kind.value, span.role if span.kind is not Kind.TOOL else span.name, names[str(span.parent_id)])
        for span in recorded.records
        if isinstance(span, Span) and span.parent_id is not None
    }


def counted(recorded: Recorded, kind: Kind) -> dict[str, int]:
    """Return how many spans of a kind there are by role (tools by name)."""
    return dict(Counter(span.name if kind is Kind.TOOL else span.role for span in recorded.spans(kind)))


def handoffs(recorded: Recorded) -> list[str]:
    return [f"{span.role}->{span.attributes['leyden.handoff.to']}" for span in recorded.spans(Kind.HANDOFF)]
