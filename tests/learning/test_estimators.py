"""Advantage estimators against closed forms, brute force, and the true gradient of a bandit that can be enumerated."""

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

import numpy
import pytest

from leyden import mdp
from leyden.errors import ConfigurationError
from leyden.interfaces import Group, Transition
from leyden_plugins.algorithms.rl import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    PPO,
    RLOO,
    DrGRPO,
    HierarchicalGRPO,
    LightningRL,
    PolicyGradient,
    Reinforce,
    ReinforcePlusPlus,
)
from leyden_plugins.algorithms.rl.estimators import generalised_advantages, whitened
from leyden_plugins.algorithms.rl.shaping import Overlong, punish_length
from tests.learning.builders import records, reward, transition


def episode(rng: random.Random, group_id: str, number: int) -> list[Transition]:
    """Return a rollout's calls, of two roles that take turns a random number of times; values differ by call."""
    rollout_id = f"{group_id}-{number}"
    calls: list[Transition] = []
    for turn in range(rng.randint(1, 3)):
        for role in ("writer", "checker"):
            length = rng.randint(1, 4)
            calls.append(
                replace(
                    transition(
                        tokens=[rng.randrange(9) for _ in range(length)],
                        rollout_id=rollout_id,
                        group_id=group_id,
                        role=role,
                        span_id=f"{rollout_id}-{role}-{turn}",
                        turn=turn,
                        value=rng.uniform(-1, 1),
                    ),
                    values=[rng.uniform(-1, 1) for _ in range(length)],
                )
            )
    return calls


def episodes(*, seed: int = 0, tasks: int = 3, rollouts: int = 4) -> list[Transition]:
    rng = random.Random(seed)
    return [one for task in range(tasks) for number in range(rollouts) for one in episode(rng, f"g{task}", number)]


def advantages(algorithm: PolicyGradient, transitions: Sequence[Transition]) -> list[float]:
    return [one.advantage for one in algorithm.advantages(transitions, ())]


def returns_of_task(transitions: Sequence[Transition], group_id: str) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for one in transitions:
        if one.group_id == group_id:
            values[one.rollout_id].append(one.value)
    return {name: float(numpy.mean(some)) for name, some in values.items()}


# ---- one call, one number ----------------------------------------------------------------------------------------


def test_reinforce_subtracts_the_mean_of_the_task_or_nothing() -> None:
    calls = episodes()
    means = {name: numpy.mean(list(returns_of_task(calls, name).values())) for name in ("g0", "g1", "g2")}
    assert advantages(Reinforce(), calls) == pytest.approx([one.value - means[one.group_id] for one in calls])
    assert advantages(Reinforce(baseline="none"), calls) == pytest.approx([one.value for one in calls])


@pytest.mark.parametrize("algorithm", [GRPO(), DAPO(), GSPO(), CISPO()])
def test_grpo_and_what_is_built_on_it_give_the_standard_score_in_the_task(algorithm: PolicyGradient) -> None:
    calls = episodes()

    def score(one: Transition) -> float:
        returns = list(returns_of_task(calls, one.group_id).values())
        # The calls of a rollout differ here, so the spread is that of all calls.
        spread = [other.value for other in calls if other.group_id == one.group_id]
        return float((one.value - numpy.mean(returns)) / numpy.std(spread, ddof=1))

    assert advantages(algorithm, calls) == pytest.approx([score(one) for one in calls])


def test_the_scale_of_one_return_a_rollout_is_that_of_the_rollouts() -> None:
    calls = [transition(rollout_id=f"r{n}", span_id=f"s{n}{k}", value=n) for n in (0.0, 1.0, 3.0) for k in range(2)]
    expected = [(one.value - 4 / 3) / numpy.std([0.0, 1.0, 3.0], ddof=1) for one in calls]
    assert advantages(GRPO(), calls) == pytest.approx(expected)


