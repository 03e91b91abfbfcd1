"""The named algorithms: each says which advantages, which loss, and what its paper sets otherwise.

`docs/algorithms.md` compares them. Defaults are the papers'; every option of `PolicyGradient` can be changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal

from leyden import mdp
from leyden.errors import ConfigurationError
from leyden.interfaces import Group, Loss, Transition
from leyden_plugins.algorithms.rl import checks, estimators
from leyden_plugins.algorithms.rl.estimators import has_target
from leyden_plugins.algorithms.rl.policy_gradient import PolicyGradient, Scene

PLAIN = Loss(name="policy_gradient")
"""-w A log p: no ratio, for one update a step."""


@dataclass(frozen=True, kw_only=True)
class Reinforce(PolicyGradient):
    """REINFORCE with a baseline (Williams 1992)."""

    baseline: Literal["group", "running", "none"] = "group"
    """`group`: the mean of the task's rollouts, this one included; `running`: the mean over earlier steps (the step's
    own at the start), which needs no groups; `none`: 0."""
    running_steps: int = 4
    """How many steps back `running` looks, in as many groups as they have like this one."""

    @property
    def compares_rollouts(self) -> bool:
        return self.baseline == "group"

    @property
    def ratio(self) -> None:
        return None

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of(self, "baseline", ("group", "running", "none"))
        checks.at_least_one(self, "running_steps")

    async def prepare(self, transitions: Sequence[Transition], scene: Scene) -> list[Transition]:
        """Take the running mean off the values. It is read from stored rollouts, so a resumed run has the same one."""
        if self.baseline != "running":
            return list(transitions)
        session, count = scene.session, self.running_steps * len(scene.groups)
        earlier = await session.replay(scene.step, count=count, max_age=self.running_steps)
        roles = {one.role for one in transitions}
        known = [one for one in session.transitions(earlier, scene.policy) if one.role in roles] or transitions
        groups = estimators.returns_by_group(known, ()).values()
        mean = fmean(value for returns in groups for value in returns.values())
        return [replace(one, value=one.value - mean) for one in transitions]

    def advantages(self, transitions: Sequence[Transition], groups: Sequence[Group]) -> list[Transition]:
        if self.baseline == "group":
            return estimators.group_relative(transitions, groups, normalise_std=False)
        return estimators.returns_as_advantages(transitions)

    def loss(self) -> Loss:
        return PLAIN


@dataclass(frozen=True, kw_only=True)
class RLOO(PolicyGradient):
    """REINFORCE leave-one-out (Ahmadian et al. 2024): the unbiased group baseline."""

    @property
    def ratio(self) -> None:
        return None

    def advantages(self, transitions: Sequence[Transition], groups: Sequence[Group]) -> list[Transition]:
        return estimators.leave_one_out(transitions, groups)

    def loss(self) -> Loss:
        return PLAIN


@dataclass(frozen=True, kw_only=True)
class Clipped(PolicyGradient):
    """What shares PPO's clipped ratio to the weights at the step's start (Schulman et al. 2017, equation 7)."""

    clip: float = 0.2
    """The ratio's gain is cut below 1 - clip."""
    clip_high: float | None = None
    """And above 1 + clip_high; `None` takes `clip`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.in_range(self, "clip", 0, 1, open_low=True)
        if self.clip_high is not None:
            checks.in_range(self, "clip_high", 0, math.inf, open_low=True)

    def clips(self) -> dict[str, float]:
        """Return the options of a loss that clips."""
        return {"clip_low": self.clip, "clip_high": self.clip if self.clip_high is None else self.clip_high}

    def loss(self) -> Loss:
        return Loss(name="policy_gradient_clip", options=self.clips())


@dataclass(frozen=True, kw_only=True)
class GRPO(Clipped):
    """Group relative policy optimisation (DeepSeekMath, Shao et al. 2024)."""

    normalise_std: bool = True
    """False subtracts the group's mean only."""

    def advantages(self, transitions: Sequence[Transition], groups: Sequence[Group]) -> list[Transition]:
        return estimators.group_relative(transitions, groups, normalise_std=self.normalise_std)


@dataclass(frozen=True, kw_only=True)
class DrGRPO(GRPO):
    """GRPO done right (Dr. GRPO, Liu et al. 2025): no std, and a constant in place of each rollout's length."""

    normalise_std: bool = False
    normalisation: mdp.Normalisation = "dr_grpo"
    rollout_tokens: int | None = 1024
    """Only the size of the gradient depends on it; take the most tokens that a rollout may generate."""


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus(Clipped):
    """REINFORCE++ (Hu et al. 2025): advantages scaled over the whole step, and PPO's clip."""

    group_baseline: bool = True
    """True is REINFORCE++-baseline: the group's mean is subtracted first. False needs no groups."""
    normalisation: mdp.Normalisation = "token_mean"

    @property
    def compares_rollouts(self) -> bool:
        return self.group_baseline

    def advantages(self, transitions: Sequence[Transition], groups: Sequence[Group]) -> list[Transition]:
        return estimators.batch_normalised(transitions, groups, group_baseline=self.group_baseline)


