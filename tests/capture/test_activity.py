"""What adapters record with: activities, generators that are advanced, agents that serve one rollout at a time."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest

from leyden import context
from leyden.activity import Activity, Exclusive, advancing, handoff, stepping, unbroken
from leyden.errors import ConcurrentUseError, DeadlineExceeded
from leyden.spans import Kind, Span, Status
from tests.capture.rollouts import Recorded, rollout


def speaker() -> str:
    frame = context.current()
    return frame.role if frame else "nobody"


def agent(name: str, parent: Activity | None = None) -> Activity:
    return Activity(Kind.AGENT, name, role=name, parent=parent, **{"gen_ai.agent.name": name})


def span_of(recorded: Recorded, name: str) -> Span:
    [found] = [record for record in recorded.records if isinstance(record, Span) and record.name == name]
    return found


def test_who_speaks_changes_inside_and_back_after() -> None:
    with rollout() as recorded:
        with agent("writer").running():
            with agent("checker").running():
                assert speaker() == "checker"
            assert speaker() == "writer"
        assert speaker() == "main"
    checker, writer = span_of(recorded, "checker"), span_of(recorded, "writer")
    assert (checker.role, checker.parent_id) == ("checker", writer.span_id)
    assert recorded.context.declared_roles == {"writer", "checker"}


def test_a_frame_entered_without_a_token_is_stale_once_its_activity_is_closed() -> None:
    with rollout():
        writer = agent("writer")
        writer.enter()
        tool = Activity(Kind.TOOL, "search")
        tool.enter()
        assert (speaker(), context.current().span_id) == ("writer", tool.span.span_id)
        tool.close()
        assert context.current().span_id == writer.span.span_id
        writer.close()
        assert speaker() == "main"


def test_a_parent_can_be_named_where_the_context_does_not_know_it() -> None:
    with rollout() as recorded:
        team = agent("team")

        def elsewhere() -> None:
            assert speaker() == "nobody"
            with agent("worker", parent=team).running():
                assert speaker() == "worker"

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        team.close()
    assert span_of(recorded, "worker").parent_id == span_of(recorded, "team").span_id


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("no"), Status.ERROR),
        (asyncio.CancelledError(), Status.CANCELLED),
        (DeadlineExceeded("late"), Status.INTERRUPTED),
        (GeneratorExit(), Status.INTERRUPTED),
    ],
)
def test_what_an_activity_raises_decides_its_status_and_reaches_the_caller(
    error: BaseException, status: Status
) -> None:
    with rollout() as recorded:
        with pytest.raises(type(error)):
            with agent("writer").running():
                raise error
    assert span_of(recorded, "writer").status is status


def test_without_a_rollout_it_only_names_who_speaks() -> None:
    with agent("writer").running() as writer:
        assert (speaker(), writer.span) == ("writer", None)
    assert speaker() == "nobody"


async def numbers(seen: list[str], count: int = 3) -> AsyncIterator[int]:
    try:
        for number in range(count):
            seen.append(speaker())
            yield number
    finally:
        seen.append(f"closed by {speaker()}")


def test_an_async_generator_runs_inside_and_its_consumer_outside() -> None:
    seen: list[str] = []

    async def consume() -> list[str]:
        return [speaker() async for _ in advancing(numbers(seen), agent("writer"))]

    with rollout() as recorded:
        assert asyncio.run(consume()) == ["main"] * 3
    assert seen == ["writer"] * 3 + ["closed by writer"]
    assert span_of(recorded, "writer").status is Status.OK


def test_a_consumer_that_stops_early_closes_the_generator_and_interrupts_the_span() -> None:
    seen: list[str] = []

    async def consume() -> None:
        items = advancing(numbers(seen), agent("writer"))
        async for _ in items:
            break
        await items.aclose()

    with rollout() as recorded:
        asyncio.run(consume())
    assert seen == ["writer", "closed by writer"]
    assert span_of(recorded, "writer").status is Status.INTERRUPTED


def test_a_generator_that_fails_is_an_error_and_its_exception_passes() -> None:
    async def broken() -> AsyncIterator[int]:
        yield 1
        raise ValueError("broken")

    async def consume() -> None:
        async for _ in advancing(broken(), agent("writer")):
            pass

    with rollout() as recorded, pytest.raises(ValueError, match="broken"):
        asyncio.run(consume())
    assert (span_of(recorded, "writer").status, span_of(recorded, "writer").error) == (
        Status.ERROR,
        "ValueError: broken",
    )


def test_a_sync_generator_runs_inside_and_its_consumer_outside() -> None:
    seen: list[str] = []

    def counted() -> Iterator[int]:
        for number in range(2):
            seen.append(speaker())
            yield number

    with rollout() as recorded:
        assert [speaker() for _ in stepping(counted(), agent("writer"))] == ["main", "main"]
    assert seen == ["writer", "writer"]
    assert span_of(recorded, "writer").status is Status.OK


def test_a_sync_generator_left_early_is_interrupted() -> None:
    with rollout() as recorded:
        items = stepping(iter([1, 2]), agent("writer"))
        next(items)
        items.close()
    assert span_of(recorded, "writer").status is Status.INTERRUPTED


def test_a_handoff_says_who_passes_control_to_whom() -> None:
    with rollout() as recorded, agent("planner").running():
        handoff("worker")
    [span] = recorded.spans(Kind.HANDOFF)
    assert (span.role, span.attributes) == ("planner", {"leyden.handoff.to": "worker"})


def test_an_observer_that_fails_is_logged_and_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    @unbroken
    def observe(value: int) -> None:
        raise KeyError(value)

    observe(7)
    assert "an event could not be recorded" in caplog.text


@dataclass
class Team:
    """An agent with a memory; any two are equal, and none has a hash."""


def test_agents_are_told_apart_by_identity_and_forgotten_with_it() -> None:
    exclusive, one, other = Exclusive(), Team(), Team()
    with rollout(rollout_id="r1"):
        exclusive.take(one, "one")
        with rollout(rollout_id="r2"):
            exclusive.take(other, "other")
    del one, other
    gc.collect()
    assert exclusive._users == {}


def test_what_closing_a_stream_raises_does_not_hide_why_it_was_closed(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def __aiter__(self) -> "Broken":
            return self

        async def __anext__(self) -> int:
            raise ValueError("the reason")

        async def aclose(self) -> None:
            raise OSError("on closing")

    async def consume() -> None:
        async for _ in advancing(Broken(), agent("writer")):
            pass

    with rollout() as recorded, pytest.raises(ValueError, match="the reason"):
        asyncio.run(consume())
    assert span_of(recorded, "writer").error == "ValueError: the reason"
    assert "a stream could not be closed" in caplog.text


def test_two_rollouts_cannot_use_one_agent_at_once() -> None:
    exclusive, team = Exclusive(), Team()
    with rollout(rollout_id="r1"):
        give_back = exclusive.take(team, "team")
        with rollout(rollout_id="r2") as second:
            with pytest.raises(ConcurrentUseError, match=r"'team' runs in rollout 'r1' .* 'r2' .*leyden.per_rollout"):
                exclusive.take(team, "team")
            assert isinstance(second.context.infrastructure_error, ConcurrentUseError)
        give_back()
        give_back()
        with rollout(rollout_id="r3"):
            exclusive.take(team, "team")()


def test_one_rollout_may_use_its_agent_twice_at_once_and_an_ended_one_holds_nothing() -> None:
    exclusive, team = Exclusive(), Team()
    with rollout(rollout_id="r1"):
        exclusive.take(team, "team")
        exclusive.take(team, "team")
    with rollout(rollout_id="r2"):
        exclusive.take(team, "team")()


def test_outside_rollouts_nobody_is_kept_from_anything() -> None:
    exclusive, team = Exclusive(), Team()
    exclusive.take(team, "team")
    exclusive.take(team, "team")()
