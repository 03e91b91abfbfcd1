"""Advantage estimators: each annotates transitions with advantages, and is about 15 lines.

All have one shape: `(transitions, groups, options) -> transitions`, in order. `Transition.value` is the return that
credit assignment gave a call; an estimator compares returns, and knows nothing of losses, weights or learners.
One trap: a baseline counts every rollout that has a reward, also those in which the policy was silent, unless rewards
of the group have targets: then what a silent rollout earned says nothing about the role.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev, stdev
from typing import Literal

from leyden.interfaces import Group, Transition
from leyden.spans import Reward

LEAST_SPREAD = 1e-6
"""Returns that differ by less are equal: only rounding tells them apart."""

Level = Literal["role", "turn"]


def returns_by_group(transitions: Sequence[Transition], groups: Sequence[Group]) -> dict[str, dict[str, float]]:
    """Return group -> rollout -> its return: the mean value of its calls, or its reward where it made none.

    Where rewards have targets (roles, calls), a total is on another scale than what calls were credited with, so
    rollouts without calls are left out.
    """
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in transitions:
        values[one.group_id][one.rollout_id].append(one.value)
    for group in groups:
        if any(has_target(reward) for records in group.rollouts for reward in records.rewards):
            continue
        for rollout in (records.rollout for records in group.rollouts):
            if rollout.reward is not None and not values[group.group_id][rollout.rollout_id]:
                values[group.group_id][rollout.rollout_id].append(rollout.reward)
    return {name: {key: fmean(some) for key, some in rollouts.items()} for name, rollouts in values.items()}


def has_target(reward: Reward) -> bool:
    """Say whether a reward is of one role or call."""
    return reward.target_role is not None or reward.target_span is not None


def with_advantages(transitions: Sequence[Transition], advantages: Iterable[float]) -> list[Transition]:
    """Return the transitions with these advantages, one a call; what is rounding only is 0."""
    return [
        replace(one, advantage=advantage if abs(advantage) > LEAST_SPREAD else 0.0)
        for one, advantage in zip(transitions, advantages, strict=True)
    ]


def returns_as_advantages(transitions: Sequence[Transition]) -> list[Transition]:
    """Set A = R: REINFORCE (Williams 1992) without a baseline."""
    return with_advantages(transitions, (one.value for one in transitions))


def group_relative(
    transitions: Sequence[Transition], groups: Sequence[Group], *, normalise_std: bool = True
) -> list[Transition]:
    """Set A = (R - mean) / std over the rollouts of a task (GRPO, DeepSeekMath, section 4.1.2).

    Without std it is Dr. GRPO's (Liu et al. 2025). std is the sample standard deviation, as in TRL; where the calls of
    a rollout have different returns it is that of all calls, whose spread the rollouts' means do not show.
    """
    returns = {name: list(some.values()) for name, some in returns_by_group(transitions, groups).items()}
    calls: dict[str, list[float]] = defaultdict(list)
    by_rollout: dict[str, set[float]] = defaultdict(set)
    for one in transitions:
        calls[one.group_id].append(one.value)
        by_rollout[one.rollout_id].add(one.value)
    varied = {one.group_id for one in transitions if len(by_rollout[one.rollout_id]) > 1}
    return with_advantages(
        transitions,
        (
            _relative(
                one.value,
                returns[one.group_id],
                normalise_std,
                spread=calls[one.group_id] if one.group_id in varied else None,
            )
            for one in transitions
        ),
    )


def _relative(
    value: float, returns: Sequence[float], normalise_std: bool, spread: Sequence[float] | None = None
) -> float:
    """Compare a value with at least two returns; fewer, or equal ones where they should scale, give no signal.

    Args:
        value: a call's return.
        returns: of the rollouts, whose mean is the baseline.
        normalise_std: divide by a standard deviation.
        spread: of these values; `None`: of the returns.
    """
    scale = returns if spread is None else spread
    if len(returns) < 2 or (normalise_std and max(scale) - min(scale) <= LEAST_SPREAD):
        return 0.0
    return (value - fmean(returns)) / (stdev(scale) if normalise_std else 1.0)


def leave_one_out(transitions: Sequence[Transition], groups: Sequence[Group]) -> list[Transition]:
    """Set A_i = R_i - mean of R_j, j != i, over the rollouts of a task (RLOO, Ahmadian et al. 2024).

    The baseline does not depend on what it judges, so the gradient is unbiased (Kool et al. 2019).
    """
    returns = returns_by_group(transitions, groups)

    def advantage(one: Transition) -> float:
        others = [value for name, value in returns[one.group_id].items() if name != one.rollout_id]
        return one.value - fmean(others) if others else 0.0

    return with_advantages(transitions, map(advantage, transitions))


def batch_normalised(
    transitions: Sequence[Transition], groups: Sequence[Group], *, group_baseline: bool
) -> list[Transition]:
    """Set A = (x - mean) / std over all tokens of the step (REINFORCE++, Hu et al. 2025).

    x is the return, or with `group_baseline` its distance to the group's mean (REINFORCE++-baseline): scaled by one
    number for all tasks, so that an easy or hard task does not blow up its small differences. std is of the
    population, as in OpenRLHF.
    """
    if group_baseline:
        centred = [one.advantage for one in group_relative(transitions, groups, normalise_std=False)]
    else:
        centred = [one.value for one in transitions]
    by_token = [x for x, one in zip(centred, transitions, strict=True) for _ in one.token_ids]
    if not by_token or max(by_token) - min(by_token) <= LEAST_SPREAD:
        return with_advantages(transitions, [0.0] * len(transitions))
    mean, scale = fmean(by_token), 1 / pstdev(by_token)
    return with_advantages(transitions, ((x - mean) * scale for x in centred))


def hierarchical(
    transitions: Sequence[Transition], groups: Sequence[Group], *, levels: Sequence[Level], normalise_std: bool = True
) -> list[Transition]:
    """Set A = (R - mean) / std over calls that had the same task, role and turn, as far as `levels` says.

    Returns of different roles or turns are not alike, so each is compared with its own kind (the step-level groups
    of GiGPO, Feng et al. 2025, with the role and turn for the state). A kind that only one rollout of
    the task reached is compared one level up; at the top, the task, it is `group_relative`.
    """

    def kind(one: Transition, depth: int) -> tuple[object, ...]:
        return (one.group_id, *(getattr(one, level) for level in levels[:depth]))

    tables: list[dict[tuple[object, ...], dict[str, float]]] = [
        {(name,): found for name, found in returns_by_group(transitions, groups).items()}
    ]
    for depth in range(1, len(levels) + 1):
        values: dict[tuple[object, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for one in transitions:
            values[kind(one, depth)][one.rollout_id].append(one.value)
        tables.append({key: {name: fmean(some) for name, some in found.items()} for key, found in values.items()})

    def advantage(one: Transition) -> float:
        finest_first = (list(tables[depth][kind(one, depth)].values()) for depth in range(len(levels), -1, -1))
        return _relative(one.value, next((some for some in finest_first if len(some) > 1), []), normalise_std)

    return with_advantages(transitions, map(advantage, transitions))


def generalised_advantages(transitions: Sequence[Transition], *, discount: float, trace: float) -> list[Transition]:
    """Set A_t = sum over l of (discount * trace)^l delta_{t+l}, delta_t = r_t + discount V_{t+1} - V_t, per token.

    GAE (Schulman et al. 2016, equation 16), with `trace` its lambda; the value head's target is A_t + V_t. Time runs
    over all tokens of a rollout, through its calls in order; V after the last is 0. Values are taken as returns to
    go: the reward at the end of call k is R_k - R_{k+1}, and R_K at the end of the last, plus each call's shaping. With
    discount 1 the rewards from k on add up to R_k; broadcast credit gives the rollout's reward once, at its end. The
    choices of one call (n > 1) stand side by side: each goes on to the next call, which sees their mean.
    """
    found = list(transitions)
    calls: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, one in enumerate(transitions):
        calls[one.rollout_id][one.span_id].append(index)
    for rollout in calls.values():
        later = _Later(advantage=0.0, value=0.0, value_to_go=0.0)
        for choices in reversed(rollout.values()):
            before = []
            for index in choices:
                found[index], left = _through_call(transitions[index], later, discount, trace)
                before.append(left)
            later = _Later(
                advantage=fmean(one.advantage for one in before),
                value=fmean(one.value for one in before),
                value_to_go=fmean(one.value_to_go for one in before),
            )
    return found


@dataclass(frozen=True, kw_only=True)
class _Later:
    """What a call's last token needs of the first token after it."""

    advantage: float
    value: float
    value_to_go: float
    """The call's return, without what only shapes it."""


