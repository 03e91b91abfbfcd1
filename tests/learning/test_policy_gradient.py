"""What policy-gradient algorithms share: roles of their own, repeats, divergence, replay, what is refused."""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest

from leyden.errors import ConfigurationError
from leyden.interfaces import Group, Loss, Objective, Transition
from leyden.roles import Policy
from leyden_plugins.algorithms.rl import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    PPO,
    RLOO,
    DrGRPO,
    ImportanceSampling,
    LightningRL,
    Overlong,
    PolicyGradient,
    Reinforce,
    ReinforcePlusPlus,
    Replay,
)
from leyden_plugins.algorithms.rl.shaping import subtract_divergence
from leyden_plugins.algorithms.sft import RejectionSampling
from tests.learning.builders import RecordedSession, call, choice, group, records
from tests.learning.test_estimators import LOGITS, PROBABILITIES, expected_gradient


@dataclass(kw_only=True)
class KnowingSession(RecordedSession):
    """A session with a base model, a value head, and stored groups."""

    stored: Sequence[Group] = ()
    replays: list[tuple[int, int, int]] = field(default_factory=list)

    async def logprobs(
        self, policy: Policy, transitions: Sequence[Transition], *, reference: bool = False
    ) -> Sequence[Sequence[float]]:
        assert reference
        return [[-3.0] * len(one.token_ids) for one in transitions]

    async def values(self, policy: Policy, transitions: Sequence[Transition]) -> Sequence[Sequence[float]]:
        return [[0.25] * len(one.token_ids) for one in transitions]

    async def replay(self, step: int, *, count: int, max_age: int) -> Sequence[Group]:
        self.replays.append((step, count, max_age))
        return self.stored


def run(algorithm: PolicyGradient, *groups: Group, stored: Sequence[Group] = ()) -> KnowingSession:
    session = KnowingSession(groups=lambda _step: groups, stored=stored)
    asyncio.run(algorithm.run(session))
    return session


def objectives(session: RecordedSession) -> list[Objective]:
    return [objective for _, batches in session.updates for batch in batches for objective in batch]


def team(*rewards: float) -> Group:
    """Return rollouts in each of which a writer says two tokens and a checker one."""
    rollouts = []
    for number, total in enumerate(rewards):
        name = f"r{number}"
        writer = call([1], choice([2, number]), span_id=f"w{number}", rollout_id=name)
        checker = call([3], choice([number]), span_id=f"c{number}", rollout_id=name, role="team.checker", start_ns=1)
        rollouts.append(records(writer, checker, total=total, rollout_id=name))
    return Group(group_id="g0", task={}, rollouts=rollouts)


