"""Algorithms that go step by step: sample groups, improve each policy from them, finish the step.

One idea: an algorithm of this kind says only how to improve one policy from a step's groups, so several of them can
share a run, one a policy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

from leyden.errors import ConfigurationError
from leyden.interfaces import Demands, Group, Session
from leyden.metrics import call_metrics, reward_metrics, rollout_metrics
from leyden.roles import Policy


class Stepwise(ABC):
    """Implements `leyden.interfaces.Algorithm` from `improve`."""

    group_size: int
    demands: ClassVar[Demands] = Demands()
    speakers: Mapping[str, str | None] = MappingProxyType({})
    """Policy -> the policy that speaks for its roles while a step is sampled; `None`: the app's own model."""
    most_batches: int = 1
    """How many times a step's tasks may be sampled to find groups that are accepted."""

    @abstractmethod
    async def improve(
        self, session: Session, policy: Policy, groups: Sequence[Group], step: int
    ) -> Mapping[str, float]:
        """Update one policy from a step's groups; return metrics."""

    def accepts(self, group: Group) -> bool:
        """Say whether a group is worth a place in the step; another is sampled instead, within `most_batches`."""
        return True

    def among(self, policies: Sequence[Policy]) -> Stepwise:
        """Return what chooses groups while only these policies are trained."""
        return self

    def taught(self, policies: Sequence[Policy]) -> Mapping[str, str | None]:
        """Return `speakers` while a step is sampled that trains these policies."""
        return self.speakers

    def check(self, policies: Sequence[Policy]) -> None:
        """Refuse a run with nothing to train.

        Raises:
            ConfigurationError: no policy is trainable.
        """
        if not any(policy.trainable for policy in policies):
            raise ConfigurationError("no policy is trainable; give at least one Policy(..., trainable=True)")

    async def run(self, session: Session) -> None:
        """Sample, improve each trainable policy, finish the step; until the session has no more steps."""
        several = sum(policy.trainable for policy in session.policies) > 1
        async for step in session.steps():
            learning = [policy for policy in session.policies if policy.is_trained_at(step)]
            chooser = self.among(learning)
            groups = await session.sample(
                step,
                group_size=self.group_size,
                accept=chooser.accepts if chooser.most_batches > 1 else None,
                most_batches=chooser.most_batches,
                speakers=self.taught(learning),
            )
            metrics = reward_metrics(groups) | rollout_metrics(groups)
            for policy in learning:
                measured = dict(await self.improve(session, policy, groups, step))
                trained = measured.get("tokens/trained", 0.0)
                measured |= call_metrics(groups, policy.name, tokens_trained=trained)
                prefix = f"{policy.name}/" if several else ""
                metrics |= {prefix + name: value for name, value in measured.items()}
            await session.finish_step(step, groups, metrics)


@dataclass(frozen=True)
class PerPolicy(Stepwise):
    """Improve each policy with its own algorithm, from the same groups.

    Raises:
        ConfigurationError: none is given, or they want groups of different sizes.
    """

    algorithms: Mapping[str, Stepwise]
    """Policy name -> algorithm."""

    def __post_init__(self) -> None:
        if not self.algorithms:
            raise ConfigurationError("algorithms={} improves nothing; give each trainable policy an algorithm")
        sizes = {name: one.group_size for name, one in self.algorithms.items()}
        if len(set(sizes.values())) > 1:
            raise ConfigurationError(
                f"the policies' algorithms want groups of different sizes, {sizes!r}; they share the rollouts of a "
                "step, so give all of them one group_size"
            )

    @property
    def group_size(self) -> int:  # type: ignore[override]  # computed here, a field elsewhere
        """Rollouts a task."""
        return next(iter(self.algorithms.values())).group_size

    @property
    def demands(self) -> Demands:  # type: ignore[override]  # as above
        """What all of them ask for."""
        every = [one.demands for one in self.algorithms.values()]
        return Demands(synchronous=any(one.synchronous for one in every))

    @property
    def speakers(self) -> Mapping[str, str | None]:  # type: ignore[override]  # as above
        """Of all of them together."""
        return {policy: speaker for one in self.algorithms.values() for policy, speaker in one.speakers.items()}

    @property
    def most_batches(self) -> int:  # type: ignore[override]  # as above
        """The most that any of them asks for."""
        return max(one.most_batches for one in self.algorithms.values())

    def accepts(self, group: Group) -> bool:
        """Say whether any of those that choose their groups accepts this one; the others take what comes."""
        return any(one.accepts(group) for one in self.algorithms.values() if one.most_batches > 1)

    def among(self, policies: Sequence[Policy]) -> Stepwise:
        """Return the algorithms of these policies; those of frozen ones choose no more groups."""
        left = {policy.name: self.algorithms[policy.name] for policy in policies}
        return PerPolicy(left) if left else self

    async def improve(
        self, session: Session, policy: Policy, groups: Sequence[Group], step: int
    ) -> Mapping[str, float]:
        """Improve the policy with its own."""
        return await self.algorithms[policy.name].improve(session, policy, groups, step)

    def taught(self, policies: Sequence[Policy]) -> Mapping[str, str | None]:
        """Return who speaks for each of these policies, as its own algorithm says."""
        own = {one.name: self.algorithms[one.name].taught([one]) for one in policies}
        return {name: speakers[name] for name, speakers in own.items() if name in speakers}

    def check(self, policies: Sequence[Policy]) -> None:
        """Let each check its own policy, beside the others as if nobody trained them.

        Raises:
            ConfigurationError: a trainable policy has no algorithm, or a name is no trainable policy's.
        """
        super().check(policies)
        trainable = {policy.name for policy in policies if policy.trainable}
        if trainable != set(self.algorithms):
            raise ConfigurationError(
                f"algorithms are given for {sorted(self.algorithms)!r}, but the trainable policies are "
                f"{sorted(trainable)!r}; give each of these one"
            )
        for policy in policies:
            if policy.trainable:
                others = [replace(one, trainable=False) for one in policies if one is not policy]
                self.algorithms[policy.name].check([policy, *others])
