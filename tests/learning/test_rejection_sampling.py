"""Rejection sampling imitates the rollouts with the highest rewards and nothing else."""

import asyncio

import pytest

from leyden.errors import ConfigurationError
from leyden.interfaces import Group
from leyden.roles import Policy
from leyden_plugins.algorithms.sft import RejectionSampling, kept_rollouts
from tests.learning.builders import RecordedSession, call, choice, group, records


def run(algorithm: RejectionSampling, *groups: Group) -> RecordedSession:
    session = RecordedSession(groups=lambda _step: groups)
    asyncio.run(algorithm.run(session))
    return session


def test_the_best_of_each_group_are_kept_and_equal_groups_have_none() -> None:
    groups = [group(0.2, 0.9, 0.9, None), group(1.0, 1.0, group_id="g1"), group(None, group_id="g2")]
    assert kept_rollouts(groups, "best") == {"g0-1", "g0-2"}


def test_a_threshold_keeps_every_reward_that_reaches_it() -> None:
    groups = [group(0.2, 0.9, None), group(1.0, 1.0, group_id="g1"), group(0.0, group_id="g2")]
    assert kept_rollouts(groups, 0.9) == {"g0-1", "g1-0", "g1-1"}


def test_kept_samples_are_trained_by_cross_entropy_with_weights_that_sum_to_one() -> None:
    session = run(RejectionSampling(keep=1.0), group(1.0, 0.0, 1.0))
    ((_, ((objective,),)),) = session.updates
    loss, batch = objective.loss, objective.samples
    assert (loss.name, dict(loss.options)) == ("cross_entropy", {})
    assert sorted(sample.token_ids[-1] for sample in batch) == [0, 2]
    assert sum(sum(sample.weights) for sample in batch) == pytest.approx(1.0)
    assert session.finished[0]["rollouts/kept"] == 2.0
    assert session.finished[0]["tokens/trained"] == 4.0


def test_samples_drawn_greedily_are_imitated_at_temperature_1() -> None:
    greedy = records(call([1], choice([2]), sampling={"temperature": 0.0}, off_distribution=True))
    session = run(RejectionSampling(keep=1.0), Group(group_id="g0", task={}, rollouts=[greedy]))
    ((_, ((objective,),)),) = session.updates
    assert [sample.temperature for sample in objective.samples] == [1.0]


def test_a_step_with_nothing_to_keep_takes_no_update() -> None:
    session = run(RejectionSampling(keep=1.0), group(0.0, 0.5))
    assert session.updates == []
    assert session.finished[0]["tokens/trained"] == 0.0


def test_mini_batches_hold_whole_groups() -> None:
    groups = [group(1.0, 0.0, group_id=f"g{number}") for number in range(4)]
    session = run(RejectionSampling(updates_per_step=2), *groups)
    assert [len(objective.samples) for (objective,) in session.updates[0][1]] == [2, 2]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: RejectionSampling(group_size=0), "group_size=0"),
        (lambda: RejectionSampling(updates_per_step=0), "updates_per_step=0"),
        (lambda: RejectionSampling(keep="top"), "keep='top' must be"),  # type: ignore[arg-type]
        (lambda: RejectionSampling(group_size=1), "compares the rollouts of a group, but group_size=1"),
    ],
)
def test_options_outside_their_range_are_refused(make: object, match: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigurationError, match=match):
        make()


def test_a_run_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no policy is trainable"):
        RejectionSampling().check([Policy("sql", trainable=False)])
