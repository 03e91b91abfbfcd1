"""The asynchronous sampler: rollouts go on while the learner works, and no sample is trained too late.

One idea: a group may begin only when it is sure to be trained in time, so nothing is sampled to be dropped. At most
tasks_per_step * (max_staleness + 1) groups are begun and not yet trained, and a step leaves a place to every group
that cannot wait. Both together are the invariant of `Places`: there is a place in time for every group.
One trap: on resume no rollout may start before the recorded steps were made again, or it would be sampled with older
weights than its group was begun with. The session draws only when the record is exhausted.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from leyden.interfaces import AttemptResult, Group, Store
from leyden.running.rollouts import RolloutRunner
from leyden.spans import FINISHED, Mode, Rollout
from leyden.training.sampling import (
    Accept,
    Drawn,
    Sampler,
    Speakers,
    TaskOrder,
    grouped,
    names_of,
    planned,
    rollout_ids,
    stored_groups,
)
from leyden.training.versions import Versions

GROUP_NAME = re.compile(r"g(\d+)-")
"""Groups are named by their place in the order of starts: `g137-t301`."""
DISCARDED = "discarded/groups"
"""Under this key the store keeps the ids of groups that are never trained although no step has rejected them."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What bounds the pipeline."""

    tasks_per_step: int
    total_steps: int
    max_staleness: int
    most_rollouts: int
    """Rollouts that can run at a time; a group begins when there is room for one of its rollouts."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """The places for groups in the step under way and in those to come."""

    free: int
    """In the step under way."""
    a_step: int

    def suffice(self, slacks: Sequence[int]) -> bool:
        """Say whether every group has a place in time.

        Args:
            slacks: of each untrained group, how many steps it can wait after the step under way.
        """
        return all(
            sum(slack <= wait for slack in slacks) <= self.free + wait * self.a_step for wait in set(slacks) | {0}
        )


@dataclass(kw_only=True, eq=False)
class Begun:
    """A group that was begun and not yet drawn."""

    number: int
    rollouts: Sequence[Rollout]
    versions: Mapping[str, int]
    """Policy -> the oldest version that can have sampled it."""
    group: Group | None = None
    """Set once all its rollouts have finished."""
    task: asyncio.Task[None] | None = field(default=None, repr=False)


class AsynchronousSampler(Sampler):
    """Keeps as many groups under way as the bound on staleness allows; steps take finished ones, oldest first."""

    def __init__(
        self,
        store: Store,
        runner: RolloutRunner,
        *,
        tasks: Sequence[object],
        seed: int,
        rules: Rules,
        versions: Versions,
        serving: Mapping[str, int],
        is_stopping: Callable[[], bool],
        finished: Callable[[int, int], None],
    ) -> None:
        """Wire it; nothing begins before the first `first` or `draw`.

        Args:
            store: where rollouts of a killed run stand.
            runner: runs them.
            tasks: the run's.
            seed: of their order.
            rules: the bounds.
            versions: those published.
            serving: policy -> the version that samples now; the session changes it.
            is_stopping: true when no further step will come.
            finished: hears after every rollout how many of the step's are ready, and of how many.
        """
        self._store = store
        self._runner = runner
        self._tasks = tasks
        self._order = TaskOrder(len(tasks), seed)
        self._rules = rules
        self._versions = versions
        self._serving = serving
        self._is_stopping = is_stopping
        self._finished = finished
        self._begun: list[Begun] = []
        """By number."""
        self._is_open = False
        """False until the first step draws: the look before training begins one group only."""
        self._free = rules.tasks_per_step
        """Places left in the step under way, or, between two steps, in the next."""
        self._step = 0
        """The step under way, or the last one."""
        self._done = 0
        """The last finished one."""
        self._group_size = 0
        self._next_number = 0
        """0 until the store was looked through."""
        self._rejected_before: dict[str, list[str]] = {}
        """Group id -> rollout ids of those that the step under way had rejected when an earlier run was killed."""
        self._running = 0
        """Rollouts begun and not finished."""
        self._changed = asyncio.Event()
        self._error: BaseException | None = None

    async def first(self, group_size: int) -> Group:
        """Sample the first group, or find it where a killed run has begun it."""
        self._group_size, self._step = group_size, 1
        if (names := await names_of(self._store, 1)) is not None and names.groups:
            return grouped(await self._store.records(next(iter(names.groups.values()))))[0]
        await self._look_through_store(1)
        oldest = self._begun[0] if self._begun else self._begin_next()
        while oldest.group is None:
            await self._change()
        return oldest.group

    async def draw(
        self, step: int, *, group_size: int, accept: Accept | None, most_batches: int, speakers: Speakers
    ) -> Drawn:
        """Take finished groups, oldest first, but none whose place an unfinished older one needs."""
        self._group_size, self._step, self._done = group_size, step, step - 1
        await self._look_through_store(step)
        self._is_open = True
        groups: list[Group] = []
        rejected = await stored_groups(self._store, self._rejected_before)
        self._rejected_before = {}
        places, most = self._rules.tasks_per_step, self._rules.tasks_per_step * most_batches
        self._free = min(places, most - len(rejected))
        self._begin_all()
        while self._free:
            taken = self._take()
            if taken is None:
                await self._change()
                continue
            is_accepted = accept is None or accept(taken)
            (groups if is_accepted else rejected).append(taken)
            self._free = min(places - len(groups), most - len(groups) - len(rejected))
            self._begin_all()
            if not is_accepted:  # at once, or a resume would give it a place again
                await self._store.put_meta(_rejected_key(step), msgspec.json.encode(rollout_ids(rejected)).decode())
        return Drawn(groups=groups, rejected=rejected)

    async def discard(self, step: int, groups: Sequence[Group]) -> None:
        """End the run's sampling; leave these groups out for good, and those under way of which a rollout failed."""
        await self.close()
        failed = {one.group_id for one in await self._store.rollouts(mode=Mode.TRAIN) if one.error_type is not None}
        under_way = {one.rollouts[0].group_id for one in self._begun}
        await self._store.put_meta(_rejected_key(step), "{}")
        await self._discard(sorted({group.group_id for group in groups} | (failed & under_way)))

    def step_finished(self, step: int) -> None:
        """Begin the groups that have a place now."""
        self._done, self._free = step, self._rules.tasks_per_step
        self._begin_all()

    async def close(self) -> None:
        """End what is under way; the runner queues it again, and a resume goes on with it."""
        tasks = [one.task for one in self._begun if one.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- which may begin, which may be taken -------------------------------------------------------------------

    def _begin_all(self) -> None:
        """Begin groups while the bound, the steps to come and the room for rollouts allow it."""
        if self._is_stopping():
            steps = int(self._step > self._done)
        else:
            steps = min(self._rules.max_staleness + 1, self._rules.total_steps - self._done)
        most = self._free + self._rules.tasks_per_step * (steps - 1) if self._is_open else 0
        while len(self._begun) < most and self._running < self._rules.most_rollouts:
            self._begin_next()

    def _take(self) -> Group | None:
        """Take the oldest finished group that leaves every other one a place in time."""
        for one in self._begun:
            others = [other for other in self._begun if other is not one]
            if one.group is not None and self._suffices(self._free - 1, others):
                self._begun = others
                return one.group
        return None

    def _suffices(self, free: int, groups: Sequence[Begun]) -> bool:
        return Places(free=free, a_step=self._rules.tasks_per_step).suffice(self._slacks(groups))

    def _slacks(self, groups: Sequence[Begun]) -> list[int]:
        """Return for each group how many updates more it can wait for."""
        return [
            self._rules.max_staleness - max(self._versions.staleness(*version) for version in one.versions.items())
            for one in groups
        ]

    # ---- running -----------------------------------------------------------------------------------------------

    def _begin_next(self) -> Begun:
        number, self._next_number = self._next_number, self._next_number + 1
        index = self._order.at(number - 1)
        rollouts = planned(
            f"g{number}-t{index}", self._tasks[index], index, step=self._done + 1, group_size=self._group_size
        )
        begun = Begun(number=number, rollouts=rollouts, versions=dict(self._serving))
        self._begun.append(begun)
        self._begin(begun)
        return begun

    def _begin(self, begun: Begun) -> None:
        self._running += sum(rollout.state not in FINISHED for rollout in begun.rollouts)
        begun.task = asyncio.get_running_loop().create_task(self._run(begun))
        begun.task.add_done_callback(self._ended)

    async def _run(self, begun: Begun) -> None:
        await self._runner.run(begun.rollouts, versions=self._serving, finished=self._rollout_finished)
        [begun.group] = grouped(await self._store.records([one.rollout_id for one in begun.rollouts]))

    def _rollout_finished(self, rollout: Rollout, result: AttemptResult) -> None:
        self._running -= 1
        self._begin_all()
        need = self._rules.tasks_per_step
        ready = need - self._free + sum(one.group is not None for one in self._begun)
        self._finished(min(ready, need) * self._group_size, need * self._group_size)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._error = self._error or task.exception()
        self._changed.set()

    async def _change(self) -> None:
        """Wait until a group has finished.

        Raises:
            LeydenError: one could not run, as `RolloutRunner.run` raises.
        """
        await self._changed.wait()
        self._changed.clear()
        if self._error is not None:
            raise self._error

    # ---- resuming ----------------------------------------------------------------------------------------------

    async def _look_through_store(self, step: int) -> None:
        """Go on with the groups that a killed run began and that no step before `step` took."""
        if self._next_number:
            return
        gone = set(msgspec.json.decode(await self._store.get_meta(DISCARDED) or "[]", type=list[str]))
        for earlier in range(1, step):
            if (names := await names_of(self._store, earlier)) is not None:
                gone |= {*names.groups, *names.rejected}
        stored = await self._store.get_meta(_rejected_key(step)) or "{}"
        self._rejected_before = msgspec.json.decode(stored, type=dict[str, list[str]])
        gone |= set(self._rejected_before)
        found: dict[int, list[Rollout]] = {}
        for rollout in await self._store.rollouts(mode=Mode.TRAIN):
            if (match := GROUP_NAME.match(rollout.group_id)) is not None:
                found.setdefault(int(match[1]), []).append(rollout)
        self._next_number = max(found, default=0) + 1
        left: list[str] = []
        for number, rollouts in sorted(found.items()):
            if rollouts[0].group_id in gone:
                continue
            begun = Begun(number=number, rollouts=rollouts, versions=self._oldest(rollouts))
            if self._suffices(self._free, [*self._begun, begun]):
                self._begun.append(begun)
            else:  # begun under a looser bound than this one
                left.append(rollouts[0].group_id)
        await self._discard(left)
        for begun in self._begun:
            self._begin(begun)

    def _oldest(self, rollouts: Sequence[Rollout]) -> dict[str, int]:
        """Return for each policy the stalest version that its finished rollouts can hold."""
        known = [self._serving, *(rollout.versions for rollout in rollouts if rollout.state in FINISHED)]
        return {
            policy: max(
                (versions[policy] for versions in known if policy in versions),
                key=lambda version: self._versions.staleness(policy, version),
            )
            for policy in self._serving
        }

    async def _discard(self, group_ids: Sequence[str]) -> None:
        if group_ids:
            before = msgspec.json.decode(await self._store.get_meta(DISCARDED) or "[]", type=list[str])
            await self._store.put_meta(DISCARDED, msgspec.json.encode([*before, *group_ids]).decode())


def _rejected_key(step: int) -> str:
    return f"rejected/{step}"
