"""Rewards become the returns of calls."""

import pytest

from leyden import mdp
from leyden.credit import Credit, broadcast, discounted
from leyden.errors import ConfigurationError
from leyden.interfaces import RolloutRecords
from leyden.spans import Reward
from tests.learning.builders import POLICY, call, choice, records, reward


def rollout(*rewards: Reward, total: float = 2.0) -> RolloutRecords:
    """Return a rollout in which the writer speaks three times and the rewriter once, in between."""
    return records(
        call([1], choice([9]), span_id="w0", start_ns=0),
        call([2], choice([9]), span_id="x0", role="rewriter", start_ns=1),
        call([3], choice([9]), span_id="w1", start_ns=2),
        call([4], choice([9]), span_id="w2", start_ns=3),
        total=total,
        rewards=rewards,
    )


def values(one: RolloutRecords, credit: Credit = broadcast) -> dict[str, float]:
    return {each.span_id: each.value for each in mdp.transitions(one, [POLICY], credit=credit)}


def test_broadcast_gives_every_call_the_total() -> None:
    assert values(rollout()) == {"w0": 2.0, "x0": 2.0, "w1": 2.0, "w2": 2.0}


def test_a_reward_of_a_role_credits_only_its_calls() -> None:
    assert values(rollout(reward(0.5, role="rewriter"))) == {"w0": 2.0, "x0": 2.5, "w1": 2.0, "w2": 2.0}


def test_a_reward_of_a_span_credits_only_that_call() -> None:
    assert values(rollout(reward(-1.0, span="w1"))) == {"w0": 2.0, "x0": 2.0, "w1": 1.0, "w2": 2.0}


def test_an_untargeted_reward_is_in_the_total_and_not_counted_again() -> None:
    assert values(rollout(reward(2.0)))["w0"] == 2.0


def test_a_reward_of_one_of_several_choices_credits_that_choice() -> None:
    one = records(
        call([1], choice([2], index=0), choice([3], index=1)),
        rewards=[reward(0.25, span="s0", index=0), reward(0.75, span="s0", index=1)],
        total=1.0,
    )
    assert [each.value for each in mdp.transitions(one, [POLICY])] == [1.25, 1.75]


def test_discounting_counts_the_turns_of_each_role() -> None:
    assert values(rollout(), discounted(0.5)) == {"w0": 0.5, "x0": 2.0, "w1": 1.0, "w2": 2.0}


def test_discounting_reaches_role_rewards_but_not_span_rewards() -> None:
    one = rollout(reward(2.0, role="writer"), reward(1.0, span="w0"))
    assert values(one, discounted(0.5)) == {"w0": 2.0, "x0": 2.0, "w1": 2.0, "w2": 4.0}


def test_discount_one_is_broadcast() -> None:
    one = rollout(reward(2.0, role="writer"), reward(1.0, span="w0"))
    assert values(one, discounted(1.0)) == values(one)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_a_discount_outside_0_to_1_is_refused(gamma: float) -> None:
    with pytest.raises(ConfigurationError, match=r"gamma must be in \[0, 1\]"):
        discounted(gamma)
