"""Failures: what spans say of them, and that the user's code sees what it would have seen."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import openai
import pytest
from crewai import Crew

from integration_tests.frameworks.story import Say
from integration_tests.frameworks.suites.crewai.crews import (
    agent,
    asked,
    crew,
    failing_search,
    llm,
    search,
    searching,
    slowly,
    task,
)
from integration_tests.frameworks.suites.crewai.server import Endpoint, Seen, speak
from leyden import context
from leyden.errors import DeadlineExceeded
from leyden.spans import Kind, Span, Status
from leyden_plugins.frameworks.crewai import CrewAIAdapter
from tests.capture.rollouts import Recorded, rollout

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def statuses(recorded: Recorded, kind: Kind) -> list[tuple[str, Status]]:
    return [(span.name, span.status) for span in recorded.spans(kind)]


def test_a_model_s_error_reaches_the_user_as_without_leyden(user: Endpoint) -> None:
    user.script = lambda seen: 500
    with pytest.raises(openai.InternalServerError) as plain:
        crew(agent("worker", llm(user.base_url))).kickoff()
    asked = len(user.seen)
    adapter = CrewAIAdapter()
    adapter.attach()
    try:
        with pytest.raises(openai.InternalServerError) as ours, rollout() as recorded:
            crew(agent("worker", llm(user.base_url))).kickoff()
    finally:
        adapter.detach()
    assert str(ours.value) == str(plain.value)
    assert len(user.seen) == 2 * asked
    # CrewAI starts the agent anew after each failure; each of its runs is a span.
    assert statuses(recorded, Kind.AGENT) == [("crew", Status.ERROR)] + [("worker", Status.ERROR)] * 3


@pytest.mark.usefixtures("instrumented")
def test_calls_that_fail_and_are_repeated_stay_below_their_agent(
    user: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crewai.llms.retry._LLM_RATE_LIMIT_INITIAL_DELAY_SECONDS", 0.01)
    user.script = lambda seen: 429 if len(user.seen) < 3 else speak(seen)
    model = llm(user.base_url)
    with rollout() as recorded:
        crew(agent("worker", model), agent("critic", model)).kickoff()
    assert [(span.role, span.status) for span in recorded.calls] == [
        ("worker", Status.ERROR),
        ("worker", Status.ERROR),
        ("worker", Status.OK),
        ("critic", Status.OK),
    ]
    assert {recorded.parent_of(span).name for span in recorded.calls[:3]} == {"worker"}
    assert statuses(recorded, Kind.AGENT) == [("crew", Status.OK), ("worker", Status.OK), ("critic", Status.OK)]


@pytest.mark.usefixtures("instrumented")
def test_a_call_after_a_crew_that_failed_is_the_user_s_own(user: Endpoint) -> None:
    model = llm(user.base_url)
    user.script = lambda seen: 500 if seen.role == "worker" else speak(seen)
    with rollout() as recorded:
        with pytest.raises(openai.InternalServerError):
            crew(agent("worker", model)).kickoff()
        model.call("What now?")
    assert recorded.calls[-1].role == "main"
    assert recorded.parent_of(recorded.calls[-1]).kind is Kind.ROLLOUT


@pytest.mark.usefixtures("instrumented")
def test_a_tool_that_raises_is_an_error_and_the_run_goes_on(user: Endpoint) -> None:
    user.script = searching
    with rollout() as recorded:
        crew(agent("worker", llm(user.base_url), tools=[failing_search])).kickoff()
    assert statuses(recorded, Kind.TOOL) == [("search", Status.ERROR)] * 2
    assert {span.error for span in recorded.spans(Kind.TOOL)} == {
        "ValueError: no archive has north",
        "ValueError: no archive has south",
    }
    assert statuses(recorded, Kind.AGENT) == [("crew", Status.OK), ("worker", Status.OK)]


@pytest.mark.usefixtures("instrumented")
@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [("search", {"raw": '{"query": '}, "Failed to parse tool arguments"), ("fly", {"to": "Oslo"}, "Tool not found")],
)
def test_a_tool_call_that_cannot_be_made_is_an_error(
    user: Endpoint, name: str, arguments: dict[str, Any], error: str
) -> None:
    user.script = lambda seen: speak(seen) if seen.results else Say(tool_calls=((name, arguments),))
    with rollout() as recorded:
        crew(agent("worker", llm(user.base_url), tools=[search])).kickoff()
    (call,) = recorded.spans(Kind.TOOL)
    assert (call.name, call.status, recorded.parent_of(call).name) == (name, Status.ERROR, "worker")
    assert error in str(call.error)
    assert call.attributes["gen_ai.tool.call.id"] is not None


@pytest.mark.usefixtures("instrumented")
def test_a_cancelled_crew_is_cancelled_and_no_longer_speaks(user: Endpoint) -> None:
    user.script = slowly
    model = llm(user.base_url)

    async def run() -> str:
        work = asyncio.create_task(crew(agent("worker", model), agent("critic", model)).akickoff())
        await asked(user)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        frame = context.current()
        assert frame is not None
        return frame.role

    with rollout() as recorded:
        assert asyncio.run(run()) == "main"
    assert statuses(recorded, Kind.AGENT) == [("crew", Status.CANCELLED), ("worker", Status.CANCELLED)]
    assert user.roles == ["worker"]


@pytest.mark.usefixtures("instrumented")
def test_what_was_cancelled_inside_a_coroutine_no_longer_holds_there(user: Endpoint) -> None:
    user.script = slowly
    model = llm(user.base_url)

    async def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await crew(agent("worker", model)).akickoff()
        model.call("What now?")

    async def cancelled() -> None:
        work = asyncio.create_task(run())
        await asked(user)
        work.cancel()
        await work

    with rollout() as recorded:
        asyncio.run(cancelled())
    assert [span.role for span in recorded.calls] == ["worker", "main"]


@pytest.mark.usefixtures("instrumented")
@pytest.mark.parametrize("is_async_task", [False, True])
def test_a_deadline_stops_a_crew_at_its_next_call(user: Endpoint, is_async_task: bool) -> None:
    def last_words(seen: Seen) -> Say | int:
        recorded.context.deadline = time.monotonic()
        return speak(seen)

    user.script = last_words
    model = llm(user.base_url)
    worker, critic = agent("worker", model), agent("critic", model)
    tasks = [task(worker), task(critic, async_execution=is_async_task)]
    with pytest.raises(DeadlineExceeded, match="the deadline of rollout 'r1' passed"):
        with rollout(timeout_seconds=60) as recorded:
            Crew(agents=[worker, critic], tasks=tasks).kickoff()
    assert user.roles == ["worker"]
    assert statuses(recorded, Kind.AGENT) == [
        ("crew", Status.INTERRUPTED),
        ("worker", Status.OK),
        ("critic", Status.INTERRUPTED),
    ]


@pytest.mark.usefixtures("instrumented")
def test_an_answer_of_the_wrong_form_fails_as_without_leyden_and_leaves_nothing_open(user: Endpoint) -> None:
    user.script = lambda seen: Say()
    with pytest.raises(ValueError, match="None or empty"), rollout() as recorded:
        crew(agent("worker", llm(user.base_url))).kickoff()
    spans = [record for record in recorded.records if isinstance(record, Span)]
    assert not {Status.ABANDONED} & {span.status for span in spans}
    assert {span.status for span in recorded.spans(Kind.AGENT)} == {Status.ERROR}


@pytest.mark.usefixtures("instrumented")
def test_what_cannot_be_recorded_does_not_stop_the_crew(
    user: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("the recorder broke")

    monkeypatch.setattr("leyden_plugins.frameworks.crewai.recorder.tool_attributes", broken)
    user.script = searching
    with rollout() as recorded:
        output: Any = crew(agent("worker", llm(user.base_url), tools=[search])).kickoff()
    assert output.raw == "worker speaks"
    assert "'tool_usage_started'" in caplog.text
    assert recorded.spans(Kind.TOOL) == []
