"""What a step's groups are drawn from, and the record of which it drew; the synchronous sampler.

One idea: rollout ids are names. A resumed run asks for the same names, finds the finished ones in the store, and runs
only what is missing.
One trap: which groups a step used must stand in the store before its updates count, or a resume could not tell them
from groups that are still to be trained.
"""

from __future__ import annotations

import functools
import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from leyden.interfaces import Group, RolloutRecords, Store
from leyden.spans import Mode, Rollout

Accept = Callable[[Group], bool]
Speakers = Mapping[str, str | None]
"""Policy -> the policy that speaks for its roles; `None`: the app's own model."""
Run = Callable[[Sequence[Rollout], Speakers], Awaitable[Sequence[RolloutRecords]]]
"""Runs rollouts to their end and returns their records in the order given."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The groups that a step took."""

    groups: Sequence[Group]
    """To be trained."""
    rejected: Sequence[Group] = ()
    """Sampled for this step and not accepted: never trained."""


class Names(msgspec.Struct, frozen=True):
    """What the store keeps of `Drawn`: group id -> its rollouts' ids, in sample order."""

    groups: dict[str, list[str]]
    rejected: dict[str, list[str]]


async def names_of(store: Store, step: int) -> Names | None:
    """Return which groups `step` took; `None` when it has not yet."""
    text = await store.get_meta(_key(step))
    return None if text is None else msgspec.json.decode(text, type=Names)


async def write_names(store: Store, step: int, drawn: Drawn) -> None:
    """Record which groups `step` takes."""
    names = Names(rollout_ids(drawn.groups), rollout_ids(drawn.rejected))
    await store.put_meta(_key(step), msgspec.json.encode(names).decode())


async def drawn_before(store: Store, step: int) -> Drawn | None:
    """Return the groups that `step` took in an earlier, killed run; `None` when it took none."""
    names = await names_of(store, step)
    if names is None:
        return None
    return Drawn(groups=await stored_groups(store, names.groups), rejected=await stored_groups(store, names.rejected))


async def stored_groups(store: Store, names: Mapping[str, Sequence[str]]) -> list[Group]:
    """Read finished groups, given as group id -> rollout ids."""
    return grouped(await store.records([rollout_id for ids in names.values() for rollout_id in ids]))


def grouped(records: Sequence[RolloutRecords]) -> list[Group]:
    """Return the groups of these rollouts, in the order of their first ones."""
    groups: dict[str, list[RolloutRecords]] = {}
    for one in records:
        groups.setdefault(one.rollout.group_id, []).append(one)
    return [Group(group_id=key, task=some[0].rollout.task, rollouts=some) for key, some in groups.items()]


def rollout_ids(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Return group id -> its rollouts' ids, in sample order."""
    return {group.group_id: [one.rollout.rollout_id for one in group.rollouts] for group in groups}


def _key(step: int) -> str:
    return f"groups/{step}"


@dataclass(frozen=True)
class TaskOrder:
    """An endless seeded order of tasks: each pass over them is a shuffle of its own, so a position is the cursor."""

    tasks: int
    seed: int

    def at(self, position: int) -> int:
        """Return the index of the task at `position`, from 0."""
        epoch, offset = divmod(position, self.tasks)
        return _shuffled(self.tasks, f"{self.seed}/{epoch}")[offset]

    def of_step(self, step: int, tasks_per_step: int) -> list[int]:
        """Return a step's tasks, each once: where two passes meet, one may come up twice."""
        first = (step - 1) * tasks_per_step
        return list(dict.fromkeys(self.at(position) for position in range(first, first + tasks_per_step)))

    def more(self, step: int, used: Sequence[int]) -> list[int]:
        """Return the other tasks in an order drawn for `step`, to be sampled in place of rejected ones."""
        taken = set(used)
        return [index for index in _shuffled(self.tasks, f"{self.seed}/more/{step}") if index not in taken]


@functools.lru_cache(maxsize=4)
def _shuffled(count: int, seed: str) -> Sequence[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def planned(group_id: str, task: object, index: int, *, step: int, group_size: int) -> list[Rollout]:
    """Return the rollouts of a new group, named after it."""
    return [
        Rollout(
            rollout_id=f"{group_id}-{sample}",
            task=task,
            task_id=f"t{index}",
            group_id=group_id,
            mode=Mode.TRAIN,
            step=step,
        )
        for sample in range(group_size)
    ]


class Sampler(ABC):
    """Draws the groups of steps that have none in the store."""

    @abstractmethod
    async def first(self, group_size: int) -> Group:
        """Return one group that the next step will draw, sampled before any training."""

    @abstractmethod
    async def draw(
        self, step: int, *, group_size: int, accept: Accept | None, most_batches: int, speakers: Speakers
    ) -> Drawn:
        """Sample the groups of `step`."""

    @abstractmethod
    async def discard(self, step: int, groups: Sequence[Group]) -> None:
        """Leave these groups, sampled for `step`, out for good: the run ends, and a resume samples others.

        They stay in the store.
        """

    def step_finished(self, step: int) -> None:
        """Hear that the step's new versions are served."""
        return

    async def close(self) -> None:
        """End what is under way; a resume goes on with it."""
        return


class SynchronousSampler(Sampler):
    """Samples a step's groups when it begins: every token comes from the weights that it trains."""

    def __init__(
        self,
        store: Store,
        *,
        tasks: Sequence[object],
        tasks_per_step: int,
        seed: int,
        run: Run,
    ) -> None:
        self._store = store
        self._tasks = tasks
        self._order = TaskOrder(len(tasks), seed)
        self._tasks_per_step = tasks_per_step
        self._run = run

    async def first(self, group_size: int) -> Group:
        """Sample the first group of step 1."""
        [group] = await self._sample(1, self._order.of_step(1, self._tasks_per_step)[:1], group_size, {})
        return group

    async def draw(
        self, step: int, *, group_size: int, accept: Accept | None, most_batches: int, speakers: Speakers
    ) -> Drawn:
        """Sample the step's tasks, then others in place of rejected ones until there are enough or too many."""
        wanted = self._order.of_step(step, self._tasks_per_step)
        others = self._order.more(step, wanted)
        need, left = len(wanted), self._tasks_per_step * most_batches
        groups: list[Group] = []
        rejected: list[Group] = []
        while wanted:
            left -= len(wanted)
            for group in await self._sample(step, wanted, group_size, speakers):
                (groups if accept is None or accept(group) else rejected).append(group)
            count = min(need - len(groups), left)
            wanted, others = others[:count], others[count:]
        return Drawn(groups=groups, rejected=rejected)

    async def discard(self, step: int, groups: Sequence[Group]) -> None:
        """Sample the whole step anew, under other names."""
        times = await self._discarded(step)
        await self._store.put_meta(_discarded_key(step), str(times + 1))

    async def _sample(self, step: int, indices: Sequence[int], group_size: int, speakers: Speakers) -> list[Group]:
        times = await self._discarded(step)
        prefix = f"s{step}.{times}" if times else f"s{step}"
        prefix += ".taught" if speakers else ""  # the look before training has sampled some of these without
        rollouts = [
            rollout
            for index in indices
            for rollout in planned(f"{prefix}-t{index}", self._tasks[index], index, step=step, group_size=group_size)
        ]
        return grouped(await self._run(rollouts, speakers))

    async def _discarded(self, step: int) -> int:
        return int(await self._store.get_meta(_discarded_key(step)) or 0)


def _discarded_key(step: int) -> str:
    return f"discarded/{step}"
