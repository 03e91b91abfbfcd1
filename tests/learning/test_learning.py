"""A small task is learned from nothing but records: sampled tokens in, better weights out."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from leyden.interfaces import Algorithm, Group
from leyden.roles import Policy
from leyden.spans import Choice
from leyden_plugins.algorithms.rl import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    PPO,
    RLOO,
    DrGRPO,
    HierarchicalGRPO,
    ImportanceSampling,
    LightningRL,
    PolicyGradient,
    Reinforce,
    ReinforcePlusPlus,
)
from leyden_plugins.algorithms.sft import RejectionSampling
from leyden_plugins.learners.torch import TorchLearner
from leyden_plugins.torch_models.loading import load_model
from tests.learning.builders import RecordedSession, call, records

POLICY = Policy("sql", learning_rate=1e-2)
PROMPTS = [[1, 2], [3, 4], [5, 6], [7, 8]]
GROUP_SIZE = 8


def is_right(prompt: Sequence[int], answer: Sequence[int]) -> bool:
    """Accept a quarter of the tokens, another quarter for every prompt."""
    return answer[0] % 4 == PROMPTS.index(list(prompt))


class Bandit:
    """Samples two-token answers from the learner's published weights and rewards the first token."""

    def __init__(
        self, learner: TorchLearner, checkpoint: Path, seed: int, *, shuffled: bool = False, publish_every: int = 1
    ) -> None:
        self.learner = learner
        self.model = load_model(checkpoint)
        self.generator = torch.Generator().manual_seed(seed)
        self.rng = random.Random(seed) if shuffled else None
        self.publish_every = publish_every
        self.mean_rewards: list[float] = []
        self.finished: list[Mapping[str, float]] = []
        """The metrics of every step."""

    def groups(self, step: int) -> Sequence[Group]:
        """Return a group a prompt."""
        if (step - 1) % self.publish_every == 0:
            self.publish()
        found = [self._group(step, prompt) for prompt in PROMPTS]
        right = [
            is_right(one.completions[0].prompt_token_ids, one.completions[0].choices[0].token_ids)
            for each in found
            for one in each.rollouts
        ]
        self.mean_rewards.append(sum(right) / len(right))
        return found

    @torch.no_grad()
    def publish(self) -> None:
        tensors = self.learner.weights("sql").tensors
        assert tensors is not None
        for name, parameter in self.model.named_parameters():
            published = tensors[name]
            assert isinstance(published, Tensor)
            parameter.copy_(published)

    @torch.no_grad()
    def _group(self, step: int, prompt: list[int]) -> Group:
        tokens = torch.tensor([prompt] * GROUP_SIZE)
        logprobs: list[Tensor] = []
        for _ in range(2):
            distribution = torch.log_softmax(self.model(tokens).logits[:, -1], -1)
            drawn = torch.multinomial(distribution.exp(), 1, generator=self.generator)
            logprobs.append(distribution.gather(1, drawn))
            tokens = torch.cat([tokens, drawn], 1)
        answers = tokens[:, len(prompt) :].tolist()
        rewards = [float(is_right(prompt, answer)) for answer in answers]
        if self.rng is not None:
            self.rng.shuffle(rewards)
        group_id = f"{step}-{prompt[0]}"
        rollouts = []
        for number, (answer, reward) in enumerate(zip(answers, rewards, strict=True)):
            name = f"{group_id}-{number}"
            sampled = [float(one[number]) for one in logprobs]
            choice = Choice(index=0, token_ids=answer, logprobs=sampled, finish_reason="stop")
            completion = call(prompt, choice, span_id=name, rollout_id=name)
            rollouts.append(records(completion, total=reward, rollout_id=name, group_id=group_id))
        return Group(group_id=group_id, task={}, rollouts=rollouts)


