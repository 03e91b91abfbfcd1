"""Rollouts of other runs, read as groups to learn from."""

import asyncio
from pathlib import Path

import pytest

from leyden.errors import ConfigurationError, StoreError
from leyden.interfaces import Group, Outcome
from leyden.ownership import current_owner
from leyden.spans import Mode, Reward, RolloutState
from leyden.sqlite import SQLiteStore
from leyden.testing.records import a_reward, a_rollout, a_span
from leyden.training.stored import groups_of


async def fill(store: SQLiteStore, name: str, group: str, mode: Mode, rewards: list[Reward] | None = None) -> None:
    """Add a finished rollout with a span; without a total."""
    await store.add_rollouts([a_rollout(name, group_id=group, mode=mode)])
    await store.start([name], owner=current_owner(), lease_seconds=60, versions={})
    await store.add_records([a_span(name), *(rewards or ())])
    await store.finish([Outcome(rollout_id=name, attempt=1, state=RolloutState.SUCCEEDED)])


def read(source: Path, **weights: float) -> list[Group]:
    return asyncio.run(groups_of(source, reward_weights=weights or {"reward": 1.0}))


def test_finished_rollouts_come_by_group_and_held_out_ones_stay_out(tmp_path: Path) -> None:
    async def write() -> None:
        async with await SQLiteStore.open(tmp_path / "store.db") as store:
            await fill(store, "a0", "a", Mode.TRAIN)
            await fill(store, "b0", "b", Mode.RECORDED)
            await fill(store, "a1", "a", Mode.TRAIN)
            await fill(store, "e0", "e", Mode.EVALUATE)
            await store.add_rollouts([a_rollout("c0", group_id="c")])  # queued

    asyncio.run(write())
    groups = read(tmp_path)
    assert [(one.group_id, [each.rollout.rollout_id for each in one.rollouts]) for one in groups] == [
        ("a", ["a0", "a1"]),
        ("b", ["b0"]),
    ]
    assert [len(each.spans) for one in groups for each in one.rollouts] == [1, 1, 1]


def test_a_total_comes_from_rewards_where_the_run_has_given_none(tmp_path: Path) -> None:
    async def write() -> None:
        async with await SQLiteStore.open(tmp_path / "store.db") as store:
            await fill(store, "a", "a", Mode.RECORDED, [a_reward("a", 0.5, name="right"), a_reward("a", name="short")])
            await fill(store, "b", "b", Mode.RECORDED)

    asyncio.run(write())
    found = [one.rollouts[0].rollout.reward for one in read(tmp_path / "store.db", right=2.0, short=0.25)]
    assert found == [1.25, None]


def test_stores_of_a_folder_are_read_together_while_one_is_written(tmp_path: Path) -> None:
    async def write_and_read() -> list[Group]:
        async with (
            await SQLiteStore.open(tmp_path / "1.db") as first,
            await SQLiteStore.open(tmp_path / "2.db") as second,
        ):
            await fill(first, "a", "a", Mode.RECORDED)
            await fill(second, "b", "a", Mode.RECORDED)
            return await groups_of(tmp_path, reward_weights={"reward": 1.0})

    [group] = asyncio.run(write_and_read())
    assert [one.rollout.rollout_id for one in group.rollouts] == ["a", "b"]


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="neither a store nor a folder that holds one"):
        read(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="neither a store nor a folder that holds one"):
        read(tmp_path)
    (tmp_path / "text.db").write_text("this is no database, and long enough to look at\n" * 40)
    with pytest.raises(StoreError, match=r"text\.db"):
        read(tmp_path)


def test_a_rollout_that_two_stores_hold_counts_once(tmp_path: Path) -> None:
    async def write() -> None:
        for name in ("1.db", "2.db"):
            async with await SQLiteStore.open(tmp_path / name) as store:
                await fill(store, "a", "a", Mode.RECORDED)

    asyncio.run(write())
    assert [len(group.rollouts) for group in read(tmp_path)] == [1]
