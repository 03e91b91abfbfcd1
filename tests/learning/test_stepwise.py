"""Algorithms that share a run, one a policy."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from leyden.errors import ConfigurationError
from leyden.interfaces import Group, RolloutRecords, Session
from leyden.roles import Policy, Sampling
from leyden.stepwise import PerPolicy, Stepwise
from leyden_plugins.algorithms.rl import DAPO, GRPO, RLOO
from leyden_plugins.algorithms.sft import RejectionSampling
from tests.learning.builders import RecordedSession, call, choice, group, records

WRITER, CRITIC = Policy("writer"), Policy("critic")


@dataclass
class Noted(Stepwise):
    """Says whom it improved, and when."""

    group_size: int = 2
    improved: list[tuple[str, int]] = field(default_factory=list)

    async def improve(
        self, session: Session, policy: Policy, groups: Sequence[Group], step: int
    ) -> Mapping[str, float]:
        self.improved.append((policy.name, step))
        return {"seen": float(len(groups))}


def session(*policies: Policy, total_steps: int = 1) -> RecordedSession:
    groups = [group(1.0, 0.0), group(1.0, 1.0, group_id="g1")]
    return RecordedSession(groups=lambda _step: groups, policies=policies, total_steps=total_steps)


def test_each_policy_is_improved_by_its_own_algorithm_from_the_same_groups() -> None:
    ours, theirs = Noted(), Noted()
    running = session(WRITER, CRITIC, Policy("judge", trainable=False), total_steps=2)
    asyncio.run(PerPolicy({"writer": ours, "critic": theirs}).run(running))
    assert (ours.improved, theirs.improved) == ([("writer", 1), ("writer", 2)], [("critic", 1), ("critic", 2)])
    assert running.finished[0]["writer/seen"] == running.finished[0]["critic/seen"] == 2.0


def test_a_policy_is_frozen_half_way() -> None:
    noted = Noted()
    running = session(WRITER, Policy("critic", freeze_after=1), total_steps=3)
    asyncio.run(noted.run(running))
    assert noted.improved == [("writer", 1), ("critic", 1), ("writer", 2), ("writer", 3)]


def test_reinforcement_and_imitation_share_rollouts() -> None:
    def rollout(number: int) -> RolloutRecords:
        name = f"r{number}"
        calls = [
            call([1], choice([number]), span_id=f"{policy}{number}", policy=policy, rollout_id=name)
            for policy in ("writer", "critic")
        ]
        return records(*calls, total=float(number), rollout_id=name)

    one = Group(group_id="g0", task={}, rollouts=[rollout(0), rollout(1)])
    running = RecordedSession(groups=lambda _step: [one], policies=[WRITER, CRITIC])
    asyncio.run(PerPolicy({"writer": GRPO(), "critic": RejectionSampling()}).run(running))
    assert [(name, batch[0].loss.name) for name, (batch,) in running.updates] == [
        ("writer", "policy_gradient_clip"),
        ("critic", "cross_entropy"),
    ]


def test_groups_are_chosen_by_those_who_choose() -> None:
    both = PerPolicy({"writer": DAPO(most_batches=4), "critic": GRPO()})
    assert both.most_batches == 4
    assert [both.accepts(one) for one in (group(1.0, 0.0), group(1.0, 1.0))] == [True, False]
    running = session(WRITER, CRITIC)
    asyncio.run(both.run(running))
    assert running.finished[0]["groups/total"] == 1.0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PerPolicy({}), "improves nothing"),
        (lambda: PerPolicy({"a": GRPO(group_size=4), "b": RLOO()}), r"\{'a': 4, 'b': 8\}"),
        (lambda: PerPolicy({"writer": GRPO()}).check([WRITER, CRITIC]), r"\['critic', 'writer'\]"),
        (lambda: PerPolicy({"writer": GRPO(), "x": GRPO()}).check([WRITER]), r"given for \['writer', 'x'\]"),
        (lambda: PerPolicy({"writer": GRPO()}).check([Policy("writer", trainable=False)]), "no policy is trainable"),
    ],
)
def test_algorithms_that_do_not_fit_the_policies_are_refused(make: Callable[[], object], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        make()


def test_each_algorithm_checks_its_own_policy() -> None:
    policies = [WRITER, Policy("critic", sampling=Sampling(top_p=0.9))]
    PerPolicy({"writer": GRPO(), "critic": RejectionSampling()}).check(policies)
    with pytest.raises(ConfigurationError, match="policy 'critic' samples with"):
        PerPolicy({"writer": RejectionSampling(), "critic": GRPO()}).check(policies)