def repr_of(algorithm: PolicyGradient) -> str:
    """Name an algorithm by the options that are not its defaults."""
    defaults = type(algorithm)()
    options = [one.name for one in fields(algorithm) if getattr(algorithm, one.name) != getattr(defaults, one.name)]
    return "-".join([type(algorithm).__name__, *options])


def learn(
    algorithm: Algorithm,
    checkpoint: Path,
    *,
    steps: int,
    seed: int = 0,
    shuffled: bool = False,
    publish_every: int = 1,
) -> Bandit:
    learner = TorchLearner()
    learner.open([POLICY], str(checkpoint), seed=seed)
    bandit = Bandit(learner, checkpoint, seed, shuffled=shuffled, publish_every=publish_every)
    session = RecordedSession(
        groups=bandit.groups,
        policies=[POLICY],
        total_steps=steps,
        learner=learner,
        max_staleness=publish_every - 1,
    )
    asyncio.run(algorithm.run(session))
    bandit.finished = session.finished
    return bandit


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_grpo_learns_the_bandit(checkpoint: Path, seed: int) -> None:
    bandit = learn(GRPO(group_size=GROUP_SIZE), checkpoint, steps=25, seed=seed)
    assert bandit.mean_rewards[0] < 0.45  # sampled before the first update
    assert sum(bandit.mean_rewards[-3:]) / 3 > 0.9
    ratios = [metrics["loss/ratio_max"] for metrics in bandit.finished if "loss/ratio_max" in metrics]
    assert ratios == pytest.approx([1.0] * len(ratios), abs=1e-4)


@pytest.mark.parametrize(
    "algorithm",
    [
        Reinforce(),
        Reinforce(baseline="running", entropy_coefficient=0.001),
        DrGRPO(rollout_tokens=2),
        RLOO(kl_in="reward", kl_coefficient=0.01),
        ReinforcePlusPlus(),
        ReinforcePlusPlus(group_baseline=False),
        PPO(),
        PPO(whiten=False, trace=1.0, epochs=2),
        HierarchicalGRPO(),
        LightningRL(),
        LightningRL(token_level=RLOO()),
        DAPO(updates_per_step=2),
        GSPO(epochs=2, kl_coefficient=0.01),
        CISPO(epochs=2),
        GRPO(epochs=2, correction=ImportanceSampling(mode="mask")),
        GRPO(by_role={"writer": CISPO()}),
    ],
    ids=repr_of,
)
def test_each_algorithm_learns_the_bandit(checkpoint: Path, algorithm: PolicyGradient) -> None:
    rewards = learn(algorithm, checkpoint, steps=25).mean_rewards
    assert rewards[0] < 0.45
    assert sum(rewards[-3:]) / 3 > 0.85


@pytest.mark.parametrize("algorithm", [GRPO(), GSPO(), CISPO(), RLOO()], ids=repr_of)
def test_stale_samples_are_corrected_and_learned_from(checkpoint: Path, algorithm: PolicyGradient) -> None:
    bandit = learn(algorithm, checkpoint, steps=36, publish_every=3)
    assert sum(bandit.mean_rewards[-3:]) / 3 > 0.85
    fresh, *_, stale = bandit.finished[0:3]
    assert fresh["correction/mean"] == pytest.approx(1.0, abs=1e-4)
    assert abs(stale["correction/mean"] - 1.0) > 0.01
    assert stale["loss/ratio_mean"] == pytest.approx(1.0, abs=1e-4)  # the loss's ratio starts where the update does


def test_rejection_sampling_learns_the_bandit(checkpoint: Path) -> None:
    rewards = learn(RejectionSampling(group_size=GROUP_SIZE), checkpoint, steps=25).mean_rewards
    assert rewards[0] < 0.45
    assert sum(rewards[-3:]) / 3 > 0.85


def test_shuffled_rewards_teach_nothing(checkpoint: Path) -> None:
    rewards = learn(GRPO(group_size=GROUP_SIZE), checkpoint, steps=25, shuffled=True).mean_rewards
    assert sum(rewards[-3:]) / 3 < 0.5
