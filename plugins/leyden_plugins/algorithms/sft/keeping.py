"""Which rollouts, or which roles' calls in them, are worth imitating."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal

from leyden.errors import ConfigurationError
from leyden.interfaces import Group, Transition
from leyden.roles import matches
from leyden.spans import RolloutState

Threshold = Literal["best"] | float | None
"""A reward to reach; the highest of the group; or `None`: every rollout that did not fail."""
Keep = Threshold | Mapping[str, Threshold]
"""One of the rollout's total, or role pattern -> one of the role's own return."""


def check_keep(keep: Keep, *, group_size: int | None) -> None:
    """Refuse what is no threshold.

    Args:
        keep: to be checked.
        group_size: rollouts a task; `None`: nobody knows yet.

    Raises:
        ConfigurationError: names the value.
    """
    every = list(keep.values()) if isinstance(keep, Mapping) else [keep]
    for one in every:
        is_number = isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one)
        if one is not None and one != "best" and not is_number:
            raise ConfigurationError(f"keep={keep!r} must be 'best', a finite number or None, or these by role")
    if "best" in every and group_size is not None and group_size < 2:
        raise ConfigurationError(
            f"keep={keep!r} compares the rollouts of a group, but group_size={group_size!r}; use at least 2"
        )
    if not every:
        raise ConfigurationError("keep={} names no role, so nothing would be imitated; name a role, or leave it out")


def kept_rollouts(groups: Sequence[Group], keep: Threshold) -> set[str]:
    """Return the ids of the rollouts to imitate.

    A number keeps every reward that reaches it. `best` keeps those that reach their group's highest reward; a
    group of equal rewards has no best. `None` keeps every rollout that succeeded, with a reward or without.
    """
    if keep is None:
        rollouts = [one.rollout for group in groups for one in group.rollouts]
        return {one.rollout_id for one in rollouts if one.state is RolloutState.SUCCEEDED}
    kept: set[str] = set()
    for group in groups:
        rewards = [one.rollout for one in group.rollouts if one.rollout.reward is not None]
        kept |= _reaching({one.rollout_id: one.reward or 0.0 for one in rewards}, keep)
    return kept


def kept_calls(transitions: Sequence[Transition], groups: Sequence[Group], keep: Keep) -> list[Transition]:
    """Return the calls to imitate, in order.

    By role, `keep` is held against the role's own return in a rollout: the mean of what credit assignment gave its
    calls there. The first pattern that matches a role counts; a role that none matches is not imitated.
    """
    if not isinstance(keep, Mapping):
        kept = kept_rollouts(groups, keep)
        return [one for one in transitions if one.rollout_id in kept]
    rewarded = {one.rollout.rollout_id for group in groups for one in group.rollouts if one.rollout.reward is not None}
    values: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in transitions:
        if one.rollout_id in rewarded:
            values[one.role, one.group_id][one.rollout_id].append(one.value)
    succeeded = kept_rollouts(groups, None)
    kept_of: dict[str, set[str]] = defaultdict(set)
    """Role -> rollouts."""
    for role in {one.role for one in transitions}:
        pattern = next((pattern for pattern in keep if matches([pattern], role)), None)
        threshold = keep[pattern] if pattern is not None else None
        if pattern is not None and threshold is None:
            kept_of[role] = succeeded
        elif pattern is not None:
            for (speaker, _), by_rollout in values.items():
                if speaker == role:
                    returns = {rollout_id: fmean(found) for rollout_id, found in by_rollout.items()}
                    kept_of[role] |= _reaching(returns, threshold)
    return [one for one in transitions if one.rollout_id in kept_of[one.role]]


def _reaching(returns: Mapping[str, float], threshold: Threshold) -> set[str]:
    """Return the rollouts of one group that reach a number, or the highest of returns that differ."""
    if not returns or (threshold == "best" and min(returns.values()) == max(returns.values())):
        return set()
    least = max(returns.values()) if threshold == "best" else threshold
    assert isinstance(least, int | float)
    return {rollout_id for rollout_id, value in returns.items() if value >= least}
