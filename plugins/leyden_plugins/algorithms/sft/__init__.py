"""Supervised fine-tuning on the policy's own samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from leyden import mdp
from leyden.errors import ConfigurationError
from leyden.interfaces import Group, Loss, Objective, Session
from leyden.metrics import sample_metrics
from leyden.roles import Policy
from leyden.stepwise import Stepwise

__all__ = ["RejectionSampling", "kept_rollouts"]


def kept_rollouts(groups: Sequence[Group], keep: Literal["best"] | float) -> set[str]:
    """Return the ids of the rollouts to imitate.

    A number keeps every reward that reaches it. `best` keeps those that reach their group's highest reward; a
    group of equal rewards has no best.
    """
    kept: set[str] = set()
    for group in groups:
        rewards = {
            one.rollout.rollout_id: one.rollout.reward for one in group.rollouts if one.rollout.reward is not None
        }
        if not rewards or (keep == "best" and min(rewards.values()) == max(rewards.values())):
            continue
        threshold = max(rewards.values()) if keep == "best" else keep
        kept |= {rollout_id for rollout_id, reward in rewards.items() if reward >= threshold}
    return kept


@dataclass(frozen=True)
class RejectionSampling(Stepwise):
    """Rejection-sampling fine-tuning (RFT, Yuan et al. 2023): imitate the rollouts with the highest rewards.

    Raises:
        ConfigurationError: a value outside its range.
    """

    group_size: int = 8
    """Rollouts a task and step."""
    keep: Literal["best"] | float = "best"
    """`best` of each group, or every rollout whose reward reaches this number."""
    normalisation: mdp.Normalisation = "token_mean"
    updates_per_step: int = 1
    """Optimizer steps a training step; each takes whole groups, in seeded order."""
    seed: int = 0
    """Orders the groups over the updates of a step."""

    def __post_init__(self) -> None:
        if self.group_size < 1 or self.updates_per_step < 1:
            raise ConfigurationError(
                f"group_size={self.group_size!r} and updates_per_step={self.updates_per_step!r} must be at least 1"
            )
        is_number = isinstance(self.keep, int | float) and not isinstance(self.keep, bool) and math.isfinite(self.keep)
        if self.keep != "best" and not is_number:
            raise ConfigurationError(f"keep={self.keep!r} must be 'best' or a finite number")
        if self.keep == "best" and self.group_size < 2:
            raise ConfigurationError(
                f"keep='best' compares the rollouts of a group, but group_size={self.group_size!r}; use at least 2"
            )
        mdp.weigh([], self.normalisation)

    async def improve(self, session: Session, policy: Policy, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Update one policy from a step's groups; return metrics."""
        admitted = session.transitions(groups, policy)
        keep = kept_rollouts(groups, self.keep)
        # Imitation is of what was said, not of how it was sampled: the likelihood is the model's own, at 1.
        kept = [replace(one, temperature=1.0, advantage=1.0) for one in admitted if one.rollout_id in keep]
        cuts = mdp.cut(kept, self.updates_per_step, seed=f"{self.seed}/{policy.name}/{step}")
        metrics = sample_metrics(admitted) | {
            "tokens/trained": float(sum(len(one.token_ids) for one in kept)),
            "rollouts/kept": float(len(keep)),
        }
        if kept:
            loss = Loss(name="cross_entropy")
            batches = [
                [Objective(loss=loss, samples=mdp.samples(mdp.weigh(batch, self.normalisation)))] for batch in cuts
            ]
            metrics |= dict(await session.update(policy, batches))
        return metrics