def test_dr_grpo_has_no_std_and_divides_by_a_constant() -> None:
    calls = episodes()
    assert advantages(DrGRPO(), calls) == pytest.approx(advantages(Reinforce(), calls))
    algorithm = DrGRPO(rollout_tokens=50)
    weighed = mdp.weigh(calls, algorithm.normalisation, rollout_tokens=algorithm.rollout_tokens)
    assert {one.weight for one in weighed} == {1 / (50 * 12)}


def test_rloo_compares_with_the_mean_of_the_others() -> None:
    calls = episodes()

    def score(one: Transition) -> float:
        returns = returns_of_task(calls, one.group_id)
        return one.value - fmean(value for name, value in returns.items() if name != one.rollout_id)

    assert advantages(RLOO(), calls) == pytest.approx([score(one) for one in calls])


def test_with_one_call_a_rollout_rloo_is_the_group_mean_scaled() -> None:
    rng = random.Random(1)
    calls = [transition(rollout_id=f"r{number}", value=rng.random()) for number in range(5)]
    assert advantages(RLOO(), calls) == pytest.approx([5 / 4 * one for one in advantages(Reinforce(), calls)])


@pytest.mark.parametrize("group_baseline", [True, False])
def test_reinforce_plus_plus_scales_over_all_tokens_of_the_step(group_baseline: bool) -> None:
    calls = episodes()
    centred = [one.value for one in calls]
    if group_baseline:
        centred = [one.value - float(numpy.mean(list(returns_of_task(calls, one.group_id).values()))) for one in calls]
    by_token = numpy.repeat(centred, [len(one.token_ids) for one in calls])
    expected = (numpy.array(centred) - by_token.mean()) / by_token.std()
    assert advantages(ReinforcePlusPlus(group_baseline=group_baseline), calls) == pytest.approx(expected.tolist())


# ---- hierarchical groups -----------------------------------------------------------------------------------------


def test_hierarchical_groups_compare_calls_of_one_task_role_and_turn() -> None:
    calls = episodes(rollouts=6)
    found = advantages(HierarchicalGRPO(), calls)
    checked = 0
    for one, advantage in zip(calls, found, strict=True):
        alike = [
            other.value
            for other in calls
            if (other.group_id, other.role, other.turn) == (one.group_id, one.role, one.turn)
        ]
        if len(alike) > 1:
            assert advantage == pytest.approx((one.value - numpy.mean(alike)) / numpy.std(alike, ddof=1))
            checked += 1
    assert checked > len(calls) / 2


def test_a_turn_that_only_one_rollout_reached_is_compared_with_the_role_in_the_task() -> None:
    calls = [
        transition(rollout_id="a", turn=0, value=1.0),
        transition(rollout_id="a", turn=1, value=3.0),
        transition(rollout_id="b", turn=0, value=0.0),
        transition(rollout_id="b", role="checker", value=9.0),
    ]
    found = advantages(HierarchicalGRPO(normalise_std=False), calls)
    # The writer's returns are 2 (the mean of 1 and 3) and 0; the checker spoke once, so its task is what is left:
    # there a returned 2, and b 4.5.
    assert found == pytest.approx([0.5, 2.0, -0.5, 9.0 - 3.25])


@pytest.mark.parametrize("levels", [(), ("role",), ("turn",), ("turn", "role")])
def test_levels_choose_what_is_compared(levels: Sequence[str]) -> None:
    calls = episodes(rollouts=8)
    found = advantages(HierarchicalGRPO(levels=levels, normalise_std=False), calls)  # type: ignore[arg-type]

    def alike(one: Transition, depth: int) -> list[float]:
        by_rollout: dict[str, list[float]] = defaultdict(list)
        for other in calls:
            key = [getattr(other, level) == getattr(one, level) for level in levels[:depth]]
            if other.group_id == one.group_id and all(key):
                by_rollout[other.rollout_id].append(other.value)
        return [fmean(some) for some in by_rollout.values()]

    def score(one: Transition) -> float:
        kind = next(found for depth in range(len(levels), -1, -1) if len(found := alike(one, depth)) > 1)
        return one.value - fmean(kind)

    assert found == pytest.approx([score(one) for one in calls])
    if not levels:
        assert found == pytest.approx(advantages(GRPO(normalise_std=False), calls))


