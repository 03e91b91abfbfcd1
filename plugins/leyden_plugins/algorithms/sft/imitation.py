"""Fine-tuning on what was said well: by the policy itself, by a stronger one, or by whoever spoke in a stored run.

One idea: whoever spoke, a call is imitated alike: cross-entropy on its answer's tokens, each with its share of the loss
from `mdp.weigh`. One trap: imitation is of what was said, not of how it was sampled, so the temperature is 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import ClassVar

from leyden import mdp
from leyden.errors import ConfigurationError
from leyden.interfaces import Batch, Demands, Group, Loss, Objective, Session, Transition
from leyden.metrics import over_batches, sample_metrics
from leyden.roles import Policy
from leyden.stepwise import Stepwise
from leyden_plugins.algorithms.passes import Passes, Source, check_source, stored_groups
from leyden_plugins.algorithms.sft.keeping import Keep, check_keep, kept_calls

OF_SAMPLES = ("mismatch/", "loss/kl", "loss/ratio", "loss/clip_fraction")
"""What a learner measures against recorded log-probabilities; others' calls have none that mean anything."""


def imitation(calls: Sequence[Transition], normalisation: mdp.Normalisation) -> Batch:
    """Return an optimizer batch that imitates calls."""
    spoken = [replace(one, temperature=1.0, advantage=1.0) for one in calls]
    samples = mdp.samples(mdp.weigh(spoken, normalisation))
    return [Objective(loss=Loss(name="cross_entropy"), samples=samples)]


def imitation_metrics(shown: Sequence[Transition], kept: Sequence[Transition]) -> dict[str, float]:
    """Return what is said of others' calls, and of those that are imitated."""
    return {
        "transitions/admitted": float(len(shown)),
        "tokens/trained": float(sum(len(one.token_ids) for one in kept)),
        "tokens/retokenised_share": sum(one.is_retokenised for one in kept) / max(1, len(kept)),
        "rollouts/kept": float(len({one.rollout_id for one in kept})),
    }


def without_samples(metrics: Mapping[str, float]) -> dict[str, float]:
    """Leave out what says nothing of others' calls."""
    return {name: value for name, value in metrics.items() if not name.startswith(OF_SAMPLES)}


