"""Runs that go wrong: the span says how, and the user's code sees what it would have seen without Leyden."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import agents
import pytest
from agents import InputGuardrail, ModelSettings, OutputGuardrail, RunConfig, Runner, function_tool
from agents.exceptions import (
    InputGuardrailTripwireTriggered,
    MaxTurnsExceeded,
    ModelBehaviorError,
    OutputGuardrailTripwireTriggered,
    ToolTimeoutError,
    UserError,
)
from openai import InternalServerError
from pydantic import BaseModel

from integration_tests.frameworks.story import Ask, Say
from integration_tests.frameworks.suites.openai_agents.apps import TASK, agent, calling, guarding, only, run, tree
from integration_tests.frameworks.suites.server import Endpoint
from leyden.errors import DeadlineExceeded
from leyden.spans import Kind, Span, Status
from tests.capture.rollouts import Recorded, rollout, routing_to

pytestmark = pytest.mark.usefixtures("instrumented")

STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
TRACING = pytest.mark.parametrize("untraced", [False, True], ids=["traced", "untraced"])


class Answer(BaseModel):
    value: int


def statuses(recorded: Recorded) -> dict[str, Status]:
    """Return how the last span of each name ended."""
    return {span.name: span.status for span in recorded.records if isinstance(span, Span)}


def fails(action: Any) -> tuple[BaseException, Recorded]:
    """Return what the user saw, which must be the same without a rollout, and what was recorded."""

    async def both_ways() -> tuple[BaseException, BaseException, Recorded]:
        with pytest.raises(BaseException) as plain:  # looked at below
            await action()
        with rollout() as recorded, pytest.raises(BaseException) as seen:  # likewise
            await action()
        return plain.value, seen.value, recorded

    plain, seen, recorded = asyncio.run(both_ways())
    assert (type(seen), str(seen)) == (type(plain), str(plain))
    return seen, recorded


@STREAMS
@TRACING
def test_a_model_error_ends_call_and_agent_as_errors(user: Endpoint, stream: bool, untraced: bool) -> None:
    user.script = lambda ask: 500
    config = RunConfig(tracing_disabled=untraced)
    seen, recorded = fails(lambda: run(agent(user, "worker"), stream=stream, run_config=config))
    assert isinstance(seen, InternalServerError)
    assert statuses(recorded) == {"rollout": "ok", "worker": "error", "chat user-model": "error"}
    assert "InternalServerError" in (only(recorded, Kind.AGENT, "worker").error or "")


@STREAMS
def test_a_retry_by_the_sdk_is_another_call_of_the_same_agent(user: Endpoint, stream: bool) -> None:
    answers = iter([500, 500])
    user.script = lambda ask: next(answers, Say(text="at last"))
    retry = agents.ModelRetrySettings(
        max_retries=3,
        backoff={"initial_delay": 0.01},
        policy=agents.retry_policies.any(
            agents.retry_policies.provider_suggested(), agents.retry_policies.http_status([500])
        ),
    )
    worker = agent(user, "worker", model_settings=ModelSettings(retry=retry))
    with rollout() as recorded:
        result = asyncio.run(run(worker, stream=stream))
    assert result.final_output == "at last"
    assert [(call.role, call.status) for call in recorded.calls] == [
        ("worker", "error"),
        ("worker", "error"),
        ("worker", "ok"),
    ]
    assert only(recorded, Kind.AGENT, "worker").status is Status.OK


@function_tool
def broken() -> str:
    """Fail."""
    raise ValueError("out of order")


@function_tool(failure_error_function=None)
def fatal() -> str:
    """Fail, and with it the run."""
    raise ValueError("out of order")


@function_tool
def typed(count: int) -> str:
    """Take a number."""
    return str(count)


@function_tool(timeout=0.01)
async def slow() -> str:
    """Take too long, which the SDK tells the model."""
    await asyncio.sleep(5)
    return "late"


@function_tool(timeout=0.01, timeout_behavior="raise_exception")
async def slow_and_fatal() -> str:
    """Take too long, which ends the run."""
    await asyncio.sleep(5)
    return "late"


@STREAMS
@TRACING
@pytest.mark.parametrize(
    ("tool", "given", "error"),
    [
        (broken, {}, "ValueError: out of order"),
        (slow, {}, "ToolTimeoutError: Tool 'slow' timed out after 0.01 seconds"),
        (typed, {"raw": '{"count": '}, "Invalid JSON input"),
    ],
    ids=["raises", "times out", "broken arguments"],
)
def test_a_tool_error_that_the_sdk_handles_is_one_on_the_tool_alone(
    user: Endpoint, tool: Any, given: Any, error: str, stream: bool, untraced: bool
) -> None:
    user.script = calling("worker", (tool.name, given))
    config = RunConfig(tracing_disabled=untraced)
    with rollout() as recorded:
        result = asyncio.run(run(agent(user, "worker", tools=[tool]), stream=stream, run_config=config))
    assert result.final_output == "worker speaks"
    span = only(recorded, Kind.TOOL, tool.name)
    assert span.status is Status.ERROR
    assert error in (span.error or "")
    assert span.attributes["gen_ai.tool.call.result"] == str(user.seen[-1].ask.messages[-1]["content"])
    assert only(recorded, Kind.AGENT, "worker").status is Status.OK
    if given:
        assert span.attributes["gen_ai.tool.call.arguments"] == given["raw"]


@STREAMS
@pytest.mark.parametrize(("tool", "kind"), [(fatal, UserError), (slow_and_fatal, ToolTimeoutError)])
def test_a_tool_error_that_ends_the_run_ends_tool_and_agent(user: Endpoint, tool: Any, kind: Any, stream: bool) -> None:
    user.script = calling("worker", (tool.name, {}))
    seen, recorded = fails(lambda: run(agent(user, "worker", tools=[tool]), stream=stream))
    assert isinstance(seen, kind)
    assert statuses(recorded)[tool.name] == statuses(recorded)["worker"] == "error"


@STREAMS
@TRACING
def test_a_tripped_input_guardrail_ends_the_agent(user: Endpoint, stream: bool, untraced: bool) -> None:
    async def script(ask: Ask) -> Say:
        await asyncio.sleep(0.3 if ask.role == "worker" else 0)
        return Say(text=f"{ask.role} speaks")

    user.script = script
    guardrail = InputGuardrail(guarding(user, "judge", trips=True), name="check")
    worker = agent(user, "worker", input_guardrails=[guardrail])
    config = RunConfig(tracing_disabled=untraced)
    seen, recorded = fails(lambda: run(worker, stream=stream, run_config=config))
    assert isinstance(seen, InputGuardrailTripwireTriggered)
    assert statuses(recorded)["worker"] == "error"
    assert statuses(recorded)["judge"] == "ok"
    assert only(recorded, Kind.TOOL, "check").attributes["openai_agents.guardrail.triggered"] is True
    (beside,) = (call for call in recorded.calls if call.role == "worker")
    # A streamed run reads the answer to its end before it looks at the guardrail.
    assert beside.status is (Status.OK if stream else Status.CANCELLED)


@STREAMS
@TRACING
def test_a_tripped_output_guardrail_ends_the_agent(user: Endpoint, stream: bool, untraced: bool) -> None:
    guardrail = OutputGuardrail(guarding(user, "judge", trips=True), name="check")
    worker = agent(user, "worker", output_guardrails=[guardrail])
    config = RunConfig(tracing_disabled=untraced)
    seen, recorded = fails(lambda: run(worker, stream=stream, run_config=config))
    assert isinstance(seen, OutputGuardrailTripwireTriggered)
    assert statuses(recorded)["worker"] == "error"
    assert [(call.role, call.status) for call in recorded.calls] == [("worker", "ok"), ("judge", "ok")]


@STREAMS
def test_too_many_turns_end_the_agent(user: Endpoint, stream: bool) -> None:
    user.script = lambda ask: Say(tool_calls=(("typed", {"count": 1}),))
    seen, recorded = fails(lambda: run(agent(user, "worker", tools=[typed]), stream=stream, max_turns=2))
    assert isinstance(seen, MaxTurnsExceeded)
    assert statuses(recorded)["worker"] == "error"
    assert statuses(recorded)["typed"] == "ok"


@STREAMS
@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_output_that_does_not_parse_is_the_users_error_and_a_whole_call(
    user: Endpoint, gateway: Endpoint, responses: bool, stream: bool
) -> None:
    user.script = gateway.script = lambda ask: Say(text="no JSON")

    def worker() -> Any:
        return agent(user, "worker", responses=responses, output_type=Answer)

    seen, recorded = fails(lambda: run(worker(), stream=stream))
    assert isinstance(seen, ModelBehaviorError)
    assert statuses(recorded) == {"rollout": "ok", "worker": "error", "chat user-model": "ok"}
    with rollout(routing_to(gateway.base_url, "worker")), pytest.raises(ModelBehaviorError) as routed:
        asyncio.run(run(worker(), stream=stream))
    assert str(routed.value) == str(seen)


def test_output_that_parses_arrives(user: Endpoint, gateway: Endpoint) -> None:
    gateway.script = lambda ask: Say(text=json.dumps({"value": 3}))
    with rollout(routing_to(gateway.base_url, "worker")):
        result = asyncio.run(run(agent(user, "worker", output_type=Answer)))
    assert result.final_output == Answer(value=3)
    assert gateway.seen[0].body["response_format"]["type"] == "json_schema"


@TRACING
def test_a_cancelled_run_is_recorded_as_cancelled(user: Endpoint, untraced: bool) -> None:
    async def forever(ask: Ask) -> Say:
        await asyncio.sleep(5)
        return Say()

    async def cancelled() -> Recorded:
        user.script = forever
        with rollout() as recorded:
            task = asyncio.create_task(run(agent(user, "worker"), run_config=RunConfig(tracing_disabled=untraced)))
            while not user.seen:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return recorded

    recorded = asyncio.run(cancelled())
    assert statuses(recorded) == {"rollout": "ok", "worker": "cancelled", "chat user-model": "cancelled"}


def test_a_streamed_run_that_the_user_cancels_is_recorded_as_cancelled(user: Endpoint) -> None:
    user.script = calling("worker", ("endless", {}))
    begun: list[asyncio.Event] = []

    @function_tool
    async def endless() -> str:
        """Wait."""
        begun[0].set()
        await asyncio.sleep(5)
        return ""

    async def cancelled() -> Recorded:
        begun.append(asyncio.Event())
        with rollout() as recorded:
            result = Runner.run_streamed(agent(user, "worker", tools=[endless]), TASK)
            await begun[0].wait()
            result.cancel()
            async for _ in result.stream_events():
                pass
            await asyncio.sleep(0.05)
        return recorded

    recorded = asyncio.run(cancelled())
    assert statuses(recorded)["endless"] == statuses(recorded)["worker"] == "cancelled"


def test_a_reader_that_leaves_the_events_leaves_no_span_open(user: Endpoint, gateway: Endpoint) -> None:
    async def slowly(ask: Ask) -> Say:
        await asyncio.sleep(0.05)
        return Say(tool_calls=(("typed", {"count": 1}),))

    async def broken_off() -> Recorded:
        gateway.script = slowly
        with rollout(routing_to(gateway.base_url, "worker")) as recorded:
            result = Runner.run_streamed(agent(user, "worker", tools=[typed]), TASK, max_turns=50)
            async for event in result.stream_events():
                if event.type == "run_item_stream_event":
                    break
        made = len(gateway.seen)
        while result.run_loop_task is not None and not result.run_loop_task.done():
            await asyncio.sleep(0.01)
        assert len(gateway.seen) <= made + 1
        return recorded

    recorded = asyncio.run(broken_off())
    assert statuses(recorded)["worker"] == "abandoned"
    assert not recorded.context._open


@STREAMS
def test_a_deadline_interrupts_the_agent(user: Endpoint, gateway: Endpoint, stream: bool) -> None:
    def script(ask: Ask) -> Say:
        time.sleep(0.02)
        return Say(tool_calls=(("typed", {"count": 1}),))

    gateway.script = script
    worker = agent(user, "worker", tools=[typed])
    with rollout(routing_to(gateway.base_url, "worker"), timeout_seconds=0.2) as recorded:
        with pytest.raises(DeadlineExceeded, match="deadline of rollout 'r1'"):
            asyncio.run(run(worker, stream=stream, max_turns=1000))
    assert statuses(recorded)["worker"] == "interrupted"


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_a_cut_stream_of_a_trained_role_does_not_count(user: Endpoint, gateway: Endpoint, responses: bool) -> None:
    gateway.cuts = True
    with rollout(routing_to(gateway.base_url, "worker")) as recorded:
        asyncio.run(attempted(agent(user, "worker", responses=responses)))
    assert recorded.calls[0].status is Status.INTERRUPTED
    assert recorded.context.infrastructure_error is not None


async def attempted(worker: Any) -> None:
    """Run streamed, whatever comes of it: of a cut stream the SDK makes an answer or an error."""
    try:
        await run(worker, stream=True)
    except agents.AgentsException:
        return


def test_an_exception_around_the_run_is_not_the_agents(user: Endpoint) -> None:
    async def recovering() -> None:
        try:
            raise ValueError("before")
        except ValueError:
            await run(agent(user, "worker"))

    with rollout() as recorded:
        asyncio.run(recovering())
    assert tree(recorded)[0] == ("rollout", "agent", "worker", "ok")


def test_two_handoffs_at_once_are_an_error_on_the_one_made(user: Endpoint) -> None:
    user.script = calling("planner", ("transfer_to_worker", {}), ("transfer_to_critic", {}))
    targets = [agent(user, "worker"), agent(user, "critic")]
    with rollout() as recorded:
        asyncio.run(run(agent(user, "planner", handoffs=targets)))
    span = only(recorded, Kind.HANDOFF, "handoff to worker")
    assert "Multiple handoffs requested" in (span.error or "")


def test_a_handoff_that_fails_is_recorded(user: Endpoint) -> None:
    async def refuse(context: Any) -> None:
        raise ValueError("nobody there")

    user.script = calling("planner", ("transfer_to_worker", {}))
    planner = agent(user, "planner", handoffs=[agents.handoff(agent(user, "worker"), on_handoff=refuse)])
    seen, recorded = fails(lambda: run(planner))
    assert isinstance(seen, ValueError)
    (span,) = recorded.spans(Kind.HANDOFF)
    assert (span.status, span.error) == ("error", "ValueError: nobody there")
