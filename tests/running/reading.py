"""What a run's store says, read without the trainer."""

import asyncio
from collections import Counter, defaultdict
from pathlib import Path

import msgspec

from leyden.interfaces import RolloutRecords
from leyden.spans import Mode, Rollout, Update
from leyden.sqlite import SQLiteStore


class Ledger(msgspec.Struct):
    """All of it, and which groups each step took."""

    rollouts: list[Rollout]
    updates: list[Update]
    """Voided ones included."""
    taken: dict[int, list[str]]
    """Step -> the groups it trained."""
    rejected: dict[int, list[str]]
    records: dict[str, RolloutRecords]

    @property
    def standing(self) -> list[Update]:
        return [update for update in self.updates if not update.voided]

    def groups(self) -> Counter[str]:
        """Return how many training rollouts each group has."""
        return Counter(rollout.group_id for rollout in self.rollouts if rollout.mode is Mode.TRAIN)

    def ages(self) -> dict[int, list[int]]:
        """Return, by step, how many updates of its policy lie between each trained call and its training."""
        born = {(update.policy, update.version): update.step for update in self.updates}
        found: dict[int, list[int]] = defaultdict(list)
        for update in self.standing:
            before = [one.step for one in self.standing if one.policy == update.policy and one.step < update.step]
            for rollout_id in update.rollout_ids:
                for completion in self.records[rollout_id].completions:
                    if completion.policy == update.policy:
                        sampled_after = born.get((update.policy, completion.version), 0)
                        found[update.step].append(sum(step > sampled_after for step in before))
        return found

    def oldest(self) -> int:
        """Return the largest of them."""
        return max(age for ages in self.ages().values() for age in ages)


def ledger(run: Path) -> Ledger:
    """Read a run that is not under way."""

    async def read() -> Ledger:
        async with await SQLiteStore.open(run / "store.db", read_only=True) as store:
            rollouts = list(await store.rollouts())
            records = await store.records([rollout.rollout_id for rollout in rollouts])
            names = {}
            for step in range(1, 100):
                if (text := await store.get_meta(f"groups/{step}")) is not None:
                    names[step] = msgspec.json.decode(text, type=dict[str, dict[str, list[str]]])
            return Ledger(
                rollouts=rollouts,
                updates=list(await store.updates(include_voided=True)),
                taken={step: list(one["groups"]) for step, one in names.items()},
                rejected={step: list(one["rejected"]) for step, one in names.items()},
                records={one.rollout.rollout_id: one for one in records},
            )

    return asyncio.run(read())
