"""`ChatOpenAI` as the user set it up against the real gateway: whichever API it prefers, the ids are the engine's."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import openai
import pytest
from langchain_core.messages import HumanMessage

from integration_tests.langchain.apps import model, react_agent, search
from integration_tests.langchain.conftest import Run
from leyden.interfaces import Access, GenerationRequest
from leyden.roles import AGENTS_OWN, Policy
from leyden.spans import Completion, Record, Status
from leyden.testing.fakes import Answer, FakeEngine
from leyden_plugins.gateway.gateway import HttpGateway
from tests.capture.rollouts import Recorded, rollout, routing_to

pytestmark = pytest.mark.usefixtures("instrumented")

GO: dict[str, Any] = {"messages": [HumanMessage("go")]}

SETTINGS: dict[str, dict[str, Any]] = {
    "chat": {},
    "responses": {"use_responses_api": True},
    "reasoning": {"reasoning": {"effort": "low"}},
    "output-version": {"output_version": "responses/v1"},
    "previous-response": {"use_responses_api": True, "use_previous_response_id": True},
    "encrypted": {"use_responses_api": True, "store": False, "include": ["reasoning.encrypted_content"]},
}


def call(number: int, arguments: str) -> dict[str, object]:
    return {"id": f"c{number}", "type": "function", "function": {"name": "search", "arguments": arguments}}


def two_searches_then_an_answer(request: GenerationRequest) -> str | Answer:
    if any(message["role"] == "tool" for message in request.messages):
        return "the answer"
    return Answer(tool_calls=[call(number, json.dumps({"query": f"q{number}"})) for number in range(2)])


def broken_arguments(request: GenerationRequest) -> str | Answer:
    if any(message["role"] == "tool" for message in request.messages):
        return "the answer"
    return Answer(text="let me look", tool_calls=[call(0, "query is x")])


@asynccontextmanager
async def serving(engine: FakeEngine, records: list[Record]) -> AsyncIterator[HttpGateway]:
    async def keep(batch: Sequence[Record]) -> None:
        records.extend(batch)

    gateway = HttpGateway()
    await engine.start([Policy("sql")])
    await gateway.start(engine, keep)
    try:
        yield gateway
    finally:
        await gateway.stop()
        await engine.stop()


async def episode(
    engine: FakeEngine, *, raises: type[BaseException] | None = None, **options: Any
) -> tuple[Any, Recorded, list[Completion]]:
    """Run an agent whose role is routed; return what it said, its spans and what the gateway recorded."""
    records: list[Record] = []
    llm = model("http://user.invalid/v1", max_retries=0, **options)
    agent = react_agent(llm, [search], "You look things up.", name="worker")
    async with serving(engine, records) as gateway:
        token = gateway.admit(Access(rollout_id="r1", attempt=1, models={"sql": AGENTS_OWN}))
        routing = msgspec.structs.replace(routing_to(gateway.base_url, "worker"), token=token)
        with rollout(routing) as recorded:
            state = None
            if raises is not None:
                with pytest.raises(raises):
                    await agent.ainvoke(GO)
            else:
                state = await agent.ainvoke(GO)
        await gateway.revoke("r1")
    return state, recorded, [record for record in records if isinstance(record, Completion)]


@pytest.mark.parametrize("streaming", [False, True], ids=["json", "streaming"])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_a_trained_role_keeps_the_api_that_the_user_chose(run: Run, options: dict[str, Any], streaming: bool) -> None:
    engine = FakeEngine(two_searches_then_an_answer)
    state, recorded, completions = run(episode(engine, streaming=streaming, **options))
    assert [message.type for message in state["messages"]] == ["human", "ai", "tool", "tool", "ai"]
    assert state["messages"][-1].text == "the answer"
    assert [(span.role, span.status) for span in recorded.calls] == [("worker", Status.OK)] * 2
    assert recorded.context.infrastructure_error is None
    for sampled, completion, span in zip(engine.log, completions, recorded.calls, strict=True):
        assert list(completion.prompt_token_ids) == list(sampled.prompt_token_ids)
        assert [list(choice.token_ids) for choice in completion.choices] == sampled.token_ids
        assert (completion.span_id, completion.role) == (span.span_id, "worker")
        assert (completion.status, completion.delivered) == (Status.OK, True)
    assert [message["role"] for message in engine.log[1].request.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "tool",
    ]


@pytest.mark.parametrize("streaming", [False, True], ids=["json", "streaming"])
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_arguments_that_are_no_json_reach_the_agent_as_they_are(run: Run, api: str, streaming: bool) -> None:
    engine = FakeEngine(broken_arguments)
    state, recorded, completions = run(episode(engine, streaming=streaming, **SETTINGS[api]))
    (broken,) = state["messages"][-1].invalid_tool_calls
    assert (broken["name"], broken["args"]) == ("search", "query is x")
    assert [span.status for span in recorded.calls] == [Status.OK]
    assert [list(choice.token_ids) for choice in completions[0].choices] == engine.log[0].token_ids


@pytest.mark.parametrize("options", [{"truncation": "auto"}, {"context_management": [{"type": "compaction"}]}], ids=str)
def test_what_the_gateway_cannot_honour_is_refused_by_name(run: Run, options: dict[str, Any]) -> None:
    engine = FakeEngine("never said")
    _, recorded, completions = run(episode(engine, raises=openai.BadRequestError, use_responses_api=True, **options))
    (span,) = recorded.calls
    assert span.status is Status.ERROR
    assert f"{next(iter(options))!r} is not supported by this server; remove it" in str(span.error)
    assert [(completion.status, completion.choices) for completion in completions] == [(Status.ERROR, [])]
    assert engine.log == []
