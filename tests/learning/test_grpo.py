"""GRPO: advantages, what it hands to the learner, and what it refuses."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from leyden import mdp
from leyden.errors import ConfigurationError
from leyden.interfaces import Algorithm, Group, Objective, Sample, Transition
from leyden.roles import Policy, Sampling
from leyden_plugins.algorithms.rl import GRPO
from leyden_plugins.algorithms.rl.estimators import group_relative
from tests.learning.builders import POLICY, RecordedSession, call, choice, group, records


def transitions_of(*groups: Group) -> list[Transition]:
    return [one for each in groups for rollout in each.rollouts for one in mdp.transitions(rollout, [POLICY])]


def advantages(*groups: Group, normalise_std: bool = True) -> list[float]:
    return [one.advantage for one in group_relative(transitions_of(*groups), groups, normalise_std=normalise_std)]


# ---- advantages ------------------------------------------------------------------------------------------------


def test_the_advantage_is_the_standard_score_in_the_group() -> None:
    std = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)
    assert advantages(group(1.0, 0.0, 0.0, 0.0)) == pytest.approx([0.75 / std, *[-0.25 / std] * 3])


def test_without_std_the_advantage_is_the_distance_to_the_mean() -> None:
    assert advantages(group(1.0, 0.0, 0.0, 0.0), normalise_std=False) == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_each_group_has_its_own_baseline() -> None:
    found = advantages(group(1.0, 0.0), group(5.0, 3.0, group_id="g1"), normalise_std=False)
    assert found == pytest.approx([0.5, -0.5, 1.0, -1.0])


def test_a_rollout_without_a_reward_is_neither_baseline_nor_sample() -> None:
    assert advantages(group(1.0, None, 0.0), normalise_std=False) == pytest.approx([0.5, -0.5])


@pytest.mark.parametrize("rewards", [(1.0,), (0.5, 0.5, 0.5), (1.0, None), (0.3, 0.1 + 0.2)])
def test_a_group_without_spread_gives_no_signal(rewards: Sequence[float | None]) -> None:
    assert set(advantages(group(*rewards))) == {0.0}


def test_rollouts_in_which_the_role_was_silent_count_in_the_baseline() -> None:
    spoke = group(1.0)
    silent = group(0.0, 0.0, 0.0, group_id="silent", speaks=False)
    both = Group(group_id="g0", task={}, rollouts=[*spoke.rollouts, *silent.rollouts])
    found = group_relative(transitions_of(spoke), [both], normalise_std=False)
    assert [one.advantage for one in found] == [0.75]


def test_the_baseline_is_of_what_credit_assignment_gave() -> None:
    one = group(1.0, 1.0)
    first, second = transitions_of(one)
    found = group_relative([replace(first, value=1.5), second], [one], normalise_std=False)
    assert [each.advantage for each in found] == pytest.approx([0.25, -0.25])


# ---- the run ---------------------------------------------------------------------------------------------------


def run(algorithm: Algorithm, session: RecordedSession) -> RecordedSession:
    asyncio.run(algorithm.run(session))
    return session


def objectives(session: RecordedSession) -> list[Objective]:
    """Return what was handed to the learner, in order."""
    return [objective for _, batches in session.updates for batch in batches for objective in batch]


def weight_of(samples: Sequence[Sample]) -> float:
    return sum(sum(sample.weights) for sample in samples)


def test_a_step_is_sampled_weighed_updated_and_finished() -> None:
    session = run(GRPO(group_size=2), RecordedSession(groups=lambda _step: [group(1.0, 0.0)]))
    ((policy, ((objective,),)),) = session.updates
    loss, batch = objective.loss, objective.samples
    assert session.asked_group_size == 2
    assert (policy, loss.name, dict(loss.options)) == (
        "sql",
        "policy_gradient_clip",
        {"clip_low": 0.2, "clip_high": 0.2},
    )
    assert sorted(value for sample in batch for value in sample.advantages) == pytest.approx(
        [-(0.5**0.5)] * 2 + [0.5**0.5] * 2
    )
    assert weight_of(batch) == pytest.approx(1.0)
    (metrics,) = session.finished
    expected = {
        "reward/mean": 0.5,
        "groups/without_signal": 0.0,
        "transitions/admitted": 2.0,
        "advantage/std": 0.5**0.5,
        "tokens/trained": 4.0,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_rollouts_without_signal_count_in_the_weights_but_are_not_computed() -> None:
    groups = [group(1.0, 0.0), group(1.0, 1.0, group_id="g1")]
    ((_, ((objective,),)),) = run(GRPO(group_size=2), RecordedSession(groups=lambda _step: groups)).updates
    assert len(objective.samples) == 2
    assert weight_of(objective.samples) == pytest.approx(0.5)


def test_a_step_without_signal_takes_no_update() -> None:
    session = run(GRPO(), RecordedSession(groups=lambda _step: [group(1.0, 1.0), group(None, None, group_id="g1")]))
    assert session.updates == []
    assert session.finished[0]["groups/without_signal"] == 2.0


def test_a_mini_batch_without_signal_is_skipped() -> None:
    groups = [group(1.0, 0.0), group(1.0, 1.0, group_id="g1")]
    session = run(GRPO(updates_per_step=2), RecordedSession(groups=lambda _step: groups))
    assert [weight_of(objective.samples) for objective in objectives(session)] == pytest.approx([1.0])


def test_mini_batches_hold_whole_groups() -> None:
    groups = [group(1.0, 0.0, group_id=f"g{number}") for number in range(4)]
    found = objectives(run(GRPO(updates_per_step=2), RecordedSession(groups=lambda _step: groups)))
    assert [len(objective.samples) for objective in found] == [4, 4]
    for objective in found:
        assert sum(sum(sample.advantages) for sample in objective.samples) == pytest.approx(0.0)


def test_an_asymmetric_clip_reaches_the_loss() -> None:
    session = run(GRPO(clip=0.1, clip_high=0.3), RecordedSession(groups=lambda _step: [group(1.0, 0.0)]))
    assert dict(objectives(session)[0].loss.options) == {"clip_low": 0.1, "clip_high": 0.3}


def test_several_policies_are_updated_apart_and_frozen_ones_never() -> None:
    policies = [Policy("sql"), Policy("other"), Policy("judge", trainable=False)]

    def rollout(number: int) -> Group:
        each = [
            call([1], choice([number]), span_id=f"{name}{number}", policy=name, rollout_id=f"r{number}")
            for name in ("sql", "other", "judge")
        ]
        return Group(group_id="g0", task={}, rollouts=[records(*each, total=float(number), rollout_id=f"r{number}")])

    one = Group(group_id="g0", task={}, rollouts=[*rollout(0).rollouts, *rollout(1).rollouts])
    session = run(GRPO(group_size=2), RecordedSession(groups=lambda _step: [one], policies=policies))
    assert [name for name, _ in session.updates] == ["sql", "other"]
    assert session.finished[0]["sql/tokens/trained"] == session.finished[0]["other/tokens/trained"] == 2.0


def test_every_step_of_the_session_is_taken() -> None:
    session = run(GRPO(), RecordedSession(groups=lambda _step: [group(1.0, 0.0)], total_steps=3))
    assert len(session.updates) == len(session.finished) == 3


# ---- refusals --------------------------------------------------------------------------------------------------


def off_distribution_group() -> Group:
    rollouts = [
        records(
            call(
                [1],
                choice([number]),
                span_id=f"s{number}",
                rollout_id=f"r{number}",
                sampling={"temperature": 1.0, "top_p": 0.9},
                off_distribution=number == 0,
            ),
            total=float(number),
            rollout_id=f"r{number}",
        )
        for number in range(3)
    ]
    return Group(group_id="g0", task={}, rollouts=rollouts)


def test_off_distribution_calls_are_refused_with_their_parameters() -> None:
    session = RecordedSession(groups=lambda _step: [off_distribution_group()])
    with pytest.raises(ConfigurationError, match=r"1 of 3 calls of policy 'sql'.*role 'writer'.*'top_p': 0\.9"):
        run(GRPO(), session)
    assert session.updates == []


def test_off_distribution_calls_are_left_out_on_request() -> None:
    session = RecordedSession(groups=lambda _step: [off_distribution_group()])
    run(GRPO(off_distribution="drop", normalise_std=False), session)
    # The dropped rollout still has its reward (0) in the baseline: the mean of 0, 1 and 2 is 1.
    (objective,) = objectives(session)
    assert [sample.advantages[-1] for sample in objective.samples] == pytest.approx([1.0])
    assert session.finished[0]["transitions/admitted"] == 2.0


@pytest.mark.parametrize(
    ("sampling", "named"),
    [(Sampling(top_p=0.9), "top_p"), (Sampling(top_k=5), "top_k"), (Sampling(temperature=0.0), "temperature")],
)
def test_off_distribution_sampling_is_refused_before_anything_starts(sampling: Sampling, named: str) -> None:
    policies = [Policy("sql", sampling=sampling)]
    with pytest.raises(ConfigurationError, match=rf"policy 'sql' samples with .*{named}"):
        GRPO().check(policies)
    GRPO(off_distribution="drop").check(policies)


def test_a_run_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no policy is trainable"):
        GRPO().check([Policy("sql", trainable=False)])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: GRPO(group_size=1), "group_size=1"),
        (lambda: GRPO(clip=0.0), r"clip=0\.0"),
        (lambda: GRPO(clip_high=-0.1), r"clip_high=-0\.1"),
        (lambda: GRPO(updates_per_step=0), "updates_per_step=0"),
        (lambda: GRPO(normalisation="sum"), "normalisation='sum'"),  # type: ignore[arg-type]
        (lambda: GRPO(off_distribution="ignore"), "off_distribution='ignore'"),  # type: ignore[arg-type]
    ],
)
def test_options_outside_their_range_are_refused(make: object, match: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigurationError, match=match):
        make()
