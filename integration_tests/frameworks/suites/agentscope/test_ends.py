"""How replies that go wrong are recorded: errors, cancellation, cut streams, deadlines, shared agents."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import aclosing
from typing import Any

import openai
import pytest
from agentscope.agent import Agent
from agentscope.event import ReplyEndEvent, TextBlockDeltaEvent
from agentscope.message import Msg

from integration_tests.frameworks.story import Ask, Say
from integration_tests.frameworks.suites.agentscope.agents import agent, said, search, tree
from integration_tests.frameworks.suites.agentscope.conftest import Run
from integration_tests.frameworks.suites.agentscope.server import Endpoint
from leyden.errors import ConcurrentUseError, DeadlineExceeded
from leyden.spans import Kind, Span, Status
from tests.capture.rollouts import Recorded, rollout

pytestmark = pytest.mark.usefixtures("instrumented")


async def slow(ask: Ask) -> Say:
    """Answer late."""
    await asyncio.sleep(3)
    return Say(text="too late")


def status(recorded: Recorded, kind: Kind = Kind.AGENT) -> Status:
    (span,) = recorded.spans(kind)
    return span.status


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_whose_cancellation_agentscope_swallows_is_cancelled(run: Run, user: Endpoint, stream: bool) -> None:
    user.script = slow

    async def episode() -> Recorded:
        with rollout() as recorded:
            answer = await asyncio.wait_for(agent("writer", user.base_url, stream=stream).reply(said()), 0.3)
            assert answer.finished_reason == "interrupted", "an ordinary message, as without Leyden"
            assert len(recorded.records) == 2, "closed by themselves, not by the end of the rollout"
        return recorded

    recorded = run(episode())
    assert (status(recorded), status(recorded, Kind.MODEL_CALL)) == (Status.CANCELLED, Status.CANCELLED)
    assert recorded.spans(Kind.AGENT)[0].attributes["agentscope.finished_reason"] == "interrupted"


def test_a_reply_configured_to_raise_its_cancellation_is_cancelled_too(run: Run, user: Endpoint) -> None:
    user.script = slow

    async def episode() -> Recorded:
        with rollout() as recorded:
            with contextlib.suppress(TimeoutError):  # agentscope 2.0.7 swallows it nevertheless
                await asyncio.wait_for(agent("writer", user.base_url, raise_cancelled=True).reply(said()), 0.3)
            assert len(recorded.records) == 2
        return recorded

    assert status(run(episode())) is Status.CANCELLED


def test_a_cancelled_tool_is_cancelled_with_its_reply(run: Run, user: Endpoint) -> None:
    user.script = lambda ask: Say(tool_calls=(("wait", {}), ("search", {"query": "north"})))

    async def wait() -> str:
        """Wait."""
        await asyncio.sleep(5)
        return "late"

    async def episode() -> Recorded:
        with rollout() as recorded:
            await asyncio.wait_for(agent("worker", user.base_url, tools=[wait, search]).reply(said()), 0.4)
        return recorded

    recorded = run(episode())
    assert status(recorded) is Status.CANCELLED
    assert {span.name: span.status for span in recorded.spans(Kind.TOOL)} == {
        "wait": Status.CANCELLED,
        "search": Status.OK,
    }


def test_after_the_deadline_no_agent_asks_its_model_again(run: Run, user: Endpoint) -> None:
    async def late(ask: Ask) -> Say:
        await asyncio.sleep(0.3)
        return Say(text="well")

    user.script = late

    async def episode() -> Recorded:
        writer, checker = agent("writer", user.base_url), agent("checker", user.base_url)
        with rollout(timeout_seconds=0.2) as recorded:
            await writer.reply(said())
            with pytest.raises(DeadlineExceeded, match="the deadline of rollout 'r1' passed"):
                await checker.reply(said())
        return recorded

    started = time.monotonic()
    recorded = run(episode())
    assert time.monotonic() - started < 1
    assert user.roles == ["writer"]
    assert [span.status for span in recorded.spans(Kind.AGENT)] == [Status.OK, Status.INTERRUPTED]


def test_the_user_sees_the_error_of_the_model_and_the_spans_say_it(run: Run, user: Endpoint) -> None:
    user.script = lambda ask: 400

    async def episode() -> Recorded:
        with rollout() as recorded:
            with pytest.raises(openai.BadRequestError, match="told to fail"):
                await agent("writer", user.base_url).reply(said())
        return recorded

    recorded = run(episode())
    assert (status(recorded), status(recorded, Kind.MODEL_CALL)) == (Status.ERROR, Status.ERROR)
    assert "told to fail" in str(recorded.spans(Kind.AGENT)[0].error)


def test_retries_of_the_client_belong_to_the_agent_too(run: Run, user: Endpoint) -> None:
    answers: list[Any] = [Say(text="at last"), 500]
    user.script = lambda ask: answers.pop()

    async def episode() -> Recorded:
        with rollout() as recorded:
            await agent("writer", user.base_url, retries=1).reply(said())
        return recorded

    recorded = run(episode())
    assert status(recorded) is Status.OK
    assert {call.role for call in recorded.calls} == {"writer"}
    assert recorded.calls[-1].status is Status.OK
    assert user.roles == ["writer", "writer"]


def test_a_stream_that_breaks_off_leaves_an_interrupted_call(run: Run, user: Endpoint) -> None:
    user.script = lambda ask: "cut"

    async def episode() -> Recorded:
        with rollout() as recorded:
            answer = await agent("writer", user.base_url, stream=True).reply(said())
        assert answer.get_text_content() == "half of", "what AgentScope makes of it"
        return recorded

    assert status(run(episode()), Kind.MODEL_CALL) is Status.INTERRUPTED


@pytest.mark.parametrize(("last", "expected"), [(ReplyEndEvent, Status.OK), (TextBlockDeltaEvent, Status.INTERRUPTED)])
def test_a_reader_that_stops_interrupts_a_reply_unless_it_had_ended(
    run: Run, user: Endpoint, last: type, expected: Status
) -> None:
    async def episode() -> Recorded:
        with rollout() as recorded:
            async with aclosing(agent("writer", user.base_url, stream=True).reply_stream(said())) as events:
                async for event in events:
                    if isinstance(event, last):
                        break
            for _ in range(50):  # AgentScope leaves its inner generators to the loop
                await asyncio.sleep(0.001)
        return recorded

    assert status(run(episode())) is expected


def test_one_agent_in_two_rollouts_is_refused_with_the_cure_until_the_first_is_over(run: Run, user: Endpoint) -> None:
    async def episode() -> None:
        shared = agent("writer", user.base_url)
        with rollout(rollout_id="r1"):
            await shared.reply(said())
            with rollout(rollout_id="r2") as second:
                with pytest.raises(ConcurrentUseError, match=r"'writer' runs in rollout 'r1'.*per_rollout"):
                    await shared.reply(said())
                with pytest.raises(ConcurrentUseError, match="'writer'"):
                    await shared.observe(said())
                with pytest.raises(ConcurrentUseError, match="'writer'"):
                    await shared.compress_context()
            assert isinstance(second.context.infrastructure_error, ConcurrentUseError)
            await shared.reply(said())
        with rollout(rollout_id="r3"):
            await shared.reply(said())

    run(episode())
    assert len(user.seen) == 3, "what was refused never left"


def test_one_agent_may_reply_twice_at_once_in_one_rollout(run: Run, user: Endpoint) -> None:
    async def episode() -> Recorded:
        writer = agent("writer", user.base_url)
        with rollout() as recorded:
            await asyncio.gather(*(writer.reply(said()) for _ in range(3)))
        return recorded

    recorded = run(episode())
    assert len({call.parent_id for call in recorded.calls}) == 3


def test_an_observer_that_fails_does_not_break_the_agent(
    run: Run, user: Endpoint, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leyden_plugins.frameworks.agentscope import recorder

    user.script = lambda ask: Say(text="done") if len(user.seen) > 1 else Say(tool_calls=(("search", {"query": "x"}),))

    def broken(content: object) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(recorder, "text_of", broken)

    async def episode() -> Msg:
        with rollout():
            return await agent("worker", user.base_url, tools=[search]).reply(said())

    assert run(episode()).get_text_content() == "done"
    assert "an event could not be recorded" in caplog.text


def test_a_reply_without_end_and_a_subclass_of_agent_are_recorded(run: Run, user: Endpoint) -> None:
    class Polite(Agent):
        async def reply(self, inputs: Any = None, structured_schema: Any = None) -> Msg:
            answer = await super().reply(inputs, structured_schema)
            return await super().reply(answer, structured_schema)

    async def episode() -> Recorded:
        plain = agent("writer", user.base_url)
        polite = Polite("writer", "[[role=writer]] [[rollout=r1]]", plain.model)
        with rollout() as recorded:
            await polite.reply(said())
        return recorded

    recorded = run(episode())
    assert tree(recorded) == ["agent writer writer ok < rollout", "model_call chat writer ok < writer"] * 2
    assert all(isinstance(record, Span) for record in recorded.records)