# ---- values ------------------------------------------------------------------------------------------------------


def flat(transitions: Sequence[Transition], discount: float, trace: float) -> list[float]:
    """Return a rollout's token advantages as the direct sum of residuals, all tokens in one row."""
    rewards: list[float] = []
    values: list[float] = []
    for number, one in enumerate(transitions):
        later = transitions[number + 1].value if number + 1 < len(transitions) else 0.0
        rewards += [0.0] * (len(one.token_ids) - 1) + [one.value - later]
        values += one.values or []
    ends = [*values[1:], 0.0]
    residuals = [r + discount * after - v for r, v, after in zip(rewards, values, ends, strict=True)]
    return [
        sum((discount * trace) ** step * residual for step, residual in enumerate(residuals[start:]))
        for start in range(len(residuals))
    ]


@pytest.mark.parametrize(("discount", "trace"), [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)])
def test_generalised_advantages_are_the_sum_of_the_residuals(discount: float, trace: float) -> None:
    first, second = episode(random.Random(1), "g0", 0), episode(random.Random(2), "g0", 1)
    found = generalised_advantages([*first, *second], discount=discount, trace=trace)
    tokens = [advantage for one in found for advantage in one.token_advantages or ()]
    assert tokens == pytest.approx(flat(first, discount, trace) + flat(second, discount, trace))
    for one in found:
        expected = [a + v for a, v in zip(one.token_advantages or (), one.values or (), strict=True)]
        assert one.returns == pytest.approx(expected)


def test_without_discount_and_with_a_full_trace_every_token_gets_its_calls_return_less_its_value() -> None:
    for one in generalised_advantages(episodes(), discount=1.0, trace=1.0):
        assert one.token_advantages == pytest.approx([one.value - value for value in one.values or ()])


def test_broadcast_credit_gives_the_episodes_reward_once() -> None:
    calls = [replace(one, value=1.0, values=None) for one in episode(random.Random(1), "g0", 0)]
    assert len(calls) > 1
    for one in generalised_advantages(calls, discount=1.0, trace=1.0):
        assert one.returns == pytest.approx([1.0] * len(one.token_ids))


def test_whitened_advantages_have_mean_0_and_std_1_over_tokens() -> None:
    found = generalised_advantages(episodes(), discount=1.0, trace=0.95)
    raw = numpy.array([a for one in found for a in one.token_advantages or ()])
    white = [a for one in whitened(found) for a in one.token_advantages or ()]
    assert white == pytest.approx(((raw - raw.mean()) / raw.std()).tolist())


# ---- LightningRL -------------------------------------------------------------------------------------------------


def test_lightning_level_2_takes_calls_for_episodes_of_the_task() -> None:
    calls = episodes()

    def score(one: Transition) -> float:
        values = [other.value for other in calls if other.group_id == one.group_id]
        return float((one.value - numpy.mean(values)) / numpy.std(values, ddof=1))

    found = LightningRL().advantages(calls, ())
    assert [one.advantage for one in found] == pytest.approx([score(one) for one in calls])
    assert [one.rollout_id for one in found] == [one.rollout_id for one in calls]


def test_lightning_with_values_sees_no_further_than_a_call() -> None:
    calls = episodes()
    algorithm = LightningRL(token_level=PPO(whiten=False, trace=0.5, discount=0.9))
    expected = [advantage for one in calls for advantage in flat([one], 0.9, 0.5)]
    found = algorithm.advantages(calls, ())
    assert [a for one in found for a in one.token_advantages or ()] == pytest.approx(expected)
    assert algorithm.loss().value_coefficient == 0.5


# ---- properties --------------------------------------------------------------------------------------------------

