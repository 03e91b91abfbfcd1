"""Rewards that come late: one function judges the finished rollouts of a group together.

One idea: a group's rollouts wait, succeeded and without a reward, until what the function gave and the totals are
written at once; so a run that was killed judges again exactly the groups that were not scored.
One trap: a function that fails is infrastructure, not the agents' fault: its group then has no rewards, which is not 0.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from leyden.errors import LeydenError, RewardError, RolloutError
from leyden.interfaces import GroupReward, RolloutRecords, Store
from leyden.rewards import NO_REWARD, named, total
from leyden.running.agents import call
from leyden.spans import Kind, Reward, RolloutState
from leyden.wire.state import below_the_wire

log = logging.getLogger(__name__)

TRIES = 3
"""Of the function, for each group."""

UNSCORED_IN_A_ROW = 4
"""After so many groups that could not be judged, one after the other, the run stops: it would learn nothing."""


def later(task: object, output: object, rollout: object) -> object:
    """Leave the reward to the group's function: what the agent returned is its output."""
    return output if output is NO_REWARD else None


class GroupRewards:
    """Judges groups and writes what came of it."""

    def __init__(
        self, function: GroupReward, *, store: Store, weights: Mapping[str, float], pause_seconds: float = 1.0
    ) -> None:
        """Wire it; `pause_seconds` is waited before the second try, and twice as long before each further one."""
        self.unscored: set[str] = set()
        """Groups that have no rewards because the function failed."""
        self._function = function
        self._store = store
        self._weights = weights
        self._pause_seconds = pause_seconds
        self._in_a_row = 0
        self._last_failure = ""

    async def score(self, rollout_ids: Iterable[str]) -> None:
        """Judge the groups of these finished rollouts that were not scored before.

        Raises:
            RewardError: the function returned what is no list of rewards, one a rollout.
            RolloutError: it failed for several groups in a row.
            LeydenError: what the function raised of these itself.
        """
        groups: dict[str, list[RolloutRecords]] = defaultdict(list)
        for one in await self._store.records(list(rollout_ids)):
            groups[one.rollout.group_id].append(one)
        tasks = [asyncio.ensure_future(self._score(*group)) for group in groups.items()]
        try:
            is_scored = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        # Groups are judged together and those that fail end last: a success among them counts for all.
        self._in_a_row = 0 if any(is_scored) else self._in_a_row + is_scored.count(False)
        if self._in_a_row >= UNSCORED_IN_A_ROW:
            raise RolloutError(
                f"{self._last_failure}. It has failed for {self._in_a_row} groups in a row; mend it and resume the "
                "run: groups that were not scored are judged then"
            )

    async def _score(self, group_id: str, group: Sequence[RolloutRecords]) -> bool:
        """Judge a group; say whether it is scored, now or before, or nothing of it waits."""
        waiting = [one for one in group if is_waiting(one)]
        if not waiting or await self._store.is_scored(group_id):
            return True
        given = await self._ask(group_id, waiting)
        if given is None:
            return False
        rewards = {one.rollout.rollout_id: _rewards(one, value) for one, value in zip(waiting, given, strict=True)}
        totals = {
            one.rollout.rollout_id: total([*one.rewards, *own], self._weights)
            for one in waiting
            if (own := rewards[one.rollout.rollout_id])
        }
        if totals and all(value is None for value in totals.values()):
            raise RewardError(
                f"the rewards of group {group_id!r}, {sorted({one.name for own in rewards.values() for one in own})!r} "
                f"with what its agents emitted, lack one of those with a weight: {dict(self._weights)!r}; set "
                "Trainer(reward_weights=...)"
            )
        await self._store.score(
            group_id,
            [one for own in rewards.values() for one in own],
            {one.rollout.rollout_id: totals.get(one.rollout.rollout_id) for one in waiting},
        )
        return True

    async def _ask(self, group_id: str, waiting: Sequence[RolloutRecords]) -> Sequence[object] | None:
        """Return one reward a rollout; `None` when the function fails again and again."""
        pause = self._pause_seconds
        for attempt in range(1, TRIES + 1):
            try:
                with below_the_wire():  # what the function asks of a model is no call of any rollout
                    given = await call(self._function, waiting[0].rollout.task, waiting)
            except LeydenError:
                raise
            except Exception as error:
                if attempt == TRIES:
                    self._note_failure(group_id, error)
                    return None
                await asyncio.sleep(pause)
                pause *= 2
            else:
                self.unscored.discard(group_id)
                return _checked(given, group_id, len(waiting))
        return None

    def _note_failure(self, group_id: str, error: Exception) -> None:
        """Count a group without rewards, and say so."""
        self.unscored.add(group_id)
        self._last_failure = (
            f"the group reward function failed {TRIES} times for group {group_id!r}: {type(error).__name__}: {error}"
        )
        log.warning("%s. The group has no rewards and is not trained", self._last_failure)


def is_waiting(records: RolloutRecords) -> bool:
    """Say whether a rollout waits for its group's rewards; one whose agent returned NO_REWARD does not."""
    rollout = records.rollout
    is_dropped = any(span.kind is Kind.ROLLOUT and "leyden.no_reward" in span.attributes for span in records.spans)
    return rollout.state is RolloutState.SUCCEEDED and rollout.reward is None and not is_dropped


def _checked(given: object, group_id: str, count: int) -> Sequence[object]:
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence) or len(given) != count:
        raise RewardError(
            f"group {group_id!r}: the group reward function returned {given!r:.200} for {count} rollouts; return "
            "a list with one float, dict of floats or None each, in order"
        )
    return given


def _rewards(records: RolloutRecords, value: object) -> list[Reward]:
    """Return what the function gave one rollout as records."""
    rollout = records.rollout
    known = {one.name for one in records.rewards if one.target_role is None and one.target_span is None}
    found = named(value, where=f"rollout {rollout.rollout_id!r}, group reward") or {}
    if both := sorted(known & found.keys()):
        raise RewardError(
            f"rollout {rollout.rollout_id!r} got the rewards {both!r} from its agent and from the group reward "
            "function; give them different names and weigh both with Trainer(reward_weights=...)"
        )
    return [
        Reward(rollout_id=rollout.rollout_id, attempt=rollout.attempt, name=name, value=one)
        for name, one in found.items()
    ]