@dataclass(frozen=True, kw_only=True)
class PPO(Clipped):
    """Proximal policy optimisation with a value head (Schulman et al. 2017) and GAE over a rollout's tokens.

    Values are taken as returns to go, so rewards of roles and calls want `credit="per-turn"`.
    """

    normalisation: mdp.Normalisation = "token_mean"
    discount: float = 1.0
    """gamma, per token."""
    trace: float = 0.95
    """lambda of GAE, per token: 1 trusts returns only, 0 values only."""
    whiten: bool = True
    """Scale the step's advantages to mean 0 and std 1; where nearly all rewards are equal, it is noise that grows."""
    value_coefficient: float = 0.5
    value_clip: float | None = 0.2
    """How far a value may move in a step; `None`: any."""

    @property
    def compares_rollouts(self) -> bool:
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.in_range(self, "discount", 0, 1, open_low=True)
        checks.in_range(self, "trace", 0, 1)
        checks.in_range(self, "value_coefficient", 0, math.inf, open_low=True)
        if self.value_clip is not None:
            checks.in_range(self, "value_clip", 0, math.inf, open_low=True)

    async def prepare(self, transitions: Sequence[Transition], scene: Scene) -> list[Transition]:
        """Ask the value head."""
        values = await scene.session.values(scene.policy, transitions)
        return [replace(one, values=some) for one, some in zip(transitions, values, strict=True)]

    def advantages(self, transitions: Sequence[Transition], groups: Sequence[Group]) -> list[Transition]:
        found = estimators.generalised_advantages(transitions, discount=self.discount, trace=self.trace)
        return estimators.whitened(found) if self.whiten else found

    def loss(self) -> Loss:
        return replace(super().loss(), value_coefficient=self.value_coefficient, value_clip=self.value_clip)


@dataclass(frozen=True, kw_only=True)
class HierarchicalGRPO(GRPO):
    """GRPO in groups of task x role x turn: a call is compared with calls of its kind."""

    levels: Sequence[estimators.Level] = ("role", "turn")
    """Below the task, coarse to fine; `()` is GRPO."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            isinstance(self.levels, str)
            or not set(self.levels) <= {"role", "turn"}
            or len(set(self.levels)) < len(self.levels)
        ):
            raise ConfigurationError(f"levels={self.levels!r} must be a list of 'role' and 'turn', each at most once")

    def advantages(self, transitions: Sequence[Transition], groups: Sequence[Group]) -> list[Transition]:
        return estimators.hierarchical(transitions, groups, levels=self.levels, normalise_std=self.normalise_std)


@dataclass(frozen=True, kw_only=True)
class LightningRL(PolicyGradient):
    """LightningRL (Luo et al. 2025, "Agent Lightning", arXiv 2508.03680, section 3.2.2): credit in two levels.

    Level 1, calls: credit assignment shares the episode's return out to its calls. It is `Trainer(credit=...)`, whose
    default, broadcast, is the paper's: every call gets the whole return. Level 2, tokens: every call is an episode of
    its own, in the group of its task, and an algorithm made for single calls gives its tokens their advantages.
    """

    token_level: PolicyGradient = field(default_factory=GRPO)
    """Level 2: advantages and loss. Its other options are set here."""
    normalisation: mdp.Normalisation = "token_mean"

    @property
    def compares_rollouts(self) -> bool:
        return self.token_level.compares_rollouts

    @property
    def ratio(self) -> Literal["token", "call"] | None:
        return self.token_level.ratio

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.check_inner(self, self.token_level, where="token_level", shared=checks.OF_THE_STEP + checks.OF_THE_CALL)

    async def prepare(self, transitions: Sequence[Transition], scene: Scene) -> list[Transition]:
        """Give level 2 what it asks for."""
        return await self.token_level.prepare(transitions, scene)

    def advantages(self, transitions: Sequence[Transition], groups: Sequence[Group]) -> list[Transition]:
        """Level 2: return the advantages of each call within its group of calls."""
        calls = [replace(one, rollout_id=f"{one.span_id}/{one.choice_index}") for one in transitions]
        found = self.token_level.advantages(calls, ())
        return [replace(call, rollout_id=one.rollout_id) for call, one in zip(found, transitions, strict=True)]

    def loss(self) -> Loss:
        return self.token_level.loss()


@dataclass(frozen=True, kw_only=True)
class DAPO(GRPO):
    """DAPO (Yu et al. 2025): clip-higher, dynamic sampling, the mean over tokens, and `overlong` where it is given."""

    clip_high: float | None = 0.28
    normalisation: mdp.Normalisation = "token_mean"
    most_batches: int = 3
    """How many times a step's tasks may be sampled to fill it with groups that have a signal (equation 11)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least_one(self, "most_batches")

    def accepts(self, group: Group) -> bool:
        """Accept a group whose totals, or rewards of roles and calls, are not all equal."""
        scored = [one for one in group.rollouts if one.rollout.reward is not None]
        totals = [one.rollout.reward or 0.0 for one in scored]
        aimed = {
            tuple((reward.name, reward.target_role, reward.value) for reward in one.rewards if has_target(reward))
            for one in scored
        }
        return bool(scored) and (max(totals) - min(totals) > estimators.LEAST_SPREAD or len(aimed) > 1)


@dataclass(frozen=True, kw_only=True)
class GSPO(GRPO):
    """Group sequence policy optimisation (Zheng et al. 2025): one ratio a call, the geometric mean over its tokens."""

    clip: float = 3e-4
    clip_high: float | None = 4e-4
    normalisation: mdp.Normalisation = "per_call"

    @property
    def ratio(self) -> Literal["call"]:
        return "call"

    def loss(self) -> Loss:
        return Loss(name="gspo", options=self.clips())


@dataclass(frozen=True, kw_only=True)
class CISPO(GRPO):
    """CISPO (MiniMax-M1, 2025, equations 4 and 5): the ratio is clipped as a weight, so no token loses its gradient."""

    clip: float = 1.0
    """1 leaves the lower side open, as in the paper."""
    clip_high: float | None = 4.0
    """The largest weight is 1 + clip_high."""
    normalisation: mdp.Normalisation = "token_mean"

    def loss(self) -> Loss:
        return Loss(name="cispo", options=self.clips())
