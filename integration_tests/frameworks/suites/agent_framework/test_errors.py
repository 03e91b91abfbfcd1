"""How runs that go wrong are recorded, and that the user sees what he would have seen."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import openai
import pytest
from agent_framework import ChatContext, Content, UserInputRequiredException, chat_middleware, tool
from agent_framework.exceptions import ChatClientException
from agent_framework.orchestrations import SequentialBuilder
from pydantic import BaseModel, ValidationError

from integration_tests.frameworks.story import Ask, Say
from integration_tests.frameworks.suites.agent_framework.apps import TASK, agent, calling, only, run, search, tree
from integration_tests.frameworks.suites.server import Endpoint
from leyden import context
from leyden.errors import DeadlineExceeded
from leyden.spans import Kind, Status
from tests.capture.rollouts import Recorded, rollout, routing_to

pytestmark = pytest.mark.usefixtures("instrumented")

streamed = pytest.mark.parametrize("stream", [False, True], ids=["awaited", "streamed"])


def statuses(recorded: Recorded) -> dict[str, str]:
    """Return kind and name of each span below the rollout, with its status."""
    return {f"{kind} {name}": status for _, kind, name, _, status in tree(recorded)}


async def slow(ask: Ask) -> Say:
    await asyncio.sleep(5)
    return Say(text="late")


@streamed
def test_a_failed_model_call_fails_its_agent_and_raises_the_frameworks_own_error(user: Endpoint, stream: bool) -> None:
    user.refusal = "told to fail"
    with rollout() as recorded:
        with pytest.raises(ChatClientException, match="told to fail") as raised:
            asyncio.run(run(agent(user, "worker"), stream=stream))
    assert isinstance(raised.value.__cause__, openai.BadRequestError)
    assert statuses(recorded) == {"agent worker": "error", "model_call chat user-model": "error"}


@streamed
def test_a_failed_agent_fails_its_workflow(user: Endpoint, stream: bool) -> None:
    user.refusal = "told to fail"
    flow = SequentialBuilder(participants=[agent(user, "first"), agent(user, "second")]).build()
    with rollout() as recorded:
        with pytest.raises(ChatClientException, match="told to fail"):
            asyncio.run(run(flow, stream=stream))
    assert statuses(recorded)["agent Sequential"] == statuses(recorded)["agent first"] == "error"
    assert "agent second" not in statuses(recorded)


@streamed
def test_a_tools_real_exception_is_recorded_although_the_model_reads_a_text(user: Endpoint, stream: bool) -> None:
    @tool(approval_mode="never_require")
    def broken(query: str) -> str:
        """Fail."""
        raise RuntimeError("exploded")

    user.script = calling("worker", ("broken", {"query": "x"}), ("search", {"query": "y"}))
    with rollout() as recorded:
        result = asyncio.run(run(agent(user, "worker", tools=[broken, search]), stream=stream))
    assert result.text == "worker speaks"
    assert only(recorded, Kind.TOOL, "broken").error == "RuntimeError: exploded"
    assert only(recorded, Kind.TOOL, "broken").status is Status.ERROR
    assert only(recorded, Kind.TOOL, "search").status is Status.OK
    assert only(recorded, Kind.AGENT, "worker").status is Status.OK


def test_broken_json_arguments_are_a_failed_tool(user: Endpoint) -> None:
    user.script = calling("worker", ("search", {"raw": '{"query": '}))
    with rollout() as recorded:
        result = asyncio.run(run(agent(user, "worker", tools=[search])))
    assert result.text == "worker speaks"
    assert only(recorded, Kind.TOOL, "search").status is Status.ERROR


def test_a_tool_that_waits_for_the_user_is_no_error(user: Endpoint) -> None:
    @tool(approval_mode="never_require")
    def ask(query: str) -> str:
        """Ask the user."""
        content = Content.from_function_approval_request(
            id="1", function_call=Content.from_function_call(call_id="1", name="ask", arguments="{}")
        )
        raise UserInputRequiredException(contents=[content])

    user.script = calling("worker", ("ask", {"query": "x"}))
    with rollout() as recorded:
        result = asyncio.run(run(agent(user, "worker", tools=[ask])))
    assert result.user_input_requests
    assert only(recorded, Kind.TOOL, "ask").status is Status.OK


class Answer(BaseModel):
    rooms: int


@streamed
def test_a_structured_answer_that_fails_to_parse_is_the_users_error_and_the_call_stays_whole(
    user: Endpoint, gateway: Endpoint, stream: bool
) -> None:
    async def episode() -> Any:
        answer = await run(agent(user, "worker"), stream=stream, options={"response_format": Answer})
        return answer.value

    with rollout(routing_to(gateway.base_url)) as recorded:
        with pytest.raises(ValidationError, match="worker speaks"):
            asyncio.run(episode())
    assert [call.status for call in recorded.calls] == [Status.OK]
    assert gateway.seen[0].body["response_format"]["type"] == "json_schema"


@streamed
def test_a_timeout_cancels_the_call_its_agent_and_its_workflow(user: Endpoint, stream: bool) -> None:
    user.script = slow
    flow = SequentialBuilder(participants=[agent(user, "worker")]).build()

    async def episode() -> None:
        with pytest.raises(TimeoutError, match=r"^$"):
            await asyncio.wait_for(run(flow, stream=stream), 0.3)

    with rollout() as recorded:
        asyncio.run(episode())
    assert set(statuses(recorded).values()) == {"cancelled"}
    assert set(statuses(recorded)) == {"agent Sequential", "agent worker", "model_call chat user-model"}


def test_a_run_that_is_cancelled_before_its_first_step_leaves_no_open_span(user: Endpoint) -> None:
    async def episode() -> None:
        task = asyncio.create_task(agent(user, "worker").run(TASK))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with rollout() as recorded:
        asyncio.run(episode())
        gc.collect()
        assert statuses(recorded) == {"agent worker": "interrupted"}


def test_a_deadline_stops_the_agent_whatever_the_framework_swallows(user: Endpoint) -> None:
    user.script = calling("worker", ("search", {"query": "x"}))

    @tool(name="search", approval_mode="never_require")
    async def slow_search(query: str) -> str:
        """Take too long."""
        await asyncio.sleep(0.4)
        return "found"

    flow = SequentialBuilder(participants=[agent(user, "worker", tools=[slow_search])]).build()
    with rollout(timeout_seconds=0.3) as recorded:
        with pytest.raises(DeadlineExceeded, match="r1"):
            asyncio.run(run(flow))
    assert len(user.seen) == 1
    assert statuses(recorded)["agent worker"] == "interrupted"


@pytest.mark.parametrize("how", ["closed", "dropped", "left"])
def test_a_stream_that_is_not_read_to_its_end_is_interrupted(user: Endpoint, how: str) -> None:
    async def episode() -> None:
        updates: Any = agent(user, "worker").run(TASK, stream=True)
        if how == "left":
            async with updates:
                await anext(updates)
        else:
            await anext(updates)
        if how == "closed":
            await updates.close()
        frame = context.current()
        assert frame is not None and frame.role == "main", "the reader is not the agent"
        del updates
        gc.collect()
        await asyncio.sleep(0.1)
        assert statuses(recorded) == {"agent worker": "interrupted", "model_call chat user-model": "interrupted"}

    with rollout() as recorded:
        asyncio.run(episode())


def test_a_stream_that_nobody_reads_leaves_no_open_span(user: Endpoint) -> None:
    async def episode() -> None:
        worker = agent(user, "worker")
        # The framework runs the agent even then, to finish its response.
        await worker.run(TASK, stream=True).close()
        assert [(call.role, call.status) for call in recorded.calls] == [("worker", Status.OK)] * len(user.seen)
        updates = worker.run(TASK, stream=True)
        del updates
        gc.collect()
        assert [span.status for span in recorded.spans(Kind.AGENT)] == [Status.INTERRUPTED] * 2

    with rollout() as recorded:
        asyncio.run(episode())


def test_a_workflow_can_run_again_as_soon_as_its_stream_was_dropped(user: Endpoint) -> None:
    flow = SequentialBuilder(participants=[agent(user, "worker")]).build()

    async def episode() -> None:
        async for _ in flow.run(TASK, stream=True):
            break
        again = flow.run(TASK, stream=True)
        await again.close()

    with rollout() as recorded:
        asyncio.run(episode())
    assert [span.status for span in recorded.spans(Kind.AGENT)] == [Status.INTERRUPTED] * 2


def test_a_stream_cut_on_the_way_is_an_interrupted_call(user: Endpoint, gateway: Endpoint) -> None:
    gateway.cuts = True
    with rollout(routing_to(gateway.base_url)) as recorded:
        asyncio.run(run(agent(user, "worker"), stream=True))
    assert [call.status for call in recorded.calls] == [Status.INTERRUPTED]


@streamed
def test_the_users_middleware_may_replace_and_raise_what_it_likes(user: Endpoint, stream: bool) -> None:
    @chat_middleware
    async def guard(given: ChatContext, call_next: Any) -> None:
        raise PermissionError("not allowed")

    with rollout() as recorded:
        with pytest.raises(PermissionError, match="not allowed"):
            asyncio.run(run(agent(user, "worker", middleware=[guard]), stream=stream))
    assert statuses(recorded) == {"agent worker": "error"}


@streamed
def test_a_wrong_argument_raises_where_it_would_have_raised(user: Endpoint, stream: bool) -> None:
    with rollout() as recorded:
        with pytest.raises(TypeError, match="unexpected"):
            agent(user, "worker").run(TASK, stream=stream, unexpected=1)
    assert statuses(recorded) == {"agent worker": "error"}


def test_awaiting_a_stream_prepares_it_as_before(user: Endpoint) -> None:
    async def episode() -> str:
        updates = await agent(user, "worker").run(TASK, stream=True)
        seen: list[str] = []
        updates.with_transform_hook(lambda update: seen.append(update.text))
        final = await updates.get_final_response()
        assert "".join(seen) == final.text
        return str(final.text)

    with rollout() as recorded:
        assert asyncio.run(episode()) == "worker speaks"
    assert statuses(recorded) == {"agent worker": "ok", "model_call chat user-model": "ok"}
