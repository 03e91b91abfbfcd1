"""How runs end: errors, cancellation, a reader that leaves, the deadline. None may hang or leave a span open."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from autogen_agentchat.base import Response, TaskResult
from autogen_agentchat.teams import RoundRobinGroupChat, SelectorGroupChat, Swarm
from autogen_core import CancellationToken
from openai import InternalServerError
from pydantic import BaseModel, ValidationError

from integration_tests.frameworks.suites.autogen.conftest import Observe
from integration_tests.frameworks.suites.autogen.server import Endpoint, Seen, in_turn
from integration_tests.frameworks.suites.autogen.teams import (
    agent,
    call,
    client,
    counted,
    handoffs,
    run,
    say,
    until_done,
)
from leyden import wire
from leyden.errors import DeadlineExceeded
from leyden.spans import Kind, Span, Status
from tests.capture.rollouts import Recorded, rollout, routing_to

SLOW_SECONDS = 3.0
SOON_SECONDS = 0.4
"""After it a request has arrived, on a busy machine too."""


async def slowly(seen: Seen) -> Any:
    await asyncio.sleep(SLOW_SECONDS)
    return say("late")


def status_by_name(recorded: Recorded) -> dict[str, Status]:
    """Return how each agent, tool and model call ended; of several with one name the last."""
    return {span.name: span.status for span in recorded.records if isinstance(span, Span)}


def raised_by(make: Callable[[], Awaitable[Any]]) -> BaseException:
    with pytest.raises(BaseException) as found:
        run(make)
    return found.value


def test_a_model_error_reaches_the_user_as_without_leyden(user: Endpoint, observed: Observe) -> None:
    user.script = lambda seen: 500
    plain = raised_by(lambda: RoundRobinGroupChat([agent("a", user.base_url)], max_turns=1).run(task="go"))
    team = observed(RoundRobinGroupChat([agent("a", user.base_url)], max_turns=1))
    lone = observed(agent("b", user.base_url))
    with rollout() as recorded:
        seen = raised_by(lambda: team.run(task="go"))
        alone = raised_by(lambda: lone.run(task="go"))
    assert type(seen) is type(plain) is RuntimeError
    assert str(seen).splitlines()[0] == str(plain).splitlines()[0]
    assert isinstance(alone, InternalServerError)
    statuses = {span.name: span for span in recorded.spans(Kind.AGENT)}
    assert {span.status for span in statuses.values()} == {Status.ERROR}
    assert str(statuses["a"].error).startswith("InternalServerError")
    assert {span.status for span in recorded.calls} == {Status.ERROR}


def test_a_clients_retry_is_one_more_call_below_the_same_agent(user: Endpoint, observed: Observe) -> None:
    answers = [429, say("fine")]
    user.script = lambda seen: answers.pop(0)
    lone = agent("a", user.base_url)
    lone._model_client = client(user.base_url, max_retries=2)
    lone = observed(lone)
    with rollout() as recorded:
        run(lambda: lone.run(task="go"))
    assert [span.status for span in recorded.calls] == [Status.ERROR, Status.OK]
    assert [span.status for span in recorded.spans(Kind.AGENT)] == [Status.OK]


def test_a_tools_error_is_its_spans_and_the_run_goes_on(user: Endpoint, observed: Observe) -> None:
    def fail(reason: str) -> str:
        """Fail."""
        raise ValueError(reason)

    user.script = in_turn(a=[call("fail", reason="no luck"), call("fail", raw="{not json"), call("gone"), say("DONE")])
    lone = observed(agent("a", user.base_url, tools=[fail], max_tool_iterations=4))
    with rollout() as recorded:
        result = run(lambda: lone.run(task="go"))
    assert result.messages[-1].content == "DONE"
    tools = recorded.spans(Kind.TOOL)
    assert [span.status for span in tools] == [Status.ERROR] * 3
    errors = [str(span.error) for span in tools]
    assert errors[0] == "no luck" and "Expecting property name" in errors[1] and "'gone' not found" in errors[2]
    assert tools[1].attributes["gen_ai.tool.call.arguments"] == "{not json"
    assert recorded.spans(Kind.AGENT)[0].status is Status.OK


@pytest.mark.parametrize("arguments", ["[]", "3", '"worker"'])
def test_handoff_arguments_that_are_no_object_are_a_tool_error(
    user: Endpoint, observed: Observe, arguments: str
) -> None:
    user.script = in_turn(planner=[call("transfer_to_worker", raw=arguments)], worker=[say("DONE")])
    agents = [agent("planner", user.base_url, handoffs=["worker"]), agent("worker", user.base_url)]
    team = observed(Swarm(agents, termination_condition=until_done()))
    with rollout() as recorded:
        result = run(lambda: team.run(task="go"))
    assert result.messages[-1].content == "DONE"
    assert [span.status for span in recorded.spans(Kind.TOOL)] == [Status.ERROR]
    # AutoGen treats arguments that are no JSON at all likewise: an error as the message of the handoff.
    assert handoffs(recorded) == ["planner->worker"]


@pytest.mark.parametrize("is_deployed", [False, True])
def test_without_a_rollout_autogen_keeps_its_own_behaviour(
    user: Endpoint, observed: Observe, is_deployed: bool
) -> None:
    wire.set_default_routing(routing_to(user.base_url, "nobody") if is_deployed else None)
    user.script = in_turn(planner=[call("transfer_to_worker", raw="[]")])
    lone = observed(agent("planner", user.base_url, handoffs=["worker"]))
    try:
        with pytest.raises(TimeoutError):
            run(lambda: asyncio.wait_for(lone.run(task="go"), SOON_SECONDS))
    finally:
        wire.set_default_routing(None)


def test_an_answer_that_does_not_parse_fails_the_agent_and_not_the_call(user: Endpoint, observed: Observe) -> None:
    class Answer(BaseModel):
        value: int

    user.script = in_turn(a=[say("no json")])
    lone = observed(agent("a", user.base_url, output_content_type=Answer))
    with rollout() as recorded:
        error = raised_by(lambda: lone.run(task="go"))
    assert isinstance(error, ValidationError)
    assert [span.status for span in recorded.spans(Kind.AGENT)] == [Status.ERROR]
    assert [span.status for span in recorded.calls] == [Status.OK]


def test_a_cut_stream_is_an_interrupted_call_though_autogen_takes_it_for_an_answer(
    user: Endpoint, observed: Observe
) -> None:
    user.cuts = True
    lone = observed(agent("a", user.base_url, model_client_stream=True))
    with rollout() as recorded:
        result = run(lambda: lone.run(task="go"))
    assert result.messages[-1].content == "a speaks"
    assert [span.status for span in recorded.calls] == [Status.INTERRUPTED]
    assert [span.status for span in recorded.spans(Kind.AGENT)] == [Status.OK]


def test_a_token_cancels_the_running_call_and_every_span(user: Endpoint, observed: Observe) -> None:
    user.script = slowly
    team = observed(RoundRobinGroupChat([agent("a", user.base_url)], max_turns=3))
    token = CancellationToken()

    async def main() -> None:
        asyncio.get_running_loop().call_later(SOON_SECONDS, token.cancel)
        await team.run(task="go", cancellation_token=token)

    started = time.monotonic()
    with rollout() as recorded:
        assert isinstance(raised_by(main), asyncio.CancelledError)
        open_spans = recorded.context.close()
    assert time.monotonic() - started < SLOW_SECONDS
    assert open_spans == 1  # the rollout itself
    assert set(status_by_name(recorded).values()) == {Status.CANCELLED, Status.ABANDONED}
    assert {span.status for span in recorded.spans(Kind.AGENT)} == {Status.CANCELLED}


def test_a_token_cancelled_during_a_tool_does_not_hang(user: Endpoint, observed: Observe) -> None:
    async def wait(seconds: int) -> str:
        """Wait."""
        await asyncio.sleep(seconds)
        return "waited"

    user.script = in_turn(a=[call("wait", seconds=9)])
    team = observed(RoundRobinGroupChat([agent("a", user.base_url, tools=[wait])], max_turns=3))
    token = CancellationToken()

    async def main() -> None:
        asyncio.get_running_loop().call_later(SOON_SECONDS, token.cancel)
        await team.run(task="go", cancellation_token=token)

    with rollout() as recorded:
        assert isinstance(raised_by(main), asyncio.CancelledError)
    assert [span.status for span in recorded.spans(Kind.TOOL)] == [Status.CANCELLED]


def test_wait_for_ends_a_team_and_its_conversation(user: Endpoint, observed: Observe) -> None:
    user.script = slowly
    team = observed(RoundRobinGroupChat([agent("a", user.base_url)], max_turns=3))

    async def main() -> None:
        await asyncio.wait_for(team.run(task="go"), SOON_SECONDS)

    started = time.monotonic()
    with rollout() as recorded:
        assert isinstance(raised_by(main), TimeoutError)
    assert time.monotonic() - started < SLOW_SECONDS
    assert len(user.seen) == 1
    assert {span.status for span in recorded.spans(Kind.AGENT)} == {Status.CANCELLED}


def test_a_reader_that_leaves_a_teams_stream_ends_its_conversation(user: Endpoint, observed: Observe) -> None:
    user.script = in_turn(a=[say("one")], b=[say("two")])
    team = observed(RoundRobinGroupChat([agent("a", user.base_url), agent("b", user.base_url)], max_turns=50))

    async def main() -> int:
        async for message in team.run_stream(task="go"):
            if getattr(message, "source", "") == "a":
                break
        await asyncio.sleep(0.15)
        calls = len(user.seen)
        await asyncio.sleep(0.15)
        assert len(user.seen) == calls < 10
        assert recorded.context.close() == 1
        return calls

    with rollout() as recorded:
        run(main)
    assert {span.status for span in recorded.spans(Kind.AGENT)} <= {Status.OK, Status.CANCELLED, Status.INTERRUPTED}
    assert recorded.spans(Kind.AGENT)[0].status is Status.INTERRUPTED


def test_a_reader_that_leaves_with_the_answer_leaves_spans_that_are_done(user: Endpoint, observed: Observe) -> None:
    lone = observed(agent("a", user.base_url))
    team = observed(RoundRobinGroupChat([agent("b", user.base_url)], max_turns=1))

    async def main() -> None:
        async for event in lone.on_messages_stream([], CancellationToken()):
            if isinstance(event, Response):
                break
        async for event in team.run_stream(task="go"):
            if isinstance(event, TaskResult):
                break
        recorded.context.close()  # before the loop has closed the streams

    with rollout() as recorded:
        run(main)
    assert {span.name: span.status for span in recorded.spans(Kind.AGENT)} == {
        "a": Status.OK,
        "b": Status.OK,
        "RoundRobinGroupChat": Status.OK,
    }


@pytest.mark.parametrize("place", ["agent", "manager", "tool", "next call"])
def test_the_deadline_ends_a_team_wherever_it_is(user: Endpoint, observed: Observe, place: str) -> None:
    async def wait(seconds: float) -> str:
        """Wait."""
        await asyncio.sleep(seconds)
        return "waited"

    async def script(seen: Seen) -> Any:
        if place in ("agent", "manager") and seen.role.startswith(place):
            return await slowly(seen)
        if seen.role == "manager":
            return say("agent_one")
        return call("wait", seconds=9.0) if place == "tool" else say("more")

    user.script = script
    one, two = (agent(name, user.base_url, tools=[wait]) for name in ("agent_one", "agent_two"))
    team = observed(SelectorGroupChat([one, two], model_client=client(user.base_url), allow_repeated_speaker=True))
    started = time.monotonic()
    with rollout(timeout_seconds=2 * SOON_SECONDS) as recorded:
        assert isinstance(raised_by(lambda: team.run(task="go")), DeadlineExceeded)
    assert time.monotonic() - started < SLOW_SECONDS
    assert recorded.spans(Kind.AGENT)[0].status is Status.INTERRUPTED
    assert Status.ABANDONED not in status_by_name(recorded).values()


def test_the_deadline_inside_an_agent_that_is_a_tool_does_not_hang(user: Endpoint, observed: Observe) -> None:
    from autogen_agentchat.tools import AgentTool

    async def script(seen: Seen) -> Any:
        if seen.role == "expert":
            await asyncio.sleep(3 * SOON_SECONDS)
            return call("search")
        return call("expert", task="do")

    async def search() -> str:
        """Search."""
        return "x"

    user.script = script
    expert = agent("expert", user.base_url, tools=[search], max_tool_iterations=3)
    boss = observed(agent("boss", user.base_url, tools=[AgentTool(expert)], max_tool_iterations=3))
    with rollout(timeout_seconds=2 * SOON_SECONDS) as recorded:
        assert isinstance(raised_by(lambda: boss.run(task="go")), DeadlineExceeded)
    assert counted(recorded, Kind.AGENT) == {"boss": 1, "expert": 1}
    assert {span.status for span in recorded.spans(Kind.AGENT)} == {Status.INTERRUPTED}
