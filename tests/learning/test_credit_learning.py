"""Turn and role rewards reach the loss: tasks that only the right assignment of credit can learn.

Every task hides one skill, the first token of one call, behind chance that another call brings in. The same samples
under another assignment must not teach it in the same number of steps.
"""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from leyden import mdp
from leyden.credit import Credit, broadcast, per_role, per_turn
from leyden.interfaces import Algorithm, Group, Transition
from leyden.roles import Policy
from leyden.spans import Choice, Reward
from leyden_plugins.algorithms.rl import GRPO, HierarchicalGRPO
from leyden_plugins.learners.torch import TorchLearner
from leyden_plugins.torch_models.loading import load_model
from tests.learning.builders import RecordedSession, call, records, reward

POLICY = Policy("sql", learning_rate=1e-2)
TASKS = 4
GROUP_SIZE = 8
STEPS = 25
LEARNED, NOT_LEARNED = 0.85, 0.6
CHANCE = 10.0
"""Size of the random part of a return; what the skill earns is 1."""


@dataclass(frozen=True)
class Speech:
    """One call of a rollout."""

    role: str
    policy: str
    opening: int
    """First token of its prompt; the second names the task."""


Outcome = tuple[float, list[Reward]]
"""The total, and the rewards with a target. Calls have the spans `<rollout>/0`, `<rollout>/1`, ..."""

Judge = Callable[[str, bool, float], Outcome]
"""(rollout id, whether the skill was shown, chance) -> outcome."""


class Stage:
    """Samples rollouts of several one-token calls from the learner's published weights."""

    def __init__(
        self,
        learner: TorchLearner,
        checkpoint: Path,
        *,
        seed: int,
        speeches: Sequence[Speech],
        skill: int,
        judge: Judge,
    ) -> None:
        self.learner = learner
        self.model = load_model(checkpoint)
        self.generator = torch.Generator().manual_seed(seed)
        self.rng = random.Random(seed)
        self.speeches = speeches
        self.skill = skill
        """Which call is to answer with a token of its task's."""
        self.judge = judge
        self.shown: list[float] = []
        """By step: how often the skill was shown."""

    @torch.no_grad()
    def groups(self, step: int) -> Sequence[Group]:
        tensors: Mapping[str, object] = self.learner.weights("sql").tensors or {}
        for name, parameter in self.model.named_parameters():
            published = tensors[name]
            assert isinstance(published, Tensor)
            parameter.copy_(published)
        before = len(self.shown)
        self.shown.append(0.0)
        found = [self.group(f"{step}-{task}", task) for task in range(TASKS)]
        self.shown[before] /= TASKS * GROUP_SIZE
        return found

    def group(self, group_id: str, task: int) -> Group:
        prompts = torch.tensor([[one.opening, 1 + task] for one in self.speeches])
        distributions = torch.log_softmax(self.model(prompts).logits[:, -1], -1)
        rollouts = []
        for number in range(GROUP_SIZE):
            name = f"{group_id}-{number}"
            drawn = torch.multinomial(distributions.exp(), 1, generator=self.generator)[:, 0]
            calls = [
                call(
                    prompts[k].tolist(),
                    Choice(
                        index=0,
                        token_ids=[int(drawn[k])],
                        logprobs=[float(distributions[k, drawn[k]])],
                        finish_reason="stop",
                    ),
                    span_id=f"{name}/{k}",
                    rollout_id=name,
                    role=one.role,
                    policy=one.policy,
                    start_ns=k,
                )
                for k, one in enumerate(self.speeches)
            ]
            is_shown = int(drawn[self.skill]) % TASKS == task
            self.shown[-1] += is_shown
            total, rewards = self.judge(name, is_shown, self.rng.choice([-CHANCE, CHANCE]))
            rollouts.append(records(*calls, total=total, rewards=rewards, rollout_id=name, group_id=group_id))
        return Group(group_id=group_id, task={}, rollouts=rollouts)


@dataclass(kw_only=True)
class CreditedSession(RecordedSession):
    """A session with an assignment of credit."""

    credit: Credit = broadcast

    def transitions(self, groups: Sequence[Group], policy: Policy) -> Sequence[Transition]:
        return [
            one
            for group in groups
            for each in group.rollouts
            for one in mdp.transitions(each, [policy], credit=self.credit)
        ]


