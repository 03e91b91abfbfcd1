"""Reinforcement learning: an algorithm is an annotation of transitions, and the name of a loss.

`annotate` is the whole estimator; a new one is another function like it. The learner never knows which one
wrote the advantages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev, stdev
from typing import Literal

from leyden import mdp
from leyden.errors import ConfigurationError
from leyden.interfaces import Group, Loss, Session, Transition
from leyden.roles import Policy

__all__ = ["GRPO", "annotate"]

LEAST_SPREAD = 1e-6
"""Returns of a group that differ by less are equal: only rounding tells them apart."""


def annotate(
    transitions: Sequence[Transition], groups: Sequence[Group], *, normalise_std: bool = True
) -> list[Transition]:
    """Set group-relative advantages, A = (R - mean) / std (DeepSeekMath, section 4.1.2).

    A rollout's return is the mean value of the policy's calls in it, or its reward where the policy was silent.
    Without std it is Dr. GRPO's (Liu et al. 2025); std is the sample standard deviation, as in TRL.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for one in transitions:
        values[one.rollout_id].append(one.value)
    baselines: dict[str, tuple[float, float]] = {}
    for group in groups:
        scored = [one.rollout for one in group.rollouts if one.rollout.reward is not None]
        returns = [fmean(values.get(one.rollout_id) or [one.reward or 0.0]) for one in scored]
        if len(returns) >= 2 and max(returns) - min(returns) > LEAST_SPREAD:
            baselines[group.group_id] = fmean(returns), 1 / stdev(returns) if normalise_std else 1.0
    mean_and_scale = [baselines.get(one.group_id, (one.value, 0.0)) for one in transitions]
    return [
        replace(one, advantage=(one.value - mean) * scale)
        for one, (mean, scale) in zip(transitions, mean_and_scale, strict=True)
    ]


@dataclass(frozen=True)
class GRPO:
    """Group relative policy optimisation (Shao et al. 2024), clipped against the recorded log-probabilities.

    Raises:
        ConfigurationError: a value outside its range.
    """

    group_size: int = 8
    """Rollouts a task and step."""
    clip: float = 0.2
    """The ratio's gain is cut below 1 - clip."""
    clip_high: float | None = None
    """And above 1 + clip_high (DAPO, section 3.1); `None` takes `clip`."""
    normalise_std: bool = True
    """False subtracts the group's mean only."""
    normalisation: mdp.Normalisation = "per_rollout"
    updates_per_step: int = 1
    """Optimizer steps a training step; each takes whole groups, in seeded order."""
    off_distribution: Literal["error", "drop"] = "error"
    """What to do with calls whose log-probabilities are not those of the distribution sampled from."""
    layout: mdp.Layout = "merged"
    seed: int = 0
    """Orders the groups over the updates of a step."""

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ConfigurationError(
                f"group_size={self.group_size!r}: a group-relative advantage needs at least 2 rollouts a task"
            )
        if not 0 < self.clip < 1 or (self.clip_high is not None and self.clip_high <= 0):
            raise ConfigurationError(
                f"clip={self.clip!r} must be in (0, 1) and clip_high={self.clip_high!r} None or above 0"
            )
        if self.updates_per_step < 1:
            raise ConfigurationError(f"updates_per_step={self.updates_per_step!r} must be at least 1")
        if self.off_distribution not in ("error", "drop"):
            raise ConfigurationError(f"off_distribution={self.off_distribution!r} must be 'error' or 'drop'")
        mdp.weigh([], self.normalisation)
        mdp.rows([], self.layout)

    def check(self, policies: Sequence[Policy]) -> None:
        """Refuse policies that this loss cannot train.

        Raises:
            ConfigurationError: nothing is trainable, or a policy's training sampling is off-distribution.
        """
        trainable = [policy for policy in policies if policy.trainable]
        if not trainable:
            raise ConfigurationError("no policy is trainable; give at least one Policy(..., trainable=True)")
        if self.off_distribution == "drop":
            return
        for policy in trainable:
            sampling = policy.sampling
            wrong = {
                name: value
                for name, value, is_off in (
                    ("temperature", sampling.temperature, sampling.temperature == 0),
                    ("top_p", sampling.top_p, sampling.top_p is not None and sampling.top_p < 1),
                    ("top_k", sampling.top_k, bool(sampling.top_k)),
                )
                if is_off
            }
            if wrong:
                raise ConfigurationError(
                    f"policy {policy.name!r} samples with {wrong!r}, so its recorded log-probabilities are not those "
                    "of the distribution it samples from, which GRPO's ratio needs; use "
                    "Sampling(temperature=1.0, top_p=1.0, top_k=0)"
                )

    async def run(self, session: Session) -> None:
        """Sample, improve each trainable policy, finish the step; until the session has no more steps.

        Raises:
            ConfigurationError: a call was sampled off-distribution and `off_distribution` is `error`.
        """
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
        admitted = self._on_distribution(session.transitions(groups, policy), groups)
        annotated = annotate(admitted, groups, normalise_std=self.normalise_std)
        cuts = mdp.cut(annotated, self.updates_per_step, seed=f"{self.seed}/{policy.name}/{step}")
        trained: list[list[Transition]] = []
        for batch in cuts:
            # Weights count every admitted rollout; a call with advantage 0 then adds exactly nothing to the
            # gradient, so it is not computed, and a batch of only such calls takes no optimizer step.
            useful = [one for one in mdp.weigh(batch, self.normalisation) if one.advantage != 0]
            if useful:
                trained.append(useful)
        metrics = mdp.sample_metrics(admitted) | {
            "advantage/std": pstdev(one.advantage for one in annotated) if annotated else 0.0,
            "tokens/trained": float(sum(len(one.token_ids) for batch in trained for one in batch)),
        }
        if trained:
            high = self.clip if self.clip_high is None else self.clip_high
            loss = Loss(name="policy_gradient_clip", options={"clip_low": self.clip, "clip_high": high})
            batches = [mdp.rows(batch, self.layout) for batch in trained]
            metrics |= dict(await session.update(policy, batches, loss))
        return metrics

    def _on_distribution(self, transitions: Sequence[Transition], groups: Sequence[Group]) -> list[Transition]:
        """Return the transitions a ratio can be taken of.

        Raises:
            ConfigurationError: there are others, and `off_distribution` is `error`; names their parameters.
        """
        kept = [one for one in transitions if not one.off_distribution]
        if self.off_distribution == "error" and len(kept) < len(transitions):
            first = next(one for one in transitions if one.off_distribution)
            raise ConfigurationError(
                f"{len(transitions) - len(kept)} of {len(transitions)} calls of policy {first.policy!r} were not "
                f"sampled from log-softmax(logits / temperature); the first is of role {first.role!r}, with "
                f"{dict(mdp.sampling_of(groups, first))!r}. Let Policy(sampling=Sampling(temperature=1.0, top_p=1.0, "
                "top_k=0)) replace the agent's own values, or leave such calls out: GRPO(off_distribution='drop')"
            )
        return kept