def _through_call(one: Transition, later: _Later, discount: float, trace: float) -> tuple[Transition, _Later]:
    """Go through a call's tokens from its end."""
    values = one.values or [0.0] * len(one.token_ids)
    to_go = one.value - one.shaping
    reward, advantage, next_value = to_go - later.value_to_go + one.shaping, later.advantage, later.value
    advantages: list[float] = []
    for value in reversed(values):
        advantage = reward + discount * next_value - value + discount * trace * advantage
        advantages.append(advantage)
        reward, next_value = 0.0, value
    advantages.reverse()
    returns = [a + value for a, value in zip(advantages, values, strict=True)]
    done = replace(one, token_advantages=advantages, returns=returns, values=values)
    return done, _Later(advantage=advantage, value=next_value, value_to_go=to_go)


def whitened(transitions: Sequence[Transition]) -> list[Transition]:
    """Scale the step's token advantages to mean 0 and std 1 (Huang et al. 2022, "The 37
    implementation details of PPO", detail 7)."""
    every = [advantage for one in transitions for advantage in one.token_advantages or ()]
    if not every or max(every) - min(every) <= LEAST_SPREAD:
        return [replace(one, token_advantages=[0.0] * len(one.token_ids)) for one in transitions]
    mean, scale = fmean(every), 1 / pstdev(every)
    return [
        replace(one, token_advantages=[(advantage - mean) * scale for advantage in one.token_advantages or ()])
        for one in transitions
    ]
