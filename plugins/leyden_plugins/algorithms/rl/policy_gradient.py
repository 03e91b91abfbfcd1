"""What all policy-gradient algorithms share: from a step's groups to optimizer batches.

transitions -> on-distribution ones -> values shaped -> advantages -> log-probabilities and corrections -> optimizer
batches of whole groups -> weights over the whole batch -> one objective a loss -> `session.update`.

One idea: an algorithm says only `advantages` and `loss`; a role may have an algorithm of its own in the same batch.
One trap: weights count every admitted call before calls without a gradient are left out; they count as zeros.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal

from leyden import mdp
from leyden.interfaces import Batch, Group, KLEstimator, Loss, Objective, Session, Transition
from leyden.metrics import advantage_metrics, mismatch_metrics, sample_metrics
from leyden.roles import Policy, matches
from leyden.stepwise import Stepwise
from leyden_plugins.algorithms.rl import checks
from leyden_plugins.algorithms.rl.corrections import ImportanceSampling
from leyden_plugins.algorithms.rl.shaping import Overlong, punish_length, subtract_divergence


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Train stored groups of earlier steps beside the new ones.

    Raises:
        ConfigurationError: a value below 1.
    """

    groups: int
    """At most so many a step."""
    max_age: int
    """From so many steps back, at most."""

    def __post_init__(self) -> None:
        checks.at_least_one(self, "groups", "max_age")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Where transitions come from: what an estimator may look at beside them."""

    session: Session
    policy: Policy
    groups: Sequence[Group]
    """Of the step, replayed ones included."""
    step: int
    is_stale: bool
    """Samples may be older than the weights: the session is asynchronous, or groups are replayed."""


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Stepwise):
    """Implements `improve` from `advantages` and `loss`.

    Raises:
        ConfigurationError: a value outside its range, or options that do not go together.
    """

    group_size: int = 8
    """Rollouts a task and step."""
    normalisation: mdp.Normalisation = "per_rollout"
    rollout_tokens: int | None = None
    """The constant of the normalisation `dr_grpo`, such as the most tokens that a rollout may generate."""
    updates_per_step: int = 1
    """Optimizer steps an epoch; each takes whole groups, in seeded order."""
    epochs: int = 1
    """How often a step's samples are trained; the ratio is always to the weights at the step's start."""
    off_distribution: Literal["error", "drop"] = "error"
    """What to do with calls whose log-probabilities are not those of the distribution sampled from."""
    correction: ImportanceSampling | Literal["auto"] | None = "auto"
    """Of stale or mismatched samples. `auto`: truncation at 2 in an asynchronous run or with `replay`; otherwise none,
    and the recorded log-probabilities stand for the learner's own."""
    kl_coefficient: float = 0.0
    """Times the divergence from the weights that training began with."""
    kl_in: Literal["loss", "reward"] = "loss"
    kl_estimator: KLEstimator | None = None
    """`None`: k3 in the loss, k1 in the reward, the only one there."""
    entropy_coefficient: float = 0.0
    """Times the entropy of the next-token distribution, which is rewarded."""
    overlong: Overlong | None = None
    """Punishes long answers before advantages are computed."""
    by_role: Mapping[str, PolicyGradient] = field(default_factory=dict)
    """Role pattern -> the algorithm of these roles' calls, the first that matches. It gives advantages, loss, KL,
    entropy, `overlong` and `correction`; how the step is sampled, cut and weighed stays here."""
    replay: Replay | None = None
    seed: int = 0
    """Orders the groups over the updates of a step."""

    @abstractmethod
    def advantages(self, transitions: Sequence[Transition], groups: Sequence[Group]) -> list[Transition]:
        """Return the transitions with their advantages, in order."""

    @abstractmethod
    def loss(self) -> Loss:
        """Return the surrogate; divergence and entropy are added to it."""

    async def prepare(self, transitions: Sequence[Transition], scene: Scene) -> list[Transition]:
        """Return the transitions with what `advantages` needs from the session; nothing by default."""
        return list(transitions)

    @property
    def compares_rollouts(self) -> bool:
        """Whether an advantage needs at least two rollouts of a task."""
        return True

    @property
    def ratio(self) -> Literal["token", "call"] | None:
        """What the loss takes a ratio of, to the weights at the step's start; `None`: it has none."""
        return "token"

    def __post_init__(self) -> None:
        checks.check_options(self)
        for pattern, inner in self.by_role.items():
            checks.check_inner(self, inner, where=f"by_role[{pattern!r}]", shared=checks.OF_THE_STEP)

    def check(self, policies: Sequence[Policy]) -> None:
        """Refuse policies that this loss cannot train.

        Raises:
            ConfigurationError: nothing is trainable, or a policy's training sampling is off-distribution.
        """
        super().check(policies)
        if self.off_distribution == "error":
            for policy in policies:
                if policy.trainable:
                    checks.check_sampling(policy)

    def part_of(self, role: str) -> str | None:
        """Return the first pattern of `by_role` that this role matches; `None`: it is this algorithm's own."""
        return next((pattern for pattern in self.by_role if matches([pattern], role)), None)

    def parts(self) -> dict[str | None, PolicyGradient]:
        """Return who gives advantages and loss, by what `part_of` returns."""
        found: dict[str | None, PolicyGradient] = {None: self}
        found.update(self.by_role)
        return found

    async def improve(self, session: Session, policy: Policy, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Update one policy from a step's groups; return metrics."""
        if self.replay is not None:
            replayed = await session.replay(step, count=self.replay.groups, max_age=self.replay.max_age)
            groups = [*groups, *replayed]
        admitted = checks.on_distribution(session.transitions(groups, policy), groups, self.off_distribution)
        scene = Scene(
            session=session,
            policy=policy,
            groups=groups,
            step=step,
            is_stale=session.max_staleness > 0 or self.replay is not None,
        )
        annotated = list(admitted)
        for part, inner in self.parts().items():
            indices = [index for index, one in enumerate(admitted) if self.part_of(one.role) == part]
            if indices:
                found = await inner.annotate([admitted[index] for index in indices], scene)
                for index, one in zip(indices, found, strict=True):
                    annotated[index] = one
        batches = self._batches(annotated, f"{self.seed}/{policy.name}/{step}")
        trained = sum(len(one.token_ids) for batch in batches for objective in batch for one in objective.samples)
        metrics = sample_metrics(admitted) | advantage_metrics(annotated)
        metrics |= {"tokens/trained": float(trained)} | _correction_metrics(annotated)
        if batches:
            metrics |= dict(await session.update(policy, batches))
        return metrics | mismatch_metrics(annotated)

    async def annotate(self, transitions: Sequence[Transition], scene: Scene) -> list[Transition]:
        """Return the transitions with advantages, and with the log-probabilities that the loss compares with."""
        session, policy = scene.session, scene.policy
        prepared = await self.prepare(transitions, scene)
        if self.kl_in == "reward" and self.kl_coefficient:
            references = await session.logprobs(policy, prepared, reference=True)
            prepared = subtract_divergence(prepared, references, self.kl_coefficient)
        if self.overlong is not None:
            prepared = punish_length(prepared, self.overlong)
        annotated = self.advantages(prepared, scene.groups)
        # The rest costs a forward pass, so only calls that move weights get it.
        moving = [index for index, one in enumerate(annotated) if self.moves(one)]
        correction = self.correction
        if correction == "auto":
            automatic = ImportanceSampling(level="sequence" if self.ratio == "call" else "token")
            correction = automatic if scene.is_stale else None
        if correction is not None and moving:
            old = await session.logprobs(policy, [annotated[index] for index in moving])
            for index, logprobs in zip(moving, old, strict=True):
                annotated[index] = correction.correct(annotated[index], logprobs)
        if self.whole_loss().kl_coefficient and moving:
            references = await session.logprobs(policy, [annotated[index] for index in moving], reference=True)
            for index, logprobs in zip(moving, references, strict=True):
                annotated[index] = replace(annotated[index], reference_logprobs=logprobs)
        return annotated

    def whole_loss(self) -> Loss:
        """Return the surrogate with divergence and entropy."""
        return replace(
            self.loss(),
            kl_coefficient=self.kl_coefficient if self.kl_in == "loss" else 0.0,
            kl_estimator=self.kl_estimator or "k3",
            entropy_coefficient=self.entropy_coefficient,
        )

    def moves(self, transition: Transition) -> bool:
        """Say whether a call has a gradient: an advantage, or a term of the loss that needs none."""
        if transition.corrections is not None and not any(transition.corrections):
            return False
        loss = self.whole_loss()
        has_terms = bool(loss.kl_coefficient or loss.entropy_coefficient or loss.value_coefficient)
        return has_terms or transition.advantage != 0 or any(transition.token_advantages or ())

    def _batches(self, annotated: Sequence[Transition], seed: str) -> list[Batch]:
        """Return the step's optimizer batches; one in which nothing moves is left out."""
        batches: list[Batch] = []
        for epoch in range(self.epochs):
            for batch in mdp.cut(annotated, self.updates_per_step, seed=f"{seed}/{epoch}" if epoch else seed):
                weighed = mdp.weigh(batch, self.normalisation, rollout_tokens=self.rollout_tokens)
                objectives: list[Objective] = []
                for part, inner in self.parts().items():
                    moving = [one for one in weighed if self.part_of(one.role) == part and inner.moves(one)]
                    if moving:
                        objectives.append(Objective(loss=inner.whole_loss(), samples=mdp.samples(moving)))
                if objectives:
                    batches.append(objectives)
        return batches


def _correction_metrics(transitions: Sequence[Transition]) -> dict[str, float]:
    """Return `correction/mean` of the tokens' importance weights, and `correction/zero_share` of those masked."""
    weights = [weight for one in transitions for weight in one.corrections or ()]
    if not weights:
        return {}
    return {"correction/mean": fmean(weights), "correction/zero_share": weights.count(0.0) / len(weights)}
