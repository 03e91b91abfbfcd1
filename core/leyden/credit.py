"""Credit assignment: which return each call of a rollout gets.

One idea: a credit function takes a rollout's records and its transitions and returns one value a transition, in
order; anyone may write another. One trap: a reward with a target is added here, once, with its recorded value;
it is not part of `Rollout.reward`, so it never credits anything but its target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from leyden.errors import ConfigurationError
from leyden.interfaces import RolloutRecords, Transition

Credit = Callable[[RolloutRecords, Sequence[Transition]], Sequence[float]]
"""(records, transitions of the rollout) -> one value a transition, aligned."""


def broadcast(records: RolloutRecords, transitions: Sequence[Transition]) -> list[float]:
    """Give every call the rollout's reward, plus what its role or the call itself was rewarded with.

    The default of LightningRL (Luo et al. 2025, "Agent Lightning", section 3.2.2: identical credit).
    """
    return _returns(records, transitions, gamma=1.0)


def discounted(gamma: float) -> Credit:
    """Return a credit function that discounts the rewards of rollout and role by turn.

    A role's call at turn k of its K calls gets gamma^(K - 1 - k) times the reward (Sutton and Barto 2018,
    equation 3.8, with a reward at the end only). Turns are counted within a role, so that what other roles do
    meanwhile, or in parallel, discounts nothing. A reward that targets one call is not discounted.

    Raises:
        ConfigurationError: gamma outside [0, 1].
    """
    if not 0 <= gamma <= 1:
        raise ConfigurationError(f"gamma must be in [0, 1], got {gamma!r}")

    def credit(records: RolloutRecords, transitions: Sequence[Transition]) -> list[float]:
        return _returns(records, transitions, gamma=gamma)

    return credit


def _returns(records: RolloutRecords, transitions: Sequence[Transition], *, gamma: float) -> list[float]:
    total = records.rollout.reward or 0.0
    last_turn: dict[str, int] = {}
    for transition in transitions:
        last_turn[transition.role] = max(transition.turn, last_turn.get(transition.role, 0))
    of_role: dict[str, float] = {}
    for reward in records.rewards:
        if reward.target_role is not None and reward.target_span is None:
            of_role[reward.target_role] = of_role.get(reward.target_role, 0.0) + reward.value
    return [
        gamma ** (last_turn[transition.role] - transition.turn) * (total + of_role.get(transition.role, 0.0))
        + _of_call(records, transition)
        for transition in transitions
    ]


def _of_call(records: RolloutRecords, transition: Transition) -> float:
    """Sum the rewards that target this call; where it has several choices, `index` says which one."""
    aimed = [reward for reward in records.rewards if reward.target_span == transition.span_id]
    if not aimed:
        return 0.0
    several = any(
        completion.span_id == transition.span_id and len(completion.choices) > 1 for completion in records.completions
    )
    return sum(reward.value for reward in aimed if not several or reward.index == transition.choice_index)
