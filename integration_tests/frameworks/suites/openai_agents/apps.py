"""Users' agents: they know nothing of Leyden. Their prompts hold the truth about who speaks."""

from __future__ import annotations

from typing import Any

from agents import (
    Agent,
    GuardrailFunctionOutput,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
)
from openai import AsyncOpenAI

from integration_tests.frameworks.story import Ask, Say
from integration_tests.frameworks.suites.server import Endpoint
from leyden.spans import Kind, Span
from tests.capture.rollouts import Recorded

TASK = "[[rollout=r1]] do it"


def agent(endpoint: Endpoint, name: str, *, responses: bool = False, **options: Any) -> Agent[Any]:
    """Return an agent whose prompt names it."""
    client = AsyncOpenAI(base_url=endpoint.base_url, api_key="user-key", max_retries=0)
    kind = OpenAIResponsesModel if responses else OpenAIChatCompletionsModel
    model = kind(model="user-model", openai_client=client)
    return Agent[Any](name=name, model=model, instructions=f"[[role={name}]] Work.", **options)


async def run(starting: Agent[Any], task: Any = TASK, *, stream: bool = False, **options: Any) -> Any:
    """Run to the end, reading every event of a streamed run."""
    if not stream:
        return await Runner.run(starting, task, **options)
    result = Runner.run_streamed(starting, task, **options)
    async for _ in result.stream_events():
        pass
    return result


def calling(role: str, *calls: tuple[str, dict[str, object]]) -> Any:
    """Return a script by which one role calls tools until a tool has answered, and everyone else just speaks."""

    def script(ask: Ask) -> Say:
        if ask.role == role and not any(message.get("role") == "tool" for message in ask.messages):
            return Say(tool_calls=calls)
        return Say(text=f"{ask.role} speaks")

    return script


def guarding(endpoint: Endpoint, name: str, *, trips: bool = False) -> Any:
    """Return a guardrail function in which an agent judges."""

    async def judge(context: Any, guarded: Any, given: Any) -> GuardrailFunctionOutput:
        result = await Runner.run(agent(endpoint, name), TASK, run_config=RunConfig())
        return GuardrailFunctionOutput(output_info=result.final_output, tripwire_triggered=trips)

    return judge


def tree(recorded: Recorded) -> list[tuple[str, str, str, str]]:
    """Return (parent's name, kind, name, status) of every span, in the order of their starts."""
    spans = sorted((each for each in recorded.records if isinstance(each, Span)), key=lambda span: span.start_ns)
    names = {span.span_id: span.name for span in spans}
    return [(names[span.parent_id], span.kind.value, span.name, span.status.value) for span in spans if span.parent_id]


def only(recorded: Recorded, kind: Kind, name: str) -> Span:
    """Return the one span of a kind and name."""
    (span,) = (each for each in recorded.spans(kind) if each.name == name)
    return span
