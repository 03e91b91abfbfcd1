"""Learning from preferences between rollouts of one task: DPO, and SimPO, which needs no reference.

One idea: such a loss is -log sigmoid(m) of a margin m between two rollouts, so its gradient is that of a policy
gradient in which every token of the chosen one has the advantage sigmoid(-m) * dm/dlogp, and every token of the
rejected one the opposite. One forward pass gives the margins; the learner knows nothing of pairs.
One trap: the margins are those of the weights as they are, so advantages are computed anew before each optimizer step.
A side is all calls of the policy in a rollout, tokens that both sides begin with included; what the agent or its tools
said in between is never part of it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from leyden import mdp
from leyden.errors import ConfigurationError
from leyden.interfaces import Demands, Group, Loss, Objective, Session, Transition
from leyden.metrics import over_batches, sample_metrics
from leyden.roles import Policy
from leyden.stepwise import Stepwise
from leyden_plugins.algorithms.passes import Passes, Source, check_source, stored_groups
from leyden_plugins.algorithms.preference.pairs import Choice, Pair, pairs_of, returns_of

MEANINGLESS = ("mismatch/", "loss/")
"""What a learner measures of the surrogate; what the preference loss is stands in `preference/`."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """A rollout in a pair: sums over the answer tokens of all calls of the policy."""

    logprob: float
    """Under the weights as they are, at temperature 1."""
    reference: float
    """Under the weights that training began with; 0 for a loss without them."""
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Preference(Stepwise):
    """Implements `improve` from a margin.

    Raises:
        ConfigurationError: a value outside its range, or options that do not go together.
    """

    group_size: int = 8
    """Rollouts a task and step."""
    pairs: Choice = "best_worst"
    least_gap: float = 0.0
    """Between the returns of two rollouts that are compared."""
    updates_per_step: int = 1
    """Optimizer steps a training step; each takes whole groups, in seeded order. Not with `source`."""
    source: Source | None = None
    """Take pairs from the groups of these run folders or stores instead of sampling; nothing is run."""
    epochs: int = 1
    """With `source`: how often its pairs are trained."""
    steps_per_epoch: int = 1
    """With `source`: into how many steps an epoch is cut."""
    batch_size: int = 16
    """With `source`: groups an optimizer step."""
    exact: bool = False
    """With `source`: its recorded token ids are of this policy's tokenizer; False tokenises every call anew."""
    seed: int = 0
    """Orders the groups."""

    needs_reference = True
    """Whether a margin looks at the weights that training began with."""

    @abstractmethod
    def margin(self, chosen: Side, rejected: Side) -> float:
        """Return m of the loss -log sigmoid(m)."""

    @abstractmethod
    def slope(self, side: Side) -> float:
        """Return |dm / dlogp| for the log-probability of a side's tokens."""

    def __post_init__(self) -> None:
        if self.group_size < 2 or self.updates_per_step < 1:
            raise ConfigurationError(
                f"group_size={self.group_size!r} must be at least 2, to have pairs, and "
                f"updates_per_step={self.updates_per_step!r} at least 1"
            )
        if self.pairs not in ("best_worst", "all"):
            raise ConfigurationError(f"pairs={self.pairs!r} must be 'best_worst' or 'all'")
        if not (math.isfinite(self.least_gap) and self.least_gap >= 0):
            raise ConfigurationError(f"least_gap={self.least_gap!r} must be a finite number, at least 0")
        passes = self.passes
        if self.source is not None:
            check_source(self.source)
            if self.updates_per_step != 1:
                raise ConfigurationError(
                    f"updates_per_step={self.updates_per_step!r} cuts sampled groups; stored ones have batch_size and "
                    "steps_per_epoch"
                )
        elif passes != Passes(seed=self.seed) or self.exact:
            raise ConfigurationError(
                "epochs, steps_per_epoch, batch_size and exact are of stored groups; give source=, or leave them out"
            )

    @property
    def passes(self) -> Passes:
        """Return which stored groups each step trains."""
        return Passes(
            epochs=self.epochs, steps_per_epoch=self.steps_per_epoch, batch_size=self.batch_size, seed=self.seed
        )

    @property
    def demands(self) -> Demands:  # type: ignore[override]  # by `source`, a constant elsewhere
        """Return that stored groups need nothing run."""
        return Demands() if self.source is None else Demands(steps=self.passes.steps, runs_agent=False)

    async def improve(self, session: Session, policy: Policy, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Update one policy from a step's groups; return metrics."""
        admitted = session.transitions(groups, policy)
        cuts = mdp.cut(self._paired(admitted), self.updates_per_step, seed=f"{self.seed}/{policy.name}/{step}")
        return sample_metrics(admitted) | await self._update(session, policy, cuts)

    async def run(self, session: Session) -> None:
        """Sample and improve; or train the pairs of `source`.

        Raises:
            ConfigurationError: the source has no two rollouts of one task with different returns.
        """
        if self.source is None:
            await super().run(session)
            return
        groups = await stored_groups(session, self.source)
        trained = [policy for policy in session.policies if policy.trainable]
        shown: dict[str, list[list[Transition]]] = {}
        for policy in trained:
            by_group: dict[str, list[Transition]] = {}
            for one in self._paired(await session.demonstrations(groups, policy, exact=self.exact)):
                by_group.setdefault(one.group_id, []).append(one)
            shown[policy.name] = list(by_group.values())
        if not any(shown.values()):
            raise ConfigurationError(
                f"source={self.source!r} has no pairs: none of its {len(groups)} groups has two rollouts whose returns "
                f"differ by least_gap={self.least_gap!r}; imitate the good ones instead: FineTuning(source, keep=...)"
            )
        async for step in session.steps():
            metrics: dict[str, float] = {}
            for policy in trained:
                if policy.is_trained_at(step):
                    batches = self.passes.batches(shown[policy.name], step)
                    cuts = [[call for calls in batch for call in calls] for batch in batches]
                    found = await self._update(session, policy, cuts)
                    prefix = f"{policy.name}/" if len(trained) > 1 else ""
                    metrics |= {prefix + name: value for name, value in found.items()}
            await session.finish_step(step, [], metrics)

    def _pairs(self, calls: Sequence[Transition]) -> list[Pair]:
        groups = returns_of(calls).values()
        return [pair for returns in groups for pair in pairs_of(returns, self.pairs, least_gap=self.least_gap)]

    def _paired(self, calls: Sequence[Transition]) -> list[Transition]:
        """Return the calls of rollouts that are in a pair."""
        used = {rollout for pair in self._pairs(calls) for rollout in (pair.chosen, pair.rejected)}
        return [one for one in calls if one.rollout_id in used]

    async def _update(self, session: Session, policy: Policy, cuts: Sequence[Sequence[Transition]]) -> dict[str, float]:
        """Take one optimizer step a cut, each with margins of its own; return metrics."""
        measured: list[Mapping[str, float]] = []
        for number, cut in enumerate(cuts):
            session.progress("preferences", number, len(cuts))
            calls, metrics = await self.annotate(session, policy, cut)
            batch = [Objective(loss=Loss(name="policy_gradient"), samples=mdp.samples(calls))]
            learnt = await session.update(policy, [batch])
            kept = {name: value for name, value in learnt.items() if not name.startswith(MEANINGLESS)}
            measured.append(kept | metrics)
        trained = sum(len(one.token_ids) for cut in cuts for one in cut)
        return {"tokens/trained": float(trained)} | over_batches(measured)

    async def annotate(
        self, session: Session, policy: Policy, calls: Sequence[Transition]
    ) -> tuple[list[Transition], dict[str, float]]:
        """Return the calls with the advantages and weights of the preference loss's gradient, and metrics of it."""
        spoken = [replace(one, temperature=1.0) for one in calls]
        now = await session.logprobs(policy, spoken)
        reference = await session.logprobs(policy, spoken, reference=True) if self.needs_reference else None
        sides = sides_of(spoken, now, reference)
        pairs = self._pairs(calls)
        margins = [self.margin(sides[pair.chosen], sides[pair.rejected]) for pair in pairs]
        advantages: dict[str, float] = defaultdict(float)
        for pair, margin in zip(pairs, margins, strict=True):
            push = _sigmoid(-margin)
            advantages[pair.chosen] += push * self.slope(sides[pair.chosen])
            advantages[pair.rejected] -= push * self.slope(sides[pair.rejected])
        found = [replace(one, advantage=advantages[one.rollout_id], weight=1 / len(pairs)) for one in spoken]
        return found, {
            "preference/loss": fmean(_softplus(-margin) for margin in margins),
            "preference/accuracy": fmean(float(margin > 0) for margin in margins),
            "preference/margin": fmean(margins),
            "preference/pairs": float(len(pairs)),
        }


@dataclass(frozen=True, kw_only=True)
class DPO(Preference):
    """Direct preference optimisation (Rafailov et al. 2023, equation 7), over whole rollouts.

    m = beta ((log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected))); log p is summed over the
    answers of all the policy's calls in the rollout. The reference is the weights that training began with.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive("beta", self.beta)

    def margin(self, chosen: Side, rejected: Side) -> float:
        """Return m."""
        return self.beta * (chosen.logprob - chosen.reference - rejected.logprob + rejected.reference)

    def slope(self, side: Side) -> float:
        """Return beta."""
        return self.beta


@dataclass(frozen=True, kw_only=True)
class SimPO(Preference):
    """Simple preference optimisation (Meng et al. 2024, equation 6): no reference, and long answers gain nothing.

    m = beta (log p(chosen) / |chosen| - log p(rejected) / |rejected|) - gamma, |.| the tokens of a side.
    """

    beta: float = 2.0
    gamma: float = 1.0
    """How much better the chosen one should be."""

    needs_reference = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive("beta", self.beta)
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ConfigurationError(f"gamma={self.gamma!r} must be a finite number, at least 0")

    def margin(self, chosen: Side, rejected: Side) -> float:
        """Return m."""
        return self.beta * (chosen.logprob / chosen.tokens - rejected.logprob / rejected.tokens) - self.gamma

    def slope(self, side: Side) -> float:
        """Return beta over the side's length."""
        return self.beta / side.tokens


def sides_of(
    calls: Sequence[Transition], now: Sequence[Sequence[float]], reference: Sequence[Sequence[float]] | None
) -> dict[str, Side]:
    """Return rollout -> its sums; log-probabilities are by call, aligned with its tokens."""
    sums: dict[str, float] = defaultdict(float)
    references: dict[str, float] = defaultdict(float)
    tokens: Counter[str] = Counter()
    for index, one in enumerate(calls):
        sums[one.rollout_id] += math.fsum(now[index])
        references[one.rollout_id] += 0.0 if reference is None else math.fsum(reference[index])
        tokens[one.rollout_id] += len(one.token_ids)
    return {name: Side(logprob=sums[name], reference=references[name], tokens=tokens[name]) for name in tokens}


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigurationError(f"{name}={value!r} must be a finite number above 0")


def _sigmoid(value: float) -> float:
    return math.exp(-_softplus(-value))


def _softplus(value: float) -> float:
    """Return log(1 + e^value) without overflow."""
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))