GROUP_RELATIVE: list[PolicyGradient] = [
    Reinforce(),
    GRPO(),
    DrGRPO(),
    RLOO(),
    ReinforcePlusPlus(),
    HierarchicalGRPO(),
    LightningRL(),
    DAPO(),
    GSPO(),
    CISPO(),
]


def name_of(value: object) -> str:
    return type(value).__name__


@pytest.mark.parametrize("algorithm", GROUP_RELATIVE, ids=name_of)
def test_a_constant_added_to_the_rewards_of_a_task_changes_nothing(algorithm: PolicyGradient) -> None:
    calls = episodes()
    shifted = [replace(one, value=one.value + (5.0 if one.group_id == "g1" else 0.0)) for one in calls]
    assert advantages(algorithm, shifted) == pytest.approx(advantages(algorithm, calls))


@pytest.mark.parametrize("algorithm", GROUP_RELATIVE, ids=name_of)
def test_equal_rewards_give_no_signal(algorithm: PolicyGradient) -> None:
    calls = [replace(one, value=0.1 + 0.2 if number % 2 else 0.3) for number, one in enumerate(episodes())]
    assert set(advantages(algorithm, calls)) == {0.0}


# ---- the gradient of a bandit, every group of answers enumerated -------------------------------------------------

LOGITS = [0.3, -0.5, 0.9]
REWARDS = [1.0, 0.2, -0.4]
PROBABILITIES = [math.exp(one) / sum(map(math.exp, LOGITS)) for one in LOGITS]


def true_gradient() -> list[float]:
    """Return d/d logits of the expected reward: p (r - E r)."""
    mean = sum(p * r for p, r in zip(PROBABILITIES, REWARDS, strict=True))
    return [p * (r - mean) for p, r in zip(PROBABILITIES, REWARDS, strict=True)]


def score(action: int) -> list[float]:
    """Return d log p(action) / d logits."""
    return [(1.0 if index == action else 0.0) - p for index, p in enumerate(PROBABILITIES)]


def expected_gradient(
    estimate: Callable[[list[Transition]], Sequence[Transition]],
    *,
    group_size: int,
    drawn_with: Sequence[float] = PROBABILITIES,
) -> list[float]:
    """Return the mean of (1 / n) sum A grad log p over every group of `group_size` answers, exactly."""
    total = [0.0] * len(LOGITS)
    for actions in itertools.product(range(len(LOGITS)), repeat=group_size):
        calls = [
            transition(
                tokens=[action], rollout_id=f"r{n}", value=REWARDS[action], logprobs=[math.log(drawn_with[action])]
            )
            for n, action in enumerate(actions)
        ]
        chance = math.prod(drawn_with[action] for action in actions)
        for one, action in zip(estimate(calls), actions, strict=True):
            correction = one.corrections[0] if one.corrections else 1.0
            for index, part in enumerate(score(action)):
                total[index] += chance * correction * one.advantage * part / group_size
    return total


@pytest.mark.parametrize("group_size", [2, 3])
def test_rloo_is_unbiased(group_size: int) -> None:
    found = expected_gradient(lambda calls: RLOO().advantages(calls, ()), group_size=group_size)
    assert found == pytest.approx(true_gradient())


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize("algorithm", [Reinforce(), DrGRPO()], ids=name_of)
def test_a_baseline_that_counts_the_rollout_itself_scales_the_gradient(
    algorithm: PolicyGradient, group_size: int
) -> None:
    found = expected_gradient(lambda calls: algorithm.advantages(calls, ()), group_size=group_size)
    assert found == pytest.approx([(group_size - 1) / group_size * one for one in true_gradient()])


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_reinforce_and_ppo_are_unbiased_whatever_the_baseline(value: float) -> None:
    def with_values(calls: list[Transition]) -> list[Transition]:
        found = PPO(whiten=False, trace=1.0).advantages([replace(one, values=[value]) for one in calls], ())
        return [replace(one, advantage=(one.token_advantages or [0.0])[0]) for one in found]

    shifted = Reinforce(baseline="none")
    moved = expected_gradient(
        lambda calls: shifted.advantages([replace(one, value=one.value - value) for one in calls], ()), group_size=2
    )
    assert moved == pytest.approx(true_gradient())
    assert expected_gradient(with_values, group_size=2) == pytest.approx(true_gradient())


