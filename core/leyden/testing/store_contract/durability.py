"""Duties of a store that outlives its process."""

from __future__ import annotations

from leyden.errors import RewardError, StoreError
from leyden.spans import RolloutState
from leyden.testing.records import a_completion, a_reward, a_span, an_update
from leyden.testing.store_contract.harness import MakeStore, a_checkpoint, opened, refuses, running, unnumbered


async def check_everything_is_there_after_reopening(make_store: MakeStore) -> None:
    turns = [a_completion(prompt=range(10)), a_completion(prompt=[*range(10), 4, 5, 6])]
    async with opened(make_store) as store:
        await running(store)
        await store.add_records([a_span(span_id="kept"), turns[0], a_reward()])
        await store.add_updates([an_update()])
        await store.commit_checkpoint(a_checkpoint("x", step=1))
        await store.put_meta("seed", "7")
        assert await store.next_version("policy") == 1
    async with opened(make_store) as store:
        await store.add_records([turns[1], a_span(span_id="kept")])
        await refuses(store.add_records([a_reward(value=0.5)]), RewardError, "rollout-1")
        [records] = await store.records(["rollout-1"])
        assert records.rollout.state is RolloutState.RUNNING
        assert [s.span_id for s in records.spans] == ["kept"]
        assert [unnumbered(r) for r in records.completions] == turns
        assert records.completions[1].sequence > records.completions[0].sequence > records.spans[0].sequence
        assert await store.latest_checkpoint() == a_checkpoint("x", step=1)
        assert await store.get_meta("seed") == "7"
        assert await store.next_version("policy") == 2, "a version issued before must not be issued again"
        await refuses(store.add_updates([an_update()]), StoreError, "twice")