@dataclass(frozen=True)
class RejectionSampling(Stepwise):
    """Rejection-sampling fine-tuning (RFT, Yuan et al. 2023): imitate the rollouts with the highest rewards.

    Raises:
        ConfigurationError: a value outside its range.
    """

    group_size: int = 8
    """Rollouts a task and step."""
    keep: Keep = "best"
    """`best` of each group, or every rollout whose reward reaches this number; `{"writer": 0.8, "checker": "best"}`
    holds a role's own return against it, and imitates these roles alone."""
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
        check_keep(self.keep, group_size=self.group_size)
        mdp.weigh([], self.normalisation)

    async def improve(self, session: Session, policy: Policy, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Update one policy from a step's groups; return metrics."""
        admitted = session.transitions(groups, policy)
        kept = kept_calls(admitted, groups, self.keep)
        metrics = sample_metrics(admitted) | imitation_metrics(admitted, kept)
        return metrics | await self.imitate(session, policy, kept, step)

    async def imitate(
        self, session: Session, policy: Policy, calls: Sequence[Transition], step: int
    ) -> dict[str, float]:
        """Update one policy from calls; return what the learner measured."""
        cuts = mdp.cut(calls, self.updates_per_step, seed=f"{self.seed}/{policy.name}/{step}")
        if not cuts:
            return {}
        return dict(await session.update(policy, [imitation(batch, self.normalisation) for batch in cuts]))


@dataclass(frozen=True)
class Distillation(RejectionSampling):
    """Imitate a stronger speaker on the run's own tasks: another policy, or the app's own model.

    While a step is sampled the teacher speaks for the trained policies' roles; evaluation is always the policies' own.
    A teacher on the same engine has the same tokenizer, so its tokens are exact; the app's own model has none that are
    known, so its answers are tokenised anew.

    Raises:
        ConfigurationError: a value outside its range.
    """

    demands: ClassVar[Demands] = Demands(synchronous=True)

    _: KW_ONLY
    teacher: str | None = None
    """The policy that speaks; `None`: the app's own model."""
    group_size: int = 1
    keep: Keep = None
    """As in `RejectionSampling`; `None` imitates every rollout that did not fail."""

    def taught(self, policies: Sequence[Policy]) -> Mapping[str, str | None]:
        """Return the teacher for each of these policies but itself."""
        return {policy.name: self.teacher for policy in policies if policy.name != self.teacher}

    def check(self, policies: Sequence[Policy]) -> None:
        """Refuse a teacher that does not exist, or that would teach nobody.

        Raises:
            ConfigurationError: names the policies.
        """
        super().check(policies)
        names = [policy.name for policy in policies]
        if self.teacher is not None and self.teacher not in names:
            raise ConfigurationError(
                f"teacher={self.teacher!r} is no policy of this run; name one of {names!r}, such as one with "
                "trainable=False, or leave it out: then the app's own model teaches"
            )
        if not self.taught([policy for policy in policies if policy.trainable]):
            raise ConfigurationError(f"teacher={self.teacher!r} is the only trainable policy, so it would teach nobody")

    async def improve(self, session: Session, policy: Policy, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Update one policy from what its teacher said; return metrics."""
        if policy.name == self.teacher:
            return {}
        shown = await session.demonstrations(groups, policy)
        kept = kept_calls(shown, groups, self.keep)
        measured = await self.imitate(session, policy, kept, step)
        return imitation_metrics(shown, kept) | without_samples(measured)


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Imitate stored rollouts, of production or of any run; nothing is run, so `fit()` needs no agent and no tasks.

    Each kept rollout is trained once an epoch, whole, with all its calls of the policy's roles.
    Implements `leyden.interfaces.Algorithm`.

    Raises:
        ConfigurationError: a value outside its range.
    """

    source: Source
    """A run folder or store, or several; they are only read."""
    epochs: int = 1
    steps_per_epoch: int = 1
    """Into how many steps an epoch is cut: each reports, and evaluates and checkpoints when that is due."""
    batch_size: int = 16
    """Rollouts an optimizer step."""
    keep: Keep = None
    """As in `RejectionSampling`; `None` imitates every rollout that did not fail, with a reward or without."""
    exact: bool = False
    """The recorded token ids are of this policy's tokenizer; False tokenises every call anew."""
    normalisation: mdp.Normalisation = "token_mean"
    seed: int = 0
    """Orders the rollouts."""
    group_size: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        check_source(self.source)
        check_keep(self.keep, group_size=None)
        mdp.weigh([], self.normalisation)
        self.passes  # noqa: B018  # checks its values

    @property
    def passes(self) -> Passes:
        """Return which rollouts each step trains."""
        return Passes(
            epochs=self.epochs, steps_per_epoch=self.steps_per_epoch, batch_size=self.batch_size, seed=self.seed
        )

    @property
    def demands(self) -> Demands:
        """Return that it knows its steps and runs nothing."""
        return Demands(steps=self.passes.steps, runs_agent=False)

    def check(self, policies: Sequence[Policy]) -> None:
        """Refuse a run with nothing to train.

        Raises:
            ConfigurationError: no policy is trainable.
        """
        if not any(policy.trainable for policy in policies):
            raise ConfigurationError("no policy is trainable; give at least one Policy(..., trainable=True)")

    async def run(self, session: Session) -> None:
        """Read the source, and imitate its rollouts step by step.

        Raises:
            ConfigurationError: no call of the source is to be imitated.
        """
        groups = await stored_groups(session, self.source)
        trained = [policy for policy in session.policies if policy.trainable]
        shown = {policy.name: await session.demonstrations(groups, policy, exact=self.exact) for policy in trained}
        kept = {name: kept_calls(calls, groups, self.keep) for name, calls in shown.items()}
        if not any(kept.values()):
            raise ConfigurationError(
                f"nothing in source={self.source!r} is to be imitated: {sum(map(len, shown.values()))} calls of the "
                f"policies' roles in {sum(len(group.rollouts) for group in groups)} rollouts, none of which "
                f"keep={self.keep!r} keeps; look at it with `leyden show`, or lower keep"
            )
        async for step in session.steps():
            metrics: dict[str, float] = {}
            for policy in trained:
                prefix = f"{policy.name}/" if len(trained) > 1 else ""
                found = await self._step(session, policy, kept[policy.name], step) if policy.is_trained_at(step) else {}
                metrics |= {prefix + name: value for name, value in found.items()}
            await session.finish_step(step, [], metrics)

    async def _step(
        self, session: Session, policy: Policy, calls: Sequence[Transition], step: int
    ) -> Mapping[str, float]:
        """Take the optimizer steps of one step; return metrics."""
        by_rollout: dict[str, list[Transition]] = {}
        for one in calls:
            by_rollout.setdefault(one.rollout_id, []).append(one)
        batches = self.passes.batches(list(by_rollout.values()), step)
        measured: list[Mapping[str, float]] = []
        for number, batch in enumerate(batches):
            session.progress("imitation", number, len(batches))
            spoken = [call for rollout in batch for call in rollout]
            measured.append(await session.update(policy, [imitation(spoken, self.normalisation)]))
        trained = [call for batch in batches for rollout in batch for call in rollout]
        return imitation_metrics(trained, trained) | without_samples(over_batches(measured))
