"""Rewards become the returns of calls."""

from collections.abc import Callable, Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leyden import mdp
from leyden.credit import Credit, broadcast, discounted, per_role, per_turn
from leyden.errors import ConfigurationError, RewardError
from leyden.interfaces import RolloutRecords, Transition
from leyden.plugins import load_plugins
from leyden.rewards import total
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


def named(value: float, name: str, *, role: str | None = None, span: str | None = None) -> Reward:
    return msgspec.structs.replace(reward(value, role=role, span=span), name=name)


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


def test_rewards_to_go_credit_a_call_with_its_own_and_later_turn_rewards_of_its_role() -> None:
    one = rollout(reward(1.0, span="w0"), reward(10.0, span="w2"), reward(100.0, span="x0"), total=0.0)
    assert values(one, per_turn()) == {"w0": 11.0, "x0": 100.0, "w1": 10.0, "w2": 10.0}


def test_rewards_to_go_discount_what_comes_later_and_the_total_as_the_end() -> None:
    one = rollout(reward(1.0, span="w0"), reward(10.0, span="w2"), reward(4.0, role="writer"), total=8.0)
    # G_k by its recursion G_k = r_k + gamma G_(k+1), with total and role reward in the last step (equation 3.9).
    last = 10.0 + 12.0
    middle = 0.0 + 0.5 * last
    assert values(one, per_turn(0.5)) == {"w2": last, "w1": middle, "w0": 1.0 + 0.5 * middle, "x0": 8.0}


def test_rewards_to_go_across_roles_follow_the_order_of_all_calls() -> None:
    one = rollout(reward(1.0, span="x0"), reward(10.0, span="w2"), total=0.0)
    assert values(one, per_turn(0.5, across_roles=True)) == {"w0": 0.5 + 1.25, "x0": 1.0 + 2.5, "w1": 5.0, "w2": 10.0}


def test_rewards_to_go_of_a_call_that_is_not_trained_still_credit_the_calls_before_it() -> None:
    one = records(
        call([1], choice([9]), span_id="w0", start_ns=0),
        call([2], choice([9], finish_reason="length"), span_id="w1", start_ns=1),
        rewards=[reward(-3.0, span="w1")],
        total=0.0,
    )
    found = mdp.transitions(one, [POLICY], credit=per_turn(), mask_overlong=True)
    assert [(each.span_id, each.value) for each in found] == [("w0", -3.0)]


def test_rewards_to_go_without_turn_rewards_are_the_discounted_total() -> None:
    one = rollout(reward(2.0, role="writer"))
    assert values(one, per_turn(0.5)) == values(one, discounted(0.5))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(-8, 8)), min_size=1, max_size=6),
    st.integers(-8, 8),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_rewards_to_go_obey_the_recursion(said: list[tuple[str, int]], total: int, gamma: float) -> None:
    calls = [call([k], choice([9]), span_id=f"s{k}", role=role, start_ns=k) for k, (role, _) in enumerate(said)]
    aimed = [reward(float(value), span=f"s{k}") for k, (_, value) in enumerate(said)]
    found = values(records(*calls, rewards=aimed, total=float(total)), per_turn(gamma))
    for role in "ab":
        to_go = float(total)
        own = [(k, value) for k, (speaker, value) in enumerate(said) if speaker == role]
        for number, (k, value) in enumerate(reversed(own)):
            to_go = value + (to_go if number == 0 else gamma * to_go)
            assert found[f"s{k}"] == to_go


def test_per_role_gives_a_role_its_own_rewards_and_a_role_without_any_the_total() -> None:
    one = rollout(reward(0.5, role="rewriter"), reward(0.25, role="rewriter", index=1), reward(-1.0, span="w1"))
    assert values(one, per_role) == {"w0": 2.0, "x0": 0.75, "w1": 1.0, "w2": 2.0}


def test_a_users_function_sees_weighted_rewards() -> None:
    def own(records: RolloutRecords, transitions: Sequence[Transition]) -> list[float]:
        return [sum(one.value for one in records.rewards)] * len(transitions)

    one = rollout(named(1.0, "reward"), named(4.0, "format"), named(8.0, "style", role="writer"))
    found = mdp.transitions(one, [POLICY], credit=own, reward_weights={"reward": 1.0, "style": 0.5})
    assert {each.value for each in found} == {1.0 + 4.0}


def test_a_function_that_returns_too_few_values_is_refused() -> None:
    with pytest.raises(RewardError, match="returned 1 values for the 4 calls of rollout 'r0'"):
        mdp.transitions(rollout(), [POLICY], credit=lambda records, transitions: [0.0])


def test_a_function_that_returns_what_is_no_number_is_refused() -> None:
    with pytest.raises(RewardError, match=r"returned \[nan, nan, nan, nan\] for rollout 'r0'"):
        mdp.transitions(rollout(), [POLICY], credit=lambda records, transitions: [float("nan")] * 4)


@pytest.mark.parametrize("credit", [broadcast, discounted(1.0), per_turn(), per_role])
def test_targeted_rewards_are_weighted_by_name(credit: Credit) -> None:
    one = rollout(
        named(1.0, "reward", span="w2"),
        named(1.0, "style", span="w2"),
        named(1.0, "latency", span="w2"),
        named(1.0, "unheard", span="w2"),
        total=0.0,
    )
    weights = {"reward": 10.0, "style": 0.5, "latency": 0.0}
    found = mdp.transitions(one, [POLICY], credit=credit, reward_weights=weights)
    # A name without a weight counts as it is; one of weight 0 is measured only.
    assert found[-1].value == 10.0 + 0.5 + 1.0


def test_the_names_of_assignments_stand_for_functions() -> None:
    plugins = load_plugins()
    one = rollout(reward(1.0, span="w2"), reward(5.0, role="writer"), total=0.0)
    found = {name: values(one, plugins.get("credit", name)) for name in plugins.names("credit")}  # type: ignore[arg-type]
    assert found["broadcast"] == {"w0": 5.0, "x0": 0.0, "w1": 5.0, "w2": 6.0}
    assert found["per-turn"] == {"w0": 6.0, "x0": 0.0, "w1": 6.0, "w2": 6.0}
    assert found["per-role"] == {"w0": 5.0, "x0": 0.0, "w1": 5.0, "w2": 6.0}


@pytest.mark.parametrize("make", [discounted, per_turn])
@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_a_discount_outside_0_to_1_is_refused(make: Callable[[float], Credit], gamma: float) -> None:
    with pytest.raises(ConfigurationError, match=r"gamma must be in \[0, 1\]"):
        make(gamma)


# ---- the total -------------------------------------------------------------------------------------------------------


def test_a_name_that_was_given_with_targets_only_adds_nothing_to_the_total_and_is_not_missing() -> None:
    given = [named(1.0, "right"), named(5.0, "style", span="w0")]
    assert total(given, {"right": 2.0, "style": 1.0}) == 2.0
    assert total(given[:1], {"right": 2.0, "style": 1.0}) is None
