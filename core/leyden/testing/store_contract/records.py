"""Duties of a store towards spans, completions and rewards, and the stream of them."""

from __future__ import annotations

import asyncio

from leyden.errors import RewardError, StoreError
from leyden.interfaces import Outcome
from leyden.spans import SCHEMA_VERSION, Kind, Record, RolloutState, Status
from leyden.testing.records import a_choice, a_completion, a_reward, a_span
from leyden.testing.store_contract.harness import (
    WAIT_SECONDS,
    MakeStore,
    opened,
    refuses,
    running,
    start,
    state_of,
    unnumbered,
)


async def check_records_survive_a_round_trip(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        await running(store)
        attributes: dict[str, object] = {
            "gen_ai.request.model": "m",
            "acme.unknown": [1, 2.5, None, True, {"nested": ["é", ""]}],
            "large": 2**53 + 1,
        }
        span = a_span(attributes=attributes, status=Status.ERROR, error="boom", kind=Kind.MODEL_CALL)
        choices = [a_choice([9, 8], index=0, text="hi"), a_choice([], index=1, finish_reason="length")]
        completion = a_completion(prompt=[0, 2**31 - 1, 5], choices=choices, span_id=span.span_id)
        reward = a_reward(value=-0.125, target_role="writer", target_span=span.span_id, index=4)
        await store.add_records([span, completion, reward])
        [records] = await store.records(["rollout-1"])
        assert [unnumbered(r) for r in records.spans] == [span]
        assert [unnumbered(r) for r in records.completions] == [completion]
        assert records.rewards == [reward]
        assert 0 < records.spans[0].sequence < records.completions[0].sequence


async def check_a_record_told_twice_is_stored_once(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        await running(store)
        batch: list[Record] = [a_span(), a_completion(), a_completion(http_attempt=1), a_reward()]
        await store.add_records([*batch, *batch])
        await asyncio.gather(*(store.add_records(batch) for _ in range(5)))
        [records] = await store.records(["rollout-1"])
        assert (len(records.spans), len(records.completions), len(records.rewards)) == (1, 2, 1)


async def check_a_reward_given_twice_with_another_value_is_refused(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        await running(store)
        await store.add_records([a_reward(value=1.0), a_reward(value=1.0), a_reward(value=0.5, index=1)])
        span = a_span()
        await refuses(store.add_records([a_reward(value=0.0), span]), RewardError, "rollout-1", "1.0", "0.0")
        both = [a_reward(value=2.0, name="both"), a_reward(value=3.0, name="both")]
        await refuses(store.add_records(both), RewardError, "both")
        [records] = await store.records(["rollout-1"])
        assert [(r.name, r.index, r.value) for r in records.rewards] == [
            ("reward", 0, 1.0),
            ("reward", 1, 0.5),
            ("both", 0, 2.0),
        ]
        assert [s.span_id for s in records.spans] == [span.span_id], "a refused reward must not cost other records"


async def check_a_reward_that_is_no_number_is_refused(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        await running(store)
        for value in (float("nan"), float("inf")):
            await refuses(store.add_records([a_reward(value=value)]), RewardError, "rollout-1")
            bad = Outcome(rollout_id="rollout-1", attempt=1, state=RolloutState.SUCCEEDED, reward=value)
            await refuses(store.finish([bad]), RewardError, "rollout-1")
        assert await state_of(store) is RolloutState.RUNNING


async def check_records_of_an_earlier_attempt_are_late(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        await running(store)
        early = a_span(name="early")
        await store.add_records([early])
        await store.finish([Outcome(rollout_id="rollout-1", attempt=1, state=RolloutState.LOST)])
        await store.requeue(["rollout-1"])
        await start(store, "rollout-1")
        await store.add_records([a_span(name="late"), a_span(attempt=2, name="now"), a_reward(attempt=2)])
        [records] = await store.records(["rollout-1"])
        assert [s.name for s in records.spans] == ["now"]
        assert len(records.rewards) == 1
        late = await store.late_records("rollout-1")
        assert [getattr(r, "name", "") for r in late] == ["early", "late"]


async def check_records_come_in_the_order_asked_and_unknown_ids_are_refused(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        await running(store, "a")
        await running(store, "b")
        assert [r.rollout.rollout_id for r in await store.records(["b", "a"])] == ["b", "a"]
        assert await store.records([]) == []
        await refuses(store.records(["a", "missing"]), StoreError, "missing")
        await refuses(store.late_records("missing"), StoreError, "missing")


async def check_growing_and_branching_prompts_are_exact(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        await running(store)
        completions = []
        prompt = list(range(50))
        for turn in range(12):
            answers = [a_choice([100 + turn] * 5, index=0), a_choice([200 + turn] * 3, index=1)]
            completions.append(a_completion(prompt=prompt, choices=answers))
            prompt = [*prompt, *answers[turn % 2].token_ids, 7]
            if turn == 5:
                prompt = [*prompt[:20], 99, *prompt[21:]]
        completions.append(a_completion(prompt=[]))
        completions.append(a_completion(prompt=prompt[:10], choices=[]))
        for completion in completions:
            await store.add_records([completion])
        [records] = await store.records(["rollout-1"])
        assert [unnumbered(r) for r in records.completions] == completions


async def check_a_record_of_a_newer_schema_is_refused(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        await running(store)
        newer = a_span(schema=SCHEMA_VERSION + 1)
        await refuses(store.add_records([newer]), StoreError, str(SCHEMA_VERSION + 1), "upgrade")
        [records] = await store.records(["rollout-1"])
        assert records.spans == []


async def check_a_stream_yields_old_and_new_records_and_resumes(make_store: MakeStore) -> None:
    async with opened(make_store) as store:
        await running(store)
        await store.add_records([a_span(name="first"), a_reward(name="second")])
        seen = store.stream()
        got = [await asyncio.wait_for(anext(seen), WAIT_SECONDS) for _ in range(2)]
        waiting = asyncio.ensure_future(anext(seen))
        await asyncio.sleep(0.05)
        assert not waiting.done(), "nothing has arrived yet"
        await store.add_records([a_completion(role="third")])
        got.append(await asyncio.wait_for(waiting, WAIT_SECONDS))
        assert [getattr(r, "name", None) or getattr(r, "role", None) for _, r in got] == ["first", "second", "third"]
        sequences = [number for number, _ in got]
        assert sequences == sorted(set(sequences))
        resumed = store.stream(sequences[1])
        number, record = await asyncio.wait_for(anext(resumed), WAIT_SECONDS)
        assert (number, record) == got[2]


async def check_a_stream_ends_when_the_store_closes(make_store: MakeStore) -> None:
    store = await make_store()
    await running(store)
    await store.add_records([a_span()])

    async def read_all() -> int:
        return len([number async for number, _ in store.stream()])

    reading = asyncio.ensure_future(read_all())
    await asyncio.sleep(0.1)
    await store.close()
    assert await asyncio.wait_for(reading, WAIT_SECONDS) == 1