# ---- every algorithm ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "loss"),
    [
        (Reinforce(), Loss(name="policy_gradient")),
        (RLOO(), Loss(name="policy_gradient")),
        (DrGRPO(), Loss(name="policy_gradient_clip", options={"clip_low": 0.2, "clip_high": 0.2})),
        (ReinforcePlusPlus(), Loss(name="policy_gradient_clip", options={"clip_low": 0.2, "clip_high": 0.2})),
        (DAPO(), Loss(name="policy_gradient_clip", options={"clip_low": 0.2, "clip_high": 0.28})),
        (GSPO(), Loss(name="gspo", options={"clip_low": 3e-4, "clip_high": 4e-4})),
        (CISPO(), Loss(name="cispo", options={"clip_low": 1.0, "clip_high": 4.0})),
        (LightningRL(token_level=CISPO()), Loss(name="cispo", options={"clip_low": 1.0, "clip_high": 4.0})),
        (
            PPO(clip=0.1, value_clip=None),
            Loss(name="policy_gradient_clip", options={"clip_low": 0.1, "clip_high": 0.1}, value_coefficient=0.5),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_algorithm_names_its_loss(algorithm: PolicyGradient, loss: Loss) -> None:
    (objective,) = objectives(run(algorithm, group(1.0, 0.0)))
    assert objective.loss == loss


def test_ppo_hands_over_values_and_what_they_should_be() -> None:
    (objective,) = objectives(run(PPO(whiten=False, trace=1.0), group(1.0, 0.0)))
    for sample, reward in zip(objective.samples, (1.0, 0.0), strict=True):
        assert sample.values == [0.25, 0.25]
        assert sample.returns == pytest.approx([reward] * 2)
        assert sample.advantages == pytest.approx([reward - 0.25] * 2)


def test_ppo_scales_the_steps_advantages() -> None:
    (objective,) = objectives(run(PPO(trace=1.0), group(1.0, 0.0)))
    assert [sample.advantages[0] for sample in objective.samples] == pytest.approx([1.0, -1.0])


def test_lightning_gives_its_token_level_the_values_it_needs() -> None:
    algorithm = LightningRL(token_level=PPO(whiten=False, trace=1.0))
    (objective,) = objectives(run(algorithm, group(1.0, 0.0)))
    assert [sample.values for sample in objective.samples] == [[0.25, 0.25]] * 2
    assert [sample.advantages[0] for sample in objective.samples] == pytest.approx([0.75, -0.25])


def test_ppo_trains_values_also_where_advantages_are_0() -> None:
    (objective,) = objectives(run(PPO(trace=1.0), group(0.5, 0.5)))
    assert {advantage for sample in objective.samples for advantage in sample.advantages} == {0.0}
    assert [sample.returns is not None for sample in objective.samples] == [True, True]


# ---- roles with an algorithm of their own ------------------------------------------------------------------------


def test_a_role_has_its_own_advantages_and_loss_in_the_same_optimizer_batch() -> None:
    algorithm = GRPO(normalise_std=False, by_role={"team.*": RLOO(kl_coefficient=0.1)})
    ((_, (batch,)),) = run(algorithm, team(1.0, 0.0)).updates
    ours, theirs = batch
    assert (ours.loss.name, theirs.loss.name) == ("policy_gradient_clip", "policy_gradient")
    assert (ours.loss.kl_coefficient, theirs.loss.kl_coefficient) == (0.0, 0.1)
    assert [list(sample.advantages) for sample in ours.samples] == [[0.5, 0.5], [-0.5, -0.5]]
    assert [list(sample.advantages) for sample in theirs.samples] == [[1.0], [-1.0]]
    assert [sample.reference_logprobs for sample in theirs.samples] == [[-3.0], [-3.0]]
    assert ours.samples[0].reference_logprobs is None
    # Weights are those of the whole batch: 2 rollouts with 3 tokens each.
    assert {weight for one in batch for sample in one.samples for weight in sample.weights} == {1 / 6}


def test_one_algorithm_under_two_patterns_trains_each_call_once() -> None:
    shared = RLOO()
    found = objectives(run(GRPO(by_role={"writer": shared, "team.*": shared}), team(1.0, 0.0)))
    assert [len(objective.samples) for objective in found] == [2, 2]


def test_the_first_pattern_that_matches_takes_a_role() -> None:
    found = objectives(run(GRPO(by_role={"team.*": RLOO(), "*": CISPO()}), team(1.0, 0.0)))
    assert [objective.loss.name for objective in found] == ["policy_gradient", "cispo"]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: GRPO(by_role={"a": RLOO(group_size=4)}), r"by_role\['a'\] has group_size=4.*GRPO with group_size=8"),
        (lambda: GRPO(by_role={"a": RejectionSampling()}), "is no policy-gradient algorithm"),
        (lambda: LightningRL(token_level=DAPO(most_batches=5)), "leave it out: that one has no such option"),
        (lambda: LightningRL(token_level=DrGRPO()), "DrGRPO divides by a constant, but weights are decided outside"),
        (lambda: GRPO(by_role={"a": GRPO(epochs=2)}), r"by_role\['a'\] has epochs=2"),
        (lambda: GRPO(epochs=2, by_role={"a": RLOO()}), "loss without a ratio"),
        (lambda: PPO(group_size=1, by_role={"a": GRPO()}), "compares rollouts of a task"),
        (lambda: LightningRL(token_level=GRPO(kl_coefficient=0.1)), "token_level has kl_coefficient=0.1"),
    ],
)
def test_an_inner_algorithm_keeps_out_of_what_is_the_steps(make: Callable[[], object], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        make()


def test_an_inner_algorithm_may_repeat_what_the_outer_one_says() -> None:
    GRPO(group_size=4, by_role={"a": RLOO(group_size=4)})


# ---- several updates ---------------------------------------------------------------------------------------------


def test_epochs_train_every_call_again_in_another_order() -> None:
    groups = []
    for number in range(4):  # answers that tell the groups apart
        calls = [call([1], choice([number, n]), span_id=f"{number}{n}", rollout_id=f"{number}{n}") for n in (0, 1)]
        rollouts = [
            records(one, total=float(n), rollout_id=one.rollout_id, group_id=f"g{number}")
            for n, one in enumerate(calls)
        ]
        groups.append(Group(group_id=f"g{number}", task={}, rollouts=rollouts))
    found = objectives(run(GRPO(epochs=3, updates_per_step=2), *groups))
    trained = [[tuple(sample.token_ids) for sample in objective.samples] for objective in found]
    assert [len(batch) for batch in trained] == [4] * 6
    epochs = [sorted(trained[number] + trained[number + 1]) for number in (0, 2, 4)]
    assert epochs[0] == epochs[1] == epochs[2]
    orders = {tuple(trained[number]) for number in (0, 2, 4)}
    assert len(orders) > 1


# ---- divergence, entropy, length ---------------------------------------------------------------------------------


def test_divergence_in_the_loss_comes_with_the_bases_log_probabilities() -> None:
    algorithm = GRPO(kl_coefficient=0.1, kl_estimator="k2", entropy_coefficient=0.01)
    (objective,) = objectives(run(algorithm, group(1.0, 1.0)))  # no advantage, and still a gradient
    assert (objective.loss.kl_coefficient, objective.loss.kl_estimator) == (0.1, "k2")
    assert objective.loss.entropy_coefficient == 0.01
    assert [sample.reference_logprobs for sample in objective.samples] == [[-3.0, -3.0]] * 2


def test_divergence_in_the_reward_is_taken_off_before_advantages() -> None:
    rollouts = [
        records(call([1], choice([2] * length), span_id=name, rollout_id=name), total=1.0, rollout_id=name)
        for name, length in (("short", 1), ("long", 3))
    ]
    algorithm = GRPO(normalise_std=False, kl_in="reward", kl_coefficient=0.1)
    (objective,) = objectives(run(algorithm, Group(group_id="g0", task={}, rollouts=rollouts)))
    assert objective.loss.kl_coefficient == 0.0
    # log p - log p_reference is -1 - -3 a token: 0.2 off for the short answer, 0.6 for the long one.
    assert [sample.advantages[0] for sample in objective.samples] == pytest.approx([0.2, -0.2])


def test_divergence_as_a_reward_has_the_divergences_gradient() -> None:
    base = [0.2, 0.2, 0.6]

    def penalised(calls: list[Transition]) -> list[Transition]:
        empty = [replace(one, value=0.0) for one in calls]
        found = subtract_divergence(empty, [[math.log(base[one.token_ids[0]])] for one in calls], 1.0)
        return Reinforce(baseline="none").advantages(found, ())

    ratios = [math.log(p / q) for p, q in zip(PROBABILITIES, base, strict=True)]
    divergence = sum(p * ratio for p, ratio in zip(PROBABILITIES, ratios, strict=True))
    expected = [-p * (ratio - divergence) for p, ratio in zip(PROBABILITIES, ratios, strict=True)]
    assert len(expected) == len(LOGITS)
    assert expected_gradient(penalised, group_size=1) == pytest.approx(expected)


def test_long_answers_are_punished_before_advantages() -> None:
    rollouts = [
        records(call([1], choice([2] * length), span_id=name, rollout_id=name), total=1.0, rollout_id=name)
        for name, length in (("short", 1), ("long", 9))
    ]
    algorithm = GRPO(normalise_std=False, overlong=Overlong(longest=10, margin=2))
    (objective,) = objectives(run(algorithm, Group(group_id="g0", task={}, rollouts=rollouts)))
    assert [sample.advantages[0] for sample in objective.samples] == pytest.approx([0.25, -0.25])


# ---- other steps' rollouts ---------------------------------------------------------------------------------------


def test_replayed_groups_are_trained_beside_the_new_ones() -> None:
    algorithm = GRPO(replay=Replay(groups=5, max_age=3), correction=None)
    session = run(algorithm, group(1.0, 0.0), stored=[group(1.0, 0.0, group_id="old")])
    (objective,) = objectives(session)
    assert session.replays == [(1, 5, 3)]
    assert len(objective.samples) == 4


def test_a_running_baseline_is_the_mean_of_earlier_steps() -> None:
    stored = [group(0.75, 0.25, group_id="old"), group(1.0, 1.0, group_id="older")]
    session = run(Reinforce(group_size=1, baseline="running", running_steps=2), group(1.0), stored=stored)
    (objective,) = objectives(session)
    assert session.replays == [(1, 2, 2)]
    assert list(objective.samples[0].advantages) == pytest.approx([0.25, 0.25])


def test_a_running_baseline_is_of_the_roles_it_judges() -> None:
    checker = call([3], choice([4]), span_id="c", rollout_id="old", role="team.checker")
    alone = Group(group_id="old", task={}, rollouts=[records(checker, total=0.0, rollout_id="old")])
    algorithm = GRPO(by_role={"writer": Reinforce(baseline="running")})
    _, writers = objectives(run(algorithm, team(1.0, 0.0), stored=[alone, team(0.8, 0.8)]))
    assert writers.loss.name == "policy_gradient"
    assert [sample.advantages[0] for sample in writers.samples] == pytest.approx([0.2, -0.8])


def test_a_running_baseline_starts_with_the_steps_own_mean() -> None:
    (objective,) = objectives(run(Reinforce(baseline="running"), group(1.0, 0.5)))
    assert [sample.advantages[0] for sample in objective.samples] == pytest.approx([0.25, -0.25])


def test_dynamic_sampling_keeps_groups_with_a_signal() -> None:
    algorithm = DAPO()
    assert [algorithm.accepts(one) for one in (group(1.0, 0.0), group(1.0, 1.0), group(1.0, None), group(None))] == [
        True,
        False,
        False,
        False,
    ]
    session = run(algorithm, group(1.0, 0.0), group(1.0, 1.0, group_id="g1"))
    assert session.finished[0]["groups/total"] == 1.0
    assert run(GRPO(), group(1.0, 0.0), group(1.0, 1.0, group_id="g1")).finished[0]["groups/total"] == 2.0


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (Reinforce, {"group_size": 1}, "at least 2 rollouts a task"),
        (Reinforce, {"baseline": "batch"}, "baseline='batch'"),
        (Reinforce, {"updates_per_step": 2}, "no ratio"),
        (RLOO, {"epochs": 2}, "no ratio"),
        (RLOO, {"group_size": 1}, "at least 2 rollouts a task"),
        (ReinforcePlusPlus, {"group_size": 1}, "at least 2 rollouts a task"),
        (LightningRL, {"group_size": 1}, "at least 2 rollouts a task"),
        (LightningRL, {"token_level": RLOO(), "epochs": 2}, "no ratio"),
        (GRPO, {"epochs": 0}, "epochs=0 must be at least 1"),
        (GRPO, {"kl_in": "advantage"}, "kl_in='advantage'"),
        (GRPO, {"kl_coefficient": -0.1}, "kl_coefficient=-0.1"),
        (GRPO, {"kl_coefficient": math.nan}, "kl_coefficient=nan"),
        (GRPO, {"entropy_coefficient": math.inf}, "entropy_coefficient=inf"),
        (GRPO, {"kl_in": "reward", "kl_estimator": "k3"}, "only k1 as a reward"),
        (GRPO, {"kl_estimator": "k1"}, "0 on average"),
        (GRPO, {"correction": "none"}, "correction='none'"),
        (GRPO, {"rollout_tokens": 10}, "rollout_tokens=10"),
        (GRPO, {"normalisation": "dr_grpo"}, "rollout_tokens=None"),
        (DrGRPO, {"rollout_tokens": 0}, "rollout_tokens=0"),
        (GSPO, {"correction": ImportanceSampling()}, r"level='sequence'"),
        (CISPO, {"clip": 1.5}, r"clip=1\.5 must be in \(0, 1\]"),
        (PPO, {"discount": 0.0}, r"discount=0\.0 must be in \(0, 1\]"),
        (PPO, {"trace": 1.1}, r"trace=1\.1 must be in \[0, 1\]"),
        (PPO, {"value_coefficient": 0.0}, "value_coefficient=0.0"),
        (DAPO, {"most_batches": 0}, "most_batches=0"),
        (Replay, {"groups": 0, "max_age": 1}, "groups=0"),
        (Overlong, {"longest": 10, "margin": 20}, "margin=20"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    kind: Callable[..., object], options: Mapping[str, object], match: str
) -> None:
    with pytest.raises(ConfigurationError, match=match):
        kind(**options)


@pytest.mark.parametrize("kind", [Reinforce, ReinforcePlusPlus, PPO])
def test_what_compares_no_rollouts_needs_one_a_task(kind: Callable[..., object]) -> None:
    options: dict[str, object] = {Reinforce: {"baseline": "none"}, ReinforcePlusPlus: {"group_baseline": False}}.get(
        kind, {}
    )  # type: ignore[assignment, call-overload]
    assert kind(group_size=1, **options)
