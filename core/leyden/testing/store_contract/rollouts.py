"""Duties of a store towards rollouts, their attempts and leases."""

from __future__ import annotations

import asyncio

from leyden.errors import RewardError, StoreError
from leyden.interfaces import Outcome, Owner
from leyden.ownership import current_owner
from leyden.spans import Mode, RolloutState
from leyden.testing.records import a_reward, a_rollout
from leyden.testing.store_contract.harness import MakeStore, dead_owner, opened, refuses, running, start, state_of


async def check_rollouts_come_back_in_order_and_only_once(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        first = a_rollout("b", task={"deep": [1, None, {"x": "é"}]})
        second = a_rollout("a", step=2, mode=Mode.EVALUATE)
        await store.add_rollouts([first, second])
        await store.add_rollouts([a_rollout("b", task="another")])
        assert await store.rollouts() == [first, second]
        assert await store.rollouts(step=2) == [second]
        assert await store.rollouts(mode=Mode.TRAIN) == [first]
        assert await store.rollouts(state=RolloutState.RUNNING) == []


async def check_start_takes_only_queued_rollouts(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        await store.add_rollouts([a_rollout("a"), a_rollout("b")])
        assert await start(store, "a", "unknown") == {"a": 1}
        assert await start(store, "a", "b") == {"b": 1}
        rollout = (await store.rollouts())[0]
        assert (rollout.state, rollout.attempt, rollout.versions) == (RolloutState.RUNNING, 1, {"policy": 3})
        assert rollout.started_ns > 0


async def check_two_callers_never_start_one_rollout(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        names = [f"rollout-{i}" for i in range(20)]
        await store.add_rollouts([a_rollout(name) for name in names])
        taken = await asyncio.gather(*(start(store, *names) for _ in range(8)))
        assert sorted(name for one in taken for name in one) == sorted(names)


async def check_finish_keeps_the_outcome(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        await running(store)
        outcome = Outcome(
            rollout_id="rollout-1", attempt=1, state=RolloutState.FAILED, reward=0.25, output=["x"], error="no",
            error_type="ValueError",
        )  # fmt: skip
        await store.finish([outcome])
        await store.finish([outcome])
        [rollout] = await store.rollouts()
        assert (rollout.state, rollout.reward, rollout.output) == (RolloutState.FAILED, 0.25, ["x"])
        assert (rollout.error, rollout.error_type) == ("no", "ValueError")
        assert rollout.ended_ns >= rollout.started_ns


async def check_forbidden_moves_are_refused(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        await store.add_rollouts([a_rollout("queued")])
        await running(store, "done")
        await store.finish([Outcome(rollout_id="done", attempt=1, state=RolloutState.SUCCEEDED)])
        changed = Outcome(rollout_id="done", attempt=1, state=RolloutState.FAILED)
        await refuses(store.finish([changed]), StoreError, "done", "succeeded", "failed")
        early = Outcome(rollout_id="queued", attempt=1, state=RolloutState.SUCCEEDED)
        await refuses(store.finish([early]), StoreError, "queued")
        await refuses(store.requeue(["done"]), StoreError, "done", "succeeded")
        missing = Outcome(rollout_id="missing", attempt=1, state=RolloutState.SUCCEEDED)
        await refuses(store.finish([missing]), StoreError, "missing")
        assert await state_of(store, "done") is RolloutState.SUCCEEDED


async def check_a_lost_rollout_is_tried_again(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        await running(store)
        await store.finish([Outcome(rollout_id="rollout-1", attempt=1, state=RolloutState.LOST)])
        assert await start(store, "rollout-1") == {}
        await store.requeue(["rollout-1"])
        await store.requeue(["rollout-1"])
        assert await start(store, "rollout-1") == {"rollout-1": 2}


async def check_an_expired_lease_is_reclaimed_and_a_renewed_one_is_not(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        await store.add_rollouts([a_rollout("slow"), a_rollout("kept")])
        await start(store, "slow", "kept", lease_seconds=0.0)
        await store.renew(["kept"], owner=current_owner(), lease_seconds=60.0)
        assert list(await store.reclaim()) == ["slow"]
        assert await state_of(store, "slow") is RolloutState.QUEUED
        assert await state_of(store, "kept") is RolloutState.RUNNING


async def check_only_the_owner_renews(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        await store.add_rollouts([a_rollout()])
        await start(store, "rollout-1", lease_seconds=0.0)
        mine = current_owner()
        other = Owner(pid=mine.pid, process_start="another", boot_id=mine.boot_id)
        await store.renew(["rollout-1"], owner=other, lease_seconds=60.0)
        assert list(await store.reclaim()) == ["rollout-1"]


async def check_a_dead_owner_loses_its_rollouts_at_once(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        await store.add_rollouts([a_rollout("mine"), a_rollout("dead"), a_rollout("reused"), a_rollout("rebooted")])
        mine = current_owner()
        await start(store, "mine")
        await start(store, "dead", owner=dead_owner())
        reused = Owner(pid=mine.pid, process_start="another", boot_id=mine.boot_id)
        await start(store, "reused", owner=reused)
        rebooted = Owner(pid=mine.pid, process_start=mine.process_start, boot_id="another")
        await start(store, "rebooted", owner=rebooted)
        assert sorted(await store.reclaim()) == ["dead", "rebooted", "reused"]
        assert list(await store.reclaim()) == []
        assert await start(store, "dead") == {"dead": 2}


async def check_a_group_is_scored_once_and_only_when_it_has_finished(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        for name in ("a", "b", "other"):
            await running(store, name, group_id="another" if name == "other" else "group-1")
        late = a_reward("a", 0.5, name="quality")
        await refuses(store.score("group-1", [late], {"a": 0.5}), StoreError, "a", "running")
        for name in ("a", "b", "other"):
            await store.finish([Outcome(rollout_id=name, attempt=1, state=RolloutState.SUCCEEDED)])
        await refuses(store.score("group-1", [late], {"a": 0.5, "other": 1.0}), StoreError, "other", "another")
        await refuses(store.score("group-1", [late], {"a": 0.5, "missing": 1.0}), StoreError, "missing")
        await refuses(store.score("group-1", [late], {"a": float("nan")}), RewardError, "a", "nan")
        assert not await store.is_scored("group-1")
        assert [one.rewards for one in await store.records(["a"])] == [[]]  # no refusal has left a trace
        await store.score("group-1", [late], {"a": 0.5, "b": None})
        await store.score("group-1", [a_reward("a", 0.75, name="quality")], {"a": 0.75, "b": 1.0})
        assert await store.is_scored("group-1") and not await store.is_scored("another")
        a, b = await store.records(["a", "b"])
        assert (a.rollout.reward, a.rewards, b.rollout.reward) == (0.5, [late], None)
        await refuses(store.score("another", [], {"a": 1.0}), StoreError, "a", "group-1")


async def check_a_late_reward_with_another_value_is_refused(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        await running(store, "a")
        await store.add_records([a_reward("a", 1.0, name="format")])
        await store.finish([Outcome(rollout_id="a", attempt=1, state=RolloutState.SUCCEEDED)])
        again = a_reward("a", 0.0, name="format")
        await refuses(store.score("group-1", [again], {"a": 1.0}), RewardError, "format")
        assert not await store.is_scored("group-1")
        assert (await store.rollouts())[0].reward is None


async def check_a_late_outcome_changes_no_state_and_is_kept(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        await store.add_rollouts([a_rollout()])
        await start(store, "rollout-1", lease_seconds=0.0)
        await store.reclaim()
        late = Outcome(rollout_id="rollout-1", attempt=1, state=RolloutState.SUCCEEDED, reward=1.0)
        await store.finish([late])
        assert await state_of(store) is RolloutState.QUEUED
        await start(store, "rollout-1")
        await store.finish([late])
        [rollout] = await store.rollouts()
        assert (rollout.state, rollout.reward, rollout.attempt) == (RolloutState.RUNNING, None, 2)
        assert len(await store.late_records("rollout-1")) == 1
