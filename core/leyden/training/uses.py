"""What the updates of one step use: how stale its own samples are, and which groups of earlier steps come again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from leyden.interfaces import Group, Transition
from leyden.roles import Policy
from leyden.training.versions import Versions


class Uses:
    """Kept for the step under way, and begun anew with each."""

    def __init__(self, versions: Versions) -> None:
        self._versions = versions
        self._replayed: dict[str, list[str]] = {}
        """Group id -> its rollouts that have a reward."""
        self._again: dict[str, set[str]] = defaultdict(set)
        """Policy -> the replayed groups whose transitions it asked for."""
        self._ages: dict[tuple[str, str], list[int]] = {}
        """(policy, group) -> the staleness of each transition, replayed groups apart."""

    def clear(self) -> None:
        """Begin a step."""
        self._replayed.clear()
        self._again.clear()
        self._ages.clear()

    def replay(self, groups: Sequence[Group]) -> None:
        """Note groups of earlier steps."""
        self._replayed |= {group.group_id: with_reward([group]) for group in groups}

    def transitions(self, policy: str, group_id: str, transitions: Sequence[Transition]) -> None:
        """Note that a policy asked for a group's transitions."""
        if group_id in self._replayed:
            self._again[policy].add(group_id)
        else:
            self._ages[policy, group_id] = [self._versions.staleness(policy, one.version) for one in transitions]

    def fresh_ids(self, groups: Sequence[Group]) -> list[str]:
        """Return the rollouts with a reward, without those of replayed groups."""
        return with_reward([group for group in groups if group.group_id not in self._replayed])

    def replayed_ids(self, policy: str) -> list[str]:
        """Return the rollouts that came again for `policy`."""
        return [one for group_id in sorted(self._again[policy]) for one in self._replayed[group_id]]

    def metrics(self, policies: Sequence[Policy]) -> dict[str, float]:
        """Return `policy/staleness_mean` and `policy/staleness_max` of the step's own samples."""
        trained = [policy.name for policy in policies if policy.trainable]
        found: dict[str, float] = {}
        for name in trained:
            ages = [age for (policy, _), some in self._ages.items() if policy == name for age in some]
            prefix = f"{name}/" if len(trained) > 1 else ""
            if ages:
                found[f"{prefix}policy/staleness_mean"] = fmean(ages)
                found[f"{prefix}policy/staleness_max"] = float(max(ages))
        return found


def with_reward(groups: Sequence[Group]) -> list[str]:
    """Return the ids of the groups' rollouts that have a reward."""
    return [one.rollout.rollout_id for group in groups for one in group.rollouts if one.rollout.reward is not None]
