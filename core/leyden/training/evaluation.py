"""Held-out evaluation: what it found, with intervals.

Intervals are bootstrap percentile intervals over tasks (Efron & Tibshirani 1993, section 13.3): tasks are the
independent unit, not tokens or calls. Before and after are compared task by task (paired).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from leyden.interfaces import RolloutRecords
from leyden.spans import Reward

BOOTSTRAP_SAMPLES = 2000
TOTAL = "reward"
"""The name under which the weighted total is reported."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over tasks with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int
    """Tasks."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One pass over the held-out tasks."""

    step: int
    """The training step after which it was made; 0 is before training."""
    values: Mapping[str, Mapping[str, float]]
    """Reward name -> task id -> value; `reward` is the weighted total. A failed rollout counts its failure reward, or
    0 without one; one that returned `NO_REWARD` is left out."""
    failures: int
    """Rollouts that raised, timed out, were lost or had no reward."""

    def estimate(self, name: str = TOTAL) -> Estimate:
        """Return the mean of one reward over tasks."""
        return bootstrap(list(self.values.get(name, {}).values()))

    def estimates(self) -> dict[str, Estimate]:
        """Return every reward's mean."""
        return {name: self.estimate(name) for name in self.values}

    def gain_over(self, before: Evaluation, name: str = TOTAL) -> Estimate:
        """Return the mean difference to `before` over the tasks in both."""
        old, new = before.values.get(name, {}), self.values.get(name, {})
        return bootstrap([new[task] - old[task] for task in new if task in old])


def bootstrap(values: Sequence[float], *, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0) -> Estimate:
    """Return the mean with its bootstrap percentile interval; NaN for no values."""
    n = len(values)
    if n == 0:
        return Estimate(mean=float("nan"), low=float("nan"), high=float("nan"), n=0)
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(values, k=n)) / n for _ in range(samples))
    return Estimate(
        mean=sum(values) / n,
        low=means[int(0.025 * samples)],
        high=means[min(samples - 1, int(0.975 * samples))],
        n=n,
    )


def evaluation_of(step: int, records: Sequence[RolloutRecords]) -> Evaluation:
    """Gather the values of finished evaluation rollouts."""
    names = {TOTAL} | {reward.name for one in records for reward in one.rewards if _is_global(reward)}
    values: dict[str, dict[str, float]] = {name: {} for name in names}
    for one in records:
        if one.rollout.reward is None and one.rollout.error_type is None:
            continue
        task_id = one.rollout.task_id
        found: dict[str, float] = {}
        for reward in one.rewards:
            if _is_global(reward):
                found[reward.name] = found.get(reward.name, 0.0) + reward.value
        found[TOTAL] = one.rollout.reward or 0.0
        for name in names:
            values[name][task_id] = found.get(name, 0.0)
    return Evaluation(step=step, values=values, failures=sum(one.rollout.error_type is not None for one in records))


def _is_global(reward: Reward) -> bool:
    return reward.target_role is None and reward.target_span is None