def test_the_std_of_grpo_changes_the_direction_of_the_gradient() -> None:
    found = expected_gradient(lambda calls: GRPO().advantages(calls, ()), group_size=3)
    ratios = [one / true for one, true in zip(found, true_gradient(), strict=True)]
    assert max(ratios) / min(ratios) > 1.05


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", ["role", ("role", "role"), ("task",)])
def test_levels_that_are_none_are_refused(levels: object) -> None:
    with pytest.raises(ConfigurationError, match="levels="):
        HierarchicalGRPO(levels=levels)  # type: ignore[arg-type]


def test_a_punishment_of_one_call_is_no_reward_of_the_call_before_it() -> None:
    calls = [
        replace(transition(tokens=[1] * 4, span_id="short", value=0.0), values=[0.0] * 4),
        replace(transition(tokens=[1] * 60, span_id="long", value=0.0), values=[0.0] * 60),
    ]
    shaped = punish_length(calls, Overlong(longest=60, margin=20))
    assert [one.value for one in shaped] == [0.0, -1.0]
    short, long = generalised_advantages(shaped, discount=1.0, trace=1.0)
    assert set(long.token_advantages or ()) == {-1.0}
    assert set(short.token_advantages or ()) == {-1.0}  # what follows it; with no trace it hears nothing of it
    short, long = generalised_advantages(shaped, discount=1.0, trace=0.0)
    assert set(short.token_advantages or ()) == {0.0}
    assert list(long.token_advantages or ()) == [0.0] * 59 + [-1.0]


def test_choices_of_one_call_stand_side_by_side() -> None:
    good, bad = (
        replace(transition(tokens=[1, 2], choice_index=index, value=value), values=[0.0, 0.0])
        for index, value in enumerate((1.0, -1.0))
    )
    found = generalised_advantages([good, bad], discount=1.0, trace=0.5)
    assert [list(one.token_advantages or ()) for one in found] == [[0.5, 1.0], [-0.5, -1.0]]
    first = replace(transition(tokens=[3], span_id="first", value=0.0), values=[0.25])
    before, *_ = generalised_advantages([first, good, bad], discount=1.0, trace=0.5)
    assert list(before.token_advantages or ()) == [-0.25]  # the choices' returns and residuals cancel


def test_a_rollout_without_calls_is_no_baseline_where_rewards_have_targets() -> None:
    spoke = [transition(rollout_id=f"r{number}", value=value) for number, value in enumerate((0.2, -0.2))]
    silent = [records(total=10.0, rollout_id=f"q{number}") for number in range(2)]
    aimed = records(total=10.0, rollout_id="r0", rewards=[reward(0.2, role="writer")])
    plain, targeted = (
        Group(group_id="g0", task={}, rollouts=[first, *silent]) for first in (records(total=10.0), aimed)
    )
    algorithm = GRPO(normalise_std=False)
    assert [one.advantage for one in algorithm.advantages(spoke, [targeted])] == pytest.approx([0.2, -0.2])
    assert [one.advantage for one in algorithm.advantages(spoke, [plain])] == pytest.approx([-4.8, -5.2])


def test_dapo_accepts_a_group_whose_calls_earned_different_rewards() -> None:
    def group_of(*values: float) -> Group:
        rollouts = [
            records(total=0.0, rollout_id=f"r{number}", rewards=[reward(value, span="s", rollout_id=f"r{number}")])
            for number, value in enumerate(values)
        ]
        return Group(group_id="g0", task={}, rollouts=rollouts)

    assert DAPO().accepts(group_of(0.0, 1.0))
    assert not DAPO().accepts(group_of(1.0, 1.0))
