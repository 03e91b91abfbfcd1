"""Histories that something keeps between runs: sessions, and the server's own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from agents import Agent, OpenAIResponsesWSModel, SQLiteSession, WebSearchTool
from openai import AsyncOpenAI, BadRequestError

from integration_tests.frameworks.story import Say
from integration_tests.frameworks.suites.openai_agents.apps import agent, run
from integration_tests.frameworks.suites.server import Endpoint
from leyden.context import RolloutContext, rollout_scope
from leyden.errors import ConcurrentUseError
from leyden.spans import Mode
from tests.capture.rollouts import rollout, routing_to

pytestmark = pytest.mark.usefixtures("instrumented")

STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@STREAMS
def test_a_session_keeps_its_history_for_a_trained_role(user: Endpoint, gateway: Endpoint, stream: bool) -> None:
    gateway.script = lambda ask: Say(text=f"{len(ask.messages)} messages")

    async def twice() -> list[str]:
        worker, session = agent(user, "worker", responses=True), SQLiteSession("one")
        with rollout(routing_to(gateway.base_url, "worker")):
            return [(await run(worker, stream=stream, session=session)).final_output for _ in range(2)]

    assert asyncio.run(twice()) == ["2 messages", "4 messages"]
    assert user.seen == []


@STREAMS
def test_a_session_that_two_rollouts_share_is_refused_in_the_second(user: Endpoint, stream: bool) -> None:
    async def shared() -> None:
        worker, session = agent(user, "worker"), SQLiteSession("shared")
        with rollout(rollout_id="r1"):
            await run(worker, stream=stream, session=session)
            await asyncio.gather(second(worker, session), run(worker, stream=stream, session=session))
        with rollout(rollout_id="r3"):
            await run(worker, stream=stream, session=session)

    async def second(worker: Agent[Any], session: SQLiteSession) -> None:
        context = RolloutContext(rollout_id="r2", attempt=1, mode=Mode.TRAIN, sink=lambda record: None)
        with rollout_scope(context):
            with pytest.raises(ConcurrentUseError, match=r"'session shared' runs in rollout 'r1'.*per_rollout"):
                await run(worker, stream=stream, session=session)
        assert isinstance(context.infrastructure_error, ConcurrentUseError)

    asyncio.run(shared())
    assert len(user.seen) == 3


def test_a_session_shared_by_rollouts_one_after_the_other_is_not_refused(user: Endpoint) -> None:
    async def one_by_one() -> None:
        worker, session = agent(user, "worker"), SQLiteSession("one")
        for name in ("r1", "r2"):
            with rollout(rollout_id=name):
                await run(worker, session=session)

    asyncio.run(one_by_one())
    assert len(user.seen) == 2


def test_the_id_of_the_previous_response_reaches_the_gateway(user: Endpoint, gateway: Endpoint) -> None:
    async def twice() -> None:
        worker = agent(user, "worker", responses=True)
        with rollout(routing_to(gateway.base_url, "worker")):
            first = await run(worker)
            await run(worker, previous_response_id=first.last_response_id)

    asyncio.run(twice())
    first, second = (seen.body for seen in gateway.seen)
    assert "previous_response_id" not in first
    assert second["previous_response_id"].startswith("resp_")


@pytest.mark.parametrize("message", ["'conversation' is not supported", "tools of type 'web_search' are not supported"])
def test_what_the_gateway_refuses_reaches_the_user_in_its_words(
    user: Endpoint, gateway: Endpoint, message: str
) -> None:
    gateway.refusal = message
    worker = agent(user, "worker", responses=True, tools=[WebSearchTool()])
    with rollout(routing_to(gateway.base_url, "worker")) as recorded:
        with pytest.raises(BadRequestError, match=message):
            asyncio.run(run(worker, conversation_id="conv_1"))
    assert gateway.seen[0].body["conversation"] == "conv_1"
    assert gateway.seen[0].body["tools"][0]["type"] == "web_search"
    assert [call.status for call in recorded.calls] == ["error"]
    assert recorded.context.infrastructure_error is None


def web_socket_agent(user: Endpoint, name: str) -> Agent[Any]:
    # Nobody listens there: an agent that is not rerouted fails to connect.
    client = AsyncOpenAI(
        base_url=user.base_url, websocket_base_url="ws://127.0.0.1:9/v1", api_key="user-key", max_retries=0
    )
    model = OpenAIResponsesWSModel(model="user-model", openai_client=client)
    return Agent[Any](name=name, model=model, instructions=f"[[role={name}]] Work.")


@STREAMS
def test_a_trained_role_over_websockets_goes_to_the_gateway_over_http(
    user: Endpoint, gateway: Endpoint, stream: bool
) -> None:
    with rollout(routing_to(gateway.base_url, "worker")):
        result = asyncio.run(run(web_socket_agent(user, "worker"), stream=stream))
        with pytest.raises(OSError, match=r"127\.0\.0\.1"):
            asyncio.run(run(web_socket_agent(user, "critic"), stream=stream))
    assert result.final_output == "worker speaks"
    assert gateway.roles == ["worker"]


def test_a_prompt_override_over_websockets_reaches_the_users_endpoint_over_http(user: Endpoint) -> None:
    prompt = "[[role=critic]] Better."
    with rollout(routing_to(user.base_url, "nobody", prompts={"critic": prompt})):
        asyncio.run(run(web_socket_agent(user, "critic")))
    assert user.seen[0].body["instructions"] == prompt
    assert user.seen[0].headers["authorization"] == "Bearer user-key"
