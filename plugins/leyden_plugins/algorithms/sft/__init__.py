"""Supervised fine-tuning on the policy's own samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from leyden import mdp
from leyden.errors import ConfigurationError
from leyden.interfaces import Group, Loss, Session
from leyden.roles import Policy

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
class RejectionSampling:
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
    layout: mdp.Layout = "merged"
    seed: int = 0
    """Orders the groups over the updates of a step."""

    def __post_init__(self) -> None:
        if self.group_size < 1 or self.updates_per_step < 1:
            raise ConfigurationError(
                f"group_size={self.group_size!r} and updates_per_step={self.updates_per_step!r} must be at least 1"
            )
        if self.keep != "best" and not isinstance(self.keep, int | float):
            raise ConfigurationError(f"keep={self.keep!r} must be 'best' or a number")
        if self.keep == "best" and self.group_size < 2:
            raise ConfigurationError(
                f"keep='best' compares the rollouts of a group, but group_size={self.group_size!r}; use at least 2"
            )
        mdp.weigh([], self.normalisation)
        mdp.rows([], self.layout)

    def check(self, policies: Sequence[Policy]) -> None:
        """Refuse a run with nothing to train.

        Raises:
            ConfigurationError: no policy is trainable.
        """
        if not any(policy.trainable for policy in policies):
            raise ConfigurationError("no policy is trainable; give at least one Policy(..., trainable=True)")

    async def run(self, session: Session) -> None:
        """Sample, imitate what was kept, finish the step; until the session has no more steps."""
        trainable = [policy for policy in session.policies if policy.trainable]
        async for step in session.steps():
            groups = await session.sample(step, group_size=self.group_size)
            metrics = mdp.reward_metrics(groups)
            for policy in trainable:
                measured = await self._improve(session, policy, groups, step)
                prefix = f"{policy.name}/" if len(trainable) > 1 else ""
                metrics |= {prefix + name: value for name, value in measured.items()}
            await session.finish_step(step, groups, metrics)

    async def _improve(self, session: Session, policy: Policy, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Update one policy from a step's groups; return metrics."""
        admitted = session.transitions(groups, policy)
        keep = kept_rollouts(groups, self.keep)
        # Imitation is of what was said, not of how it was sampled: the likelihood is the model's own, at 1.
        kept = [replace(one, temperature=1.0, advantage=1.0) for one in admitted if one.rollout_id in keep]
        cuts = mdp.cut(kept, self.updates_per_step, seed=f"{self.seed}/{policy.name}/{step}")
        metrics = mdp.sample_metrics(admitted) | {
            "tokens/trained": float(sum(len(one.token_ids) for one in kept)),
            "rollouts/kept": float(len(keep)),
        }
        if kept:
            batches = [mdp.rows(mdp.weigh(batch, self.normalisation), self.layout) for batch in cuts]
            metrics |= dict(await session.update(policy, batches, Loss(name="cross_entropy")))
        return metrics
