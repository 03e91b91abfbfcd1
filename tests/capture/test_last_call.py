"""`leyden.last_call` finds the call that its caller means."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest

import leyden
from leyden import context
from leyden.errors import RewardError
from leyden.spans import Kind, Reward
from tests.capture.rollouts import rollout


def ask(name: str = "chat") -> str:
    """Make a model call as the wire does, and return its span."""
    frame = context.current()
    assert frame is not None and frame.rollout is not None
    span = frame.rollout.open(Kind.MODEL_CALL, name, frame.role, frame.span_id)
    span.close()
    return span.span_id


def test_the_latest_call_is_rewarded() -> None:
    with rollout() as one:
        ask()
        second = ask()
        leyden.emit_reward(0.3, span=leyden.last_call())
    [found] = [record for record in one.records if isinstance(record, Reward)]
    assert (found.value, found.target_span) == (0.3, second)


def test_a_role_has_a_latest_call_of_its_own() -> None:
    with rollout():
        with leyden.role("writer"):
            written = ask()
        with leyden.role("critic"):
            ask()
        latest = ask()
        assert leyden.last_call("writer") == written
        assert leyden.last_call() == latest


def test_inside_a_role_its_own_calls_come_first_and_a_silent_one_finds_the_call_before_it() -> None:
    async def agent() -> None:
        with leyden.role("writer"):
            written = await asyncio.create_task(in_task())
            assert leyden.last_call() == written
        with leyden.role("critic"):
            assert leyden.last_call() == written

    with rollout():
        asyncio.run(agent())


async def in_task() -> str:
    await asyncio.sleep(0)
    return ask()


def test_branches_side_by_side_find_their_own_calls() -> None:
    met = {}

    async def branch(name: str) -> None:
        for turn in range(3):
            await asyncio.sleep(0.001)
            mine = ask()
            await asyncio.sleep(0.002)  # the others call meanwhile
            met[name, turn] = leyden.last_call() == mine

    async def agent() -> None:
        ask()
        await asyncio.gather(*(branch(name) for name in "abc"))

    with rollout():
        asyncio.run(agent())
    assert len(met) == 9 and all(met.values())


def test_branches_whose_calls_run_in_tasks_of_their_own_are_told_apart_by_their_roles() -> None:
    met = {}

    async def branch(name: str) -> None:
        with leyden.role(name):
            mine = await asyncio.create_task(in_task())
            await asyncio.sleep(0.002)
            met[name] = leyden.last_call() == mine

    async def agent() -> None:
        ask()
        await asyncio.gather(*(branch(name) for name in "abc"))

    with rollout():
        asyncio.run(agent())
    assert met == {"a": True, "b": True, "c": True}


def test_branches_without_roles_whose_calls_run_in_tasks_of_their_own_follow_on_what_they_called_before() -> None:
    met = {}

    async def branch(name: str) -> None:
        ask()
        mine = await asyncio.create_task(in_task())
        await asyncio.sleep(0.002)
        met[name] = leyden.last_call() == mine

    async def agent() -> None:
        await asyncio.gather(*(branch(name) for name in "abc"))

    with rollout():
        asyncio.run(agent())
    assert met == {"a": True, "b": True, "c": True}


def test_calls_of_child_tasks_and_threads_are_found_by_their_parent() -> None:
    async def agent() -> None:
        ask()
        assert await asyncio.create_task(in_task()) == leyden.last_call()
        assert await asyncio.to_thread(ask) == leyden.last_call()

    with rollout():
        asyncio.run(agent())
        found: list[str] = []
        copied = contextvars.copy_context()
        thread = threading.Thread(target=lambda: found.append(copied.run(ask)))
        thread.start()
        thread.join()
        assert leyden.last_call() == found[0]


def test_a_call_that_turned_out_to_be_anothers_counts_for_that_role() -> None:
    with rollout() as one:
        span = one.context.open(Kind.MODEL_CALL, "chat", "main", None)
        one.context.reassign(span, "writer")
        assert leyden.last_call("writer") == span.span_id
        with pytest.raises(RewardError, match=r"no model call of role 'main' yet \(roles that spoke: \['writer'\]\)"):
            leyden.last_call("main")


def test_rollouts_in_one_context_do_not_see_each_others_calls() -> None:
    with rollout():
        ask()
    with rollout(rollout_id="r2"):
        with pytest.raises(RewardError, match="rollout 'r2' has no model call yet"):
            leyden.last_call()
        assert ask() == leyden.last_call()


def test_outside_a_rollout_there_is_none() -> None:
    assert leyden.last_call() is None
    leyden.emit_reward(1.0, span=leyden.last_call())
