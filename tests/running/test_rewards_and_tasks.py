"""Rewards and tasks as users give them."""

import pickle

import pytest

import leyden
from leyden.errors import ConfigurationError, DatasetError, RewardError
from leyden.rewards import check_weights, named, total
from leyden.spans import Reward
from leyden.training.tasks import checked_tasks


def reward(name: str, value: float, **fields) -> Reward:
    return Reward(rollout_id="r", attempt=1, name=name, value=value, **fields)


def test_the_total_is_the_weighted_sum_of_untargeted_rewards():
    rewards = [reward("reward", 1.0), reward("style", 0.5), reward("style", 9.0, target_role="writer")]
    assert total(rewards, {"reward": 1.0, "style": 2.0}) == 2.0


def test_a_missing_weighted_name_is_no_total_rather_than_zero():
    assert total([reward("style", 1.0)], {"reward": 1.0}) is None
    assert total([reward("reward", 1.0)], {"reward": 1.0, "style": 0.0}) == 1.0


def test_weights_that_never_give_a_total_are_refused():
    with pytest.raises(ConfigurationError, match="gives no total"):
        check_weights({"reward": 0.0})


def test_no_reward_stays_itself_across_processes():
    assert pickle.loads(pickle.dumps(leyden.NO_REWARD)) is leyden.NO_REWARD
    assert named(leyden.NO_REWARD, where="r") is None


def test_a_reward_of_another_type_is_refused():
    with pytest.raises(RewardError, match="rollout r: a reward is a finite"):
        named("1.0", where="rollout r")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "tasks is empty"),
        ("abc", "must be a sequence"),
        (7, "must be a sequence"),
        ([{"a": 1}, {"b": object()}], r"tasks\[1\] is not a JSON value"),
        ([None], r"tasks\[0\] is None"),
        ([2**70], r"tasks\[0\] is not a JSON value"),
        (["half a pair: \ud83d"], r"tasks\[0\] is not a JSON value"),
    ],
)
def test_malformed_tasks_are_refused_with_their_position(tasks, message):
    with pytest.raises(DatasetError, match=message):
        checked_tasks(tasks, name="tasks")


def test_tasks_are_the_same_in_every_process():
    given = [{"pair": (1, 2), "at": {3: "three"}}]
    assert checked_tasks(given, name="tasks") == [{"pair": [1, 2], "at": {"3": "three"}}]
