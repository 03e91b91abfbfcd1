"""What the first group tells before the first step."""

from collections.abc import Sequence

import pytest

import leyden
from leyden.errors import ConfigurationError, EngineError, RoleError
from leyden.interfaces import Group, RolloutRecords, Sample, Transition
from leyden.roles import check_roles
from leyden.running.rollouts import Tally
from leyden.spans import Mode, Rollout, RolloutState
from leyden.training.preflight import preflight

WRITER = leyden.Policy("sql", roles=["writer"])


class EchoLearner:
    """Recomputes what was recorded, shifted by `shift` nats."""

    def __init__(self, shift: float = 0.0) -> None:
        self.shift = shift

    def logprobs(self, policy: str, samples: Sequence[Sample], *, reference: bool = False) -> list[list[float]]:
        return [[logprob + self.shift for logprob in sample.logprobs] for sample in samples]


def rollout(index: int, reward: float | None, *, error_type: str | None = None, error: str | None = None) -> Rollout:
    return Rollout(
        rollout_id=f"s1-t0-{index}",
        task={},
        task_id="t0",
        group_id="s1-t0",
        mode=Mode.TRAIN,
        step=1,
        state=RolloutState.SUCCEEDED if error_type is None else RolloutState.FAILED,
        attempt=1,
        reward=reward,
        error_type=error_type,
        error=error,
    )


def a_transition(index: int = 0) -> Transition:
    return Transition(
        rollout_id=f"s1-t0-{index}",
        group_id="s1-t0",
        role="writer",
        policy="sql",
        version=0,
        span_id=f"span-{index}",
        choice_index=0,
        prompt_token_ids=[1, 2, 3],
        token_ids=[4, 5 + index],
        logprobs=[-0.5, -1.0],
        temperature=1.0,
        off_distribution=False,
        finish_reason="stop",
        turn=0,
        value=1.0,
    )


def look(rollouts: list[Rollout], *, learner: EchoLearner | None = None, spoken: dict[str, int] | None = None) -> str:
    tally = Tally()
    tally.rollouts = len(rollouts)
    tally.spoken.update({"writer": 2, "checker": 4} if spoken is None else spoken)
    records = [RolloutRecords(rollout=one, spans=(), completions=(), rewards=()) for one in rollouts]
    return "\n".join(
        preflight(
            Group(group_id="s1-t0", task={}, rollouts=records),
            policies=[WRITER],
            transitions=[a_transition(0), a_transition(1)],
            learner=learner or EchoLearner(),  # type: ignore[arg-type]  # only log-probabilities are asked for
            tally=tally,
            agent="app:solve",
            seconds=1.0,
            rollouts_to_come=100,
        )
    )


def test_it_tells_roles_rewards_and_what_untrained_roles_will_call():
    told = look([rollout(0, 1.0), rollout(1, 0.0)])
    assert "roles seen (model calls): checker 4, writer 2" in told
    assert "rewards of the first group: 1, 0" in told
    assert "role 'checker' is in no policy: about 200 calls to its own endpoint in this run" in told


def test_a_group_without_spread_is_noted():
    assert "no spread in this group" in look([rollout(0, 1.0), rollout(1, 1.0)])
    assert "no spread" not in look([rollout(0, 1.0), rollout(1, 0.0)])


def test_an_engine_that_serves_other_weights_is_refused():
    with pytest.raises(EngineError, match=r"by 0\.2 nats a token on average and by up to 0\.2"):
        look([rollout(0, 1.0), rollout(1, 0.0)], learner=EchoLearner(shift=0.2))


def test_a_small_difference_is_told_with_its_mean_and_its_worst():
    told = look([rollout(0, 1.0), rollout(1, 0.0)], learner=EchoLearner(shift=0.01))
    assert "probabilities that differ by 1 % on average, by 1 % at most" in told


def test_a_role_that_does_not_exist_is_refused():
    with pytest.raises(RoleError, match="trains role 'writer', but no such role exists"):
        look([rollout(0, 1.0), rollout(1, 0.0)], spoken={"checker": 4})


def test_a_role_that_may_speak_later_is_noted_beside_one_that_has_spoken():
    policy = leyden.Policy("sql", roles=["writer", "rewriter"])
    [line] = check_roles([policy], {"writer": 4, "checker": 4}, ["writer", "checker"])
    assert (
        "nobody has spoken as 'rewriter' yet; is it spelled right? Roles that made model calls: {'checker': 4" in line
    )
    [line] = check_roles([policy], {"writer": 4}, ["writer", "rewriter"])
    assert line == "policy 'sql': declared, but no model call yet: 'rewriter'"
    with pytest.raises(RoleError, match=r"trains role 'writer', but no such role exists.*'checker': 4"):
        check_roles([policy], {"checker": 4}, ["checker"])


def test_a_group_in_which_nobody_gave_a_reward_is_refused_with_the_agents_name():
    forgotten = [rollout(i, None, error_type="NoReward", error="the agent returned None") for i in range(2)]
    with pytest.raises(ConfigurationError, match="app:solve: the agent returned None"):
        look(forgotten)