def learned(
    checkpoint: Path,
    credit: Credit,
    *,
    seed: int,
    speeches: Sequence[Speech],
    skill: int,
    judge: Judge,
    algorithm: Algorithm | None = None,
) -> float:
    """Train; return how often the skill is shown at the end."""
    learner = TorchLearner()
    learner.open([POLICY], str(checkpoint), seed=seed)
    stage = Stage(learner, checkpoint, seed=seed, speeches=speeches, skill=skill, judge=judge)
    session = CreditedSession(groups=stage.groups, policies=[POLICY], total_steps=STEPS, learner=learner, credit=credit)
    asyncio.run((algorithm or GRPO(group_size=GROUP_SIZE)).run(session))
    assert stage.shown[0] < 0.6, "nothing is known before the first update"
    return sum(stage.shown[-3:]) / 3


seeds = pytest.mark.parametrize("seed", [0, 1, 2])


# ---- roles: the gambler's luck dominates the total of a rollout that it shares with the writer -----------------------

DUET = [Speech("writer", "sql", 8), Speech("gambler", "theirs", 9)]


def of_roles(name: str, is_shown: bool, chance: float) -> Outcome:
    own = [reward(float(is_shown), role="writer"), reward(chance, role="gambler")]
    return is_shown + chance, own


@seeds
def test_role_rewards_teach_a_role_what_it_did(checkpoint: Path, seed: int) -> None:
    assert learned(checkpoint, per_role, seed=seed, speeches=DUET, skill=0, judge=of_roles) > LEARNED


@seeds
def test_the_same_rewards_do_not_when_the_total_is_credited_too(checkpoint: Path, seed: int) -> None:
    assert learned(checkpoint, broadcast, seed=seed, speeches=DUET, skill=0, judge=of_roles) < NOT_LEARNED


# ---- turns: what the first turn did is rewarded at the second --------------------------------------------------------

TWO_TURNS = [Speech("writer", "sql", 8), Speech("writer", "sql", 9)]


def later(name: str, is_shown: bool, chance: float) -> Outcome:
    return 0.0, [reward(float(is_shown), span=f"{name}/1")]


@seeds
def test_rewards_to_go_teach_a_turn_what_came_of_it(checkpoint: Path, seed: int) -> None:
    assert learned(checkpoint, per_turn(), seed=seed, speeches=TWO_TURNS, skill=0, judge=later) > LEARNED


@seeds
def test_the_same_rewards_do_not_when_only_their_turn_is_credited(checkpoint: Path, seed: int) -> None:
    assert learned(checkpoint, broadcast, seed=seed, speeches=TWO_TURNS, skill=0, judge=later) < NOT_LEARNED


# ---- turns: a first turn whose luck dominates the total, a second one with the skill ---------------------------------


def by_turn(name: str, is_shown: bool, chance: float) -> Outcome:
    return 0.0, [reward(chance, span=f"{name}/0"), reward(float(is_shown), span=f"{name}/1")]


def in_one_sum(name: str, is_shown: bool, chance: float) -> Outcome:
    return is_shown + chance, []


@seeds
def test_turn_rewards_keep_the_luck_of_earlier_turns_away_from_later_ones(checkpoint: Path, seed: int) -> None:
    algorithm = HierarchicalGRPO(group_size=GROUP_SIZE, levels=("role", "turn"))
    assert (
        learned(checkpoint, per_turn(), seed=seed, speeches=TWO_TURNS, skill=1, judge=by_turn, algorithm=algorithm)
        > LEARNED
    )


@seeds
def test_their_sum_as_one_total_does_not(checkpoint: Path, seed: int) -> None:
    algorithm = HierarchicalGRPO(group_size=GROUP_SIZE, levels=("role", "turn"))
    assert (
        learned(checkpoint, broadcast, seed=seed, speeches=TWO_TURNS, skill=1, judge=in_one_sum, algorithm=algorithm)
        < NOT_LEARNED
    )
