"""Duties of a store towards what training writes."""

from __future__ import annotations

import asyncio

from leyden.errors import StoreError
from leyden.spans import Resource
from leyden.testing.records import a_span, an_update
from leyden.testing.store_contract.harness import MakeStore, a_checkpoint, opened, refuses


async def check_a_version_of_a_resource_is_never_reused(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        weights = Resource(kind="policy", name="p", version=1, created_ns=1, location="checkpoints/1")
        prompt = Resource(kind="prompt", name="p", version=1, created_ns=1, content="Answer.")
        await store.put_resources([weights, prompt])
        await store.put_resources([weights])
        other = Resource(kind="policy", name="p", version=1, created_ns=2, location="checkpoints/2")
        await refuses(store.put_resources([other]), StoreError, "p", "1")
        assert await store.resources() == [weights, prompt]
        assert await store.resources("prompt", "p") == [prompt]
        assert await store.resources(name="q") == []


async def check_no_rollout_counts_twice_for_a_policy(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        first = an_update(["a", "b"])
        await store.add_updates([first, an_update(["a"], policy="other")])
        await store.add_updates([first])
        await refuses(store.add_updates([an_update(["c", "b"])]), StoreError, "twice", "b")
        await refuses(store.add_updates([an_update(["d", "d"])]), StoreError, "twice", "d")
        await store.add_updates([an_update(["c", "d"])])  # neither refusal has left a trace
        assert [u.rollout_ids for u in await store.updates()] == [["a", "b"], ["a"], ["c", "d"]]


async def check_voided_updates_free_their_rollouts(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        kept, undone = an_update(["a"], step=1), an_update(["b"], step=2, version=2)
        await store.add_updates([kept, undone])
        assert [u.update_id for u in await store.void_updates_after(1)] == [undone.update_id]
        assert await store.void_updates_after(1) == []
        assert await store.updates() == [kept]
        assert [u.voided for u in await store.updates(include_voided=True)] == [False, True]
        await store.add_updates([an_update(["b"], step=2, version=3)])
        await refuses(store.add_updates([an_update(["a"], step=2)]), StoreError, "twice")


async def check_the_latest_checkpoint_is_the_one_committed_last(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        assert await store.latest_checkpoint() is None
        later = a_checkpoint("x", step=5)
        await store.commit_checkpoint(later)
        earlier = a_checkpoint("y", step=3)
        await store.commit_checkpoint(earlier)
        await store.commit_checkpoint(earlier)
        assert await store.latest_checkpoint() == earlier
        await refuses(store.commit_checkpoint(a_checkpoint("y", step=4)), StoreError, "y")


async def check_versions_count_up_for_each_policy(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        issued = await asyncio.gather(*(store.next_version("p") for _ in range(5)))
        assert sorted(issued) == [1, 2, 3, 4, 5]
        assert await store.next_version("q") == 1


async def check_settings_are_kept(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        assert await store.get_meta("seed") is None
        await store.put_meta("seed", "1")
        await store.put_meta("seed", "2")
        assert await store.get_meta("seed") == "2"


async def check_closing_twice_is_harmless_and_a_closed_store_refuses(make_store: MakeStore) -> None:
    store = await make_store()
    await store.close()
    await store.close()
    await refuses(store.add_records([a_span()]), StoreError, "closed")
    await refuses(store.rollouts(), StoreError, "closed")
